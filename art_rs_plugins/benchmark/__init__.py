"""How it is used at scale: data, weights, attacks, records, runs, reports."""
