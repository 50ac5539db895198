"""ART's border: NumPy in, NumPy out."""
