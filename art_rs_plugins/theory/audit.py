"""Certificates joined with attacks, input by input: certified <= true robust <= attacked accuracy, or an alarm.

An attack bounds the robust accuracy from above, a certificate from below. Where the two cross at a single input, one
of them is wrong; since the attack shows its example, it is the certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.metrics import Curve, accuracy_curve, certified_correct, check_labels

__all__ = ["AttackOutcomes", "Audit", "Contradiction", "audit", "suspects"]


@dataclass(frozen=True, slots=True)
class AttackOutcomes:
    """What an attack did to b inputs at e budgets; arrays of shape (e, b) unless said otherwise.

    Attributes
    ----------
    name : str
        Name of the attack.
    budgets : float64, shape (e,)
        Budgets in the units of the input, ascending.
    prediction : int64
        Class that the smoothed classifier answered at the adversarial input, from draws made after the attack.
    abstained : bool
        True where it abstained there; ``prediction`` then carries nothing.
    distance : float64
        Norm of the perturbation as it is, not as it was asked for.
    confirmed : bool
        True where more fresh draws, at a much smaller failure probability, confirmed ``prediction``.
    n, alpha : int, float
        Draws and failure probability of each prediction.
    norm : float
        Order of the norm.
    """

    name: str
    budgets: NDArray[np.float64]
    prediction: NDArray[np.int64]
    abstained: NDArray[np.bool_]
    distance: NDArray[np.float64]
    confirmed: NDArray[np.bool_]
    n: int
    alpha: float
    norm: float = 2.0

    def __post_init__(self) -> None:
        budgets = np.asarray(self.budgets, dtype=np.float64)
        if budgets.ndim != 1 or np.any(np.diff(budgets) <= 0) or np.any(budgets < 0) or not len(budgets):
            raise ValueError(f"budgets must be ascending and >= 0, got {self.budgets}")
        for name in ("prediction", "abstained", "distance", "confirmed"):
            shape = np.shape(getattr(self, name))
            if len(shape) != 2 or shape[0] != len(budgets) or shape != np.shape(self.prediction):
                raise ValueError(f"{name} must have shape (budgets, inputs) = ({len(budgets)}, b), got {shape}")
        if not np.all(np.isfinite(self.distance)):
            raise ValueError("distance must be finite; an attack that returned NaN has to be refused before this")


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One adversarial input inside the certified ball of its origin, with another class."""

    index: int
    attack: str
    budget: float
    distance: float
    radius: float
    certified: int
    adversarial: int
    confirmed: bool


@dataclass(frozen=True, slots=True)
class Audit:
    """Certificates against one or more attacks; arrays of shape (e,) over the budgets.

    Attributes
    ----------
    budgets : float64
        Budgets, in the units of the input.
    certified : Curve
        Certified accuracy at the budgets: the lower end of the bracket.
    correct, abstained, wrong : float64
        Fractions of all inputs, under the worst perturbation that any of the attacks found within the budget. An
        abstention is neither: nobody was deceived, and nobody was served.
    total : int
        Number of inputs.
    suspected : tuple of Contradiction
        Adversarial inputs inside a certified ball, confirmed or not.
    """

    budgets: NDArray[np.float64]
    certified: Curve
    correct: NDArray[np.float64]
    abstained: NDArray[np.float64]
    wrong: NDArray[np.float64]
    total: int
    suspected: tuple[Contradiction, ...]

    @property
    def contradictions(self) -> tuple[Contradiction, ...]:
        """The suspected ones that fresh draws confirmed. More than alpha allows means that something is broken."""
        return tuple(case for case in self.suspected if case.confirmed)

    @property
    def attacked(self) -> NDArray[np.float64]:
        """Upper end of the bracket: the fraction of inputs that no attack brought to a wrong class. Shape (e,)."""
        return 1.0 - self.wrong

    @property
    def gap(self) -> NDArray[np.float64]:
        """Attacked minus certified accuracy, shape (e,): how much neither side could decide."""
        return self.attacked - self.certified.accuracy


