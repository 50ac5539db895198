"""A sigma table bound to the data set that it was made for: what estimators hold that train with a sigma for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.smoothing.sigma_table import SigmaTable

__all__ = ["BoundTable", "TableMaker"]

TableMaker = Callable[[int, float], SigmaTable]
"""From the number of examples and the noise level of training to a table: ``SigmaTable``, or a ``partial`` of it."""


class BoundTable:
    """A sigma table, and the digest of the inputs whose positions it is keyed by.

    Parameters
    ----------
    make : TableMaker
        Makes the table when the data set is known.

    Attributes
    ----------
    table : SigmaTable or None
        None until then.
    """

    def __init__(self, make: TableMaker) -> None:
        self.make = make
        self.table: SigmaTable | None = None
        self.data = ""

    def bind(self, x: NDArray[np.float32], sigma: float) -> SigmaTable:
        """Table of a data set x (b, ...), made if there is none.

        Raises
        ------
        ValueError
            If the table belongs to other inputs: its sigmas would go to examples that they were not found for.
        """
        digest = hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()
        if self.table is None:
            self.table, self.data = self._made(len(x), sigma), digest
        if digest != self.data or len(self.table.sigma) != len(x):
            raise ValueError(
                f"the sigma table belongs to another data set, of {len(self.table.sigma)} examples; train on that one, "
                "in its order, or construct another estimator"
            )
        return self.table

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep: that of the table, and the digest of its data set."""
        return {} if self.table is None else {**self.table.state_dict(), "data": self.data}

    def load_state_dict(self, state: Mapping[str, Any], sigma: float) -> None:
        """Continue from a checkpoint; ``ValueError`` if it is none."""
        if not {"log_sigma", "data"} <= set(state):
            raise ValueError(f"state must hold log_sigma and data, as state_dict gives them, got {sorted(state)}")
        table = self._made(len(state["log_sigma"]), sigma)
        table.load_state_dict(state)
        self.table, self.data = table, str(state["data"])

    def _made(self, size: int, sigma: float) -> SigmaTable:
        table = self.make(size, sigma)
        if not isinstance(table, SigmaTable):
            raise TypeError(f"table must make a SigmaTable from a size and a sigma, got {type(table).__name__}")
        return table
