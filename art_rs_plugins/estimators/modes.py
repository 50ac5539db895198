"""What a classifier with a sigma for each input can promise: by a memory, by a frozen one, or without any."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from art_rs_plugins.smoothing.scales import Conditional
from art_rs_plugins.smoothing.sigma import GridAscent, SigmaRule
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.elastic import SigmaFunction
from art_rs_plugins.theory.regions import Budget, Case, CertifiedRegions, EndlessBudget, Promise

__all__ = ["Commit", "Frozen", "Mode", "aim", "as_given", "check_mode"]


@dataclass(frozen=True, slots=True)
class Commit:
    """Answer from a memory; where it covers nothing, search sigma, certify, store the promise, and only then answer.

    Parameters
    ----------
    search : SigmaRule
        Proposes sigma from the network and the input; it is shown no label.
    path : path, optional
        File of the memory, on a local disk; one process at a time. None keeps it in main memory, where it ends with the
        estimator, and where copies of the estimator begin with none.
    budget : Budget
        How alpha is divided among all attempts to certify. The estimator's alpha bounds each of them as well.

    Notes
    -----
    *Guarantee* (kind ``committed``). After an answer (c, r) at x, every query that begins later and is closer to x than
    r is answered c, until the epoch ends: always, across restarts, and whatever the network does. With probability at
    least 1 - alpha of the budget, every stored class is that of the classifier smoothed with the sigma of its record,
    on the whole ball. *No guarantee* about queries before the promise, and so none against an attacker who asks first;
    promises depend on the order of the queries.
    """

    search: SigmaRule = field(default_factory=GridAscent)
    path: str | Path | None = None
    budget: Budget = field(default=EndlessBudget(0.001))   # frozen, so that all may share it

    def __post_init__(self) -> None:
        Conditional(self.search)   # or TypeError
        if not callable(getattr(self.budget, "level", None)):
            raise TypeError(f"budget must be a Budget, such as EndlessBudget(0.001), got {type(self.budget).__name__}")


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """Answer from promises that never change, and with plain smoothing at `scale` where they cover nothing.

    Parameters
    ----------
    regions : CertifiedRegions
        Of inputs that are not those of the test, such as `of` training inputs, or all that a `Commit` has promised:
        `PyTorchDataDependentSmoothing.freeze`. Not to be changed any more.

    Notes
    -----
    *Guarantee* (kind ``certified``). That of `CertifiedRegions.frozen`: a theorem about one fixed classifier, whatever
    the order of queries. More than plain smoothing is gained near stored inputs only.
    """

    regions: CertifiedRegions

    def __post_init__(self) -> None:
        if not isinstance(self.regions, CertifiedRegions):
            raise TypeError(f"regions must be CertifiedRegions, got {type(self.regions).__name__}; see Frozen.of")

    @classmethod
    def of(cls, x: ArrayLike, certificates: Certificates) -> Self:
        """Promises made for b inputs at once, whatever their order, from certificates of any kind."""
        regions = CertifiedRegions(np.shape(x)[1:])
        regions.insert(x, regions.settle(x, certificates))
        return cls(regions)

    def covering(self, x: Tensor) -> list[Promise | None]:
        """What is promised at inputs (b, ...); nothing where they hold NaN or Inf."""
        rows = np.flatnonzero(torch.isfinite(x).flatten(1).all(dim=1).cpu().numpy())
        covers: list[Promise | None] = [None] * len(x)
        for row, cover in zip(rows, self.regions.covering(as_given(x[rows])), strict=True):
            covers[row] = cover
        return covers

    def settle(self, x: Tensor, certificates: Certificates) -> Certificates:
        """Certificates of this classifier, from those of plain smoothing at the same inputs."""
        promises = self.regions.frozen(as_given(x), certificates)
        prediction = np.array([promise.prediction for promise in promises], dtype=np.int64)
        other = prediction != certificates.prediction   # of which the votes say nothing
        return replace(
            certificates,
            prediction=prediction,
            radius=np.array([promise.radius for promise in promises]),
            abstained=np.array([promise.case is Case.ABSTAINED for promise in promises]),
            p_lower=np.where(other, 0.0, certificates.p_lower),
            p_upper=np.where(other, 1.0, certificates.p_upper),
            count=np.where(other, 0, certificates.count),
            runner_up_count=np.where(other, certificates.n, certificates.runner_up_count),
        )


Mode = Commit | Frozen | Conditional | SigmaFunction
"""What answers, and what its certificates promise."""


def aim(mode: Mode) -> Any:
    """What attacks aim at: what answers where a memory covers nothing; None stands for plain smoothing at `scale`."""
    if isinstance(mode, Commit):
        return Conditional(mode.search)
    return None if isinstance(mode, Frozen) else mode


def check_mode(mode: Any) -> Mode:
    """Return a mode, or raise ``TypeError``."""
    if isinstance(mode, type) or not isinstance(mode, Commit | Frozen | Conditional | SigmaFunction):
        raise TypeError(
            "mode must be a Commit, Frozen, Conditional or a SigmaFunction, such as BinnedSigma, got "
            f"{mode!r}"
        )
    checked: Mode = mode
    return checked


def as_given(x: Tensor) -> NDArray[np.float32]:
    """Inputs as a memory takes them: just what the network sees."""
    return np.asarray(x.detach().cpu().numpy())