def suspects(certificates: Certificates, outcomes: AttackOutcomes) -> NDArray[np.bool_]:
    """Mask (e, b) of answers that, if they are right, contradict a certificate.

    Parameters
    ----------
    certificates : Certificates
        Of the b attacked inputs; kind ``conditional`` is refused.
    outcomes : AttackOutcomes
        Of one attack on them, in the same norm.
    """
    if certificates.kind == "conditional":
        raise ValueError("conditional certificates make no claim about the deployed classifier: nothing to audit")
    if certificates.norm != outcomes.norm:
        raise ValueError(f"certificates hold in norm {certificates.norm}, the attack is in norm {outcomes.norm}")
    if outcomes.prediction.shape[1] != len(certificates):
        raise ValueError(f"{len(certificates)} certificates, but {outcomes.prediction.shape[1]} attacked inputs")
    return np.asarray(
        ~certificates.abstained[None, :]
        & ~outcomes.abstained
        & (outcomes.distance < certificates.radius[None, :])
        & (outcomes.prediction != certificates.prediction[None, :])
    )


def audit(
    certificates: Certificates, outcomes: AttackOutcomes | list[AttackOutcomes], labels: ArrayLike
) -> Audit:
    """Join certificates with attacks on the same inputs.

    Parameters
    ----------
    certificates : Certificates
        Of b inputs, not ``conditional``.
    outcomes : AttackOutcomes or list of them
        Attacks on the same inputs in the same order, at the same budgets. An example counts at every budget that
        its distance keeps, whichever budget the attack was given.
    labels : array_like of int, shape (b,)
        True classes.

    Returns
    -------
    Audit

    Raises
    ------
    ValueError, TypeError
        Where inputs, norms, budgets or labels do not fit together.

    Notes
    -----
    *Guarantee.* ``certified.accuracy <= true robust accuracy <= attacked``, up to the failure probabilities of the
    certificates and of the predictions under attack, and to the millionth of its budget that an attack in float32 may
    overshoot.
    """
    runs = [outcomes] if isinstance(outcomes, AttackOutcomes) else list(outcomes)
    if not runs:
        raise ValueError("outcomes must hold at least one attack")
    known = check_labels(labels, len(certificates))
    budgets = np.asarray(runs[0].budgets, dtype=np.float64)
    wrong = np.zeros((len(budgets), len(known)), dtype=bool)
    silent = np.zeros_like(wrong)
    suspected: list[Contradiction] = []
    for run in runs:
        if not np.array_equal(run.budgets, budgets):
            raise ValueError(f"all attacks need the same budgets, got {run.budgets} and {budgets}")
        # An example counts at every budget that it keeps; float32 attacks overshoot their own by a rounding error.
        limits = budgets * (1.0 + 1e-6) + 1e-9
        spent = run.distance[None, :, :] <= limits[:, None, None]
        wrong |= (spent & ~run.abstained & (run.prediction != known)).any(axis=1)
        silent |= (spent & run.abstained).any(axis=1)
        for level, row in np.argwhere(suspects(certificates, run)):
            suspected.append(
                Contradiction(
                    index=int(certificates.index[row]),
                    attack=run.name,
                    budget=float(budgets[level]),
                    distance=float(run.distance[level, row]),
                    radius=float(certificates.radius[row]),
                    certified=int(certificates.prediction[row]),
                    adversarial=int(run.prediction[level, row]),
                    confirmed=bool(run.confirmed[level, row]),
                )
            )
    silent &= ~wrong
    return Audit(
        budgets=budgets,
        certified=accuracy_curve(certified_correct(certificates, known), certificates.radius, budgets),
        correct=(~wrong & ~silent).mean(axis=1),
        abstained=silent.mean(axis=1),
        wrong=wrong.mean(axis=1),
        total=len(known),
        suspected=tuple(suspected),
    )
