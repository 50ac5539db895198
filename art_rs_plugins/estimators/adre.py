"""ADRE: training that shrinks the runner-up, and a certificate that makes use of it."""

from __future__ import annotations

from typing import Any

from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.losses import ADRE
from art_rs_plugins.theory.rules import Rule
from art_rs_plugins.theory.two_sided import SequentialTwoSided, TwoSided

__all__ = ["PyTorchADRE"]


class PyTorchADRE(PyTorchSmoothedClassifier):
    """Smoothed classifier trained with ADRE and certified two-sidedly: the runner-up counts for what it is.

    Parameters
    ----------
    *args, **kwargs
        As `PyTorchSmoothedClassifier`. With ``adversary=SmoothAdv(eps)`` the training is ADREADV; `objective` is not
        taken, as it is ADRE.
    weight : float
        Of the regulariser, >= 0; 0 is Gaussian augmentation with several copies.
    draws : int
        Noisy copies of each input in training; with 1 the regulariser misleads, and a warning says so.
    split : float, optional
        Share of alpha for the bound of p_A, strictly between 0 and 1; None chooses it from the selection draws. Named
        radii need no split.

    Raises
    ------
    ValueError, TypeError
        As `PyTorchSmoothedClassifier`, and for a weight or split out of range.

    Notes
    -----
    *Guarantee.* That of `PyTorchSmoothedClassifier`; it comes from the votes and owes nothing to the training. The
    bounds are those of `TwoSided`, and of `SequentialTwoSided` where radii are named.

    *Source.* Feng et al. (2020), "Regularized Training and Tight Certification for Randomized Smoothed Classifier with
    Provable Robustness". The loss follows an independent re-implementation and the certificate is a sound form of what
    secondary sources report of theirs: the paper's own text was not at hand.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> classifier = PyTorchADRE(network, nn.CrossEntropyLoss(), (1, 2, 2), 3, scale=0.5, weight=0.2)
    >>> found = classifier.certificates(np.full((1, 1, 2, 2), 0.5), n=1000, seed=0)
    >>> classifier.objective
    ADRE(weight=0.2, floor=1e-10)
    """

    estimator_params = [   # noqa: RUF012 - ART's own convention
        *(name for name in PyTorchSmoothedClassifier.estimator_params if name != "objective"),
        "weight",
        "split",
    ]

    def __init__(
        self, *args: Any, weight: float = 0.1, draws: int = 8, split: float | None = 0.9, **kwargs: Any
    ) -> None:
        if "objective" in kwargs:
            raise TypeError("objective of PyTorchADRE is ADRE; use PyTorchSmoothedClassifier for another one")
        self.split = split
        super().__init__(*args, objective=ADRE(weight), draws=draws, **kwargs)

    @property
    def weight(self) -> float:
        """Weight of the regulariser."""
        return float(self.objective.weight)   # type: ignore[union-attr]

    @weight.setter
    def weight(self, value: float) -> None:
        self.objective = ADRE(value)

    @property
    def split(self) -> float | None:
        """Share of alpha for the bound of p_A, or None to choose it from the selection draws."""
        return self._split

    @split.setter
    def split(self, value: float | None) -> None:
        self._split = TwoSided(split=value).split

    def _rule(self, radii: tuple[float, ...] | None) -> Rule:
        return TwoSided(self.alpha, self.split) if radii is None else SequentialTwoSided(radii, self.alpha)
