"""Attacks run against an estimator and judged by fresh votes, ready to be joined with its certificates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from art.attacks.evasion import (
    AutoProjectedGradientDescent,
    CarliniL2Method,
    DeepFool,
    FastGradientMethod,
    ProjectedGradientDescent,
    SquareAttack,
)
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.estimators.inputs import as_limits
from art_rs_plugins.smoothing.adversary import SmoothedPGD
from art_rs_plugins.smoothing.modules import SmoothedModule
from art_rs_plugins.smoothing.noise import Gaussian, check_seed, derive_seed
from art_rs_plugins.smoothing.sampling import check_count, evaluating
from art_rs_plugins.theory.audit import AttackOutcomes, suspects
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.metrics import check_labels

__all__ = ["ATTACKS", "Attack", "run_attack"]

logger = logging.getLogger(__name__)

Images = NDArray[np.float32]
Craft = Callable[[Images, NDArray[np.int64]], Images]

CONFIRMATION_VOTES = 10_000
CONFIRMATION_ALPHA = 1e-6


@dataclass(frozen=True, slots=True)
class Attack:
    """An evasion attack that any estimator can be put to.

    Attributes
    ----------
    name : str
        As in tables.
    make : callable
        From (estimator, budget, steps, seed) to a function of inputs and labels that returns adversarial inputs.
    budgeted : bool
        False for attacks that look for the smallest perturbation and know no budget; they run once.
    """

    name: str
    make: Callable[[PyTorchSmoothedClassifier, float, int, int], Craft]
    budgeted: bool = True


def _fgm(estimator: PyTorchSmoothedClassifier, budget: float, _steps: int, _seed: int) -> Craft:
    return _generate(FastGradientMethod(estimator, norm=2, eps=budget))


def _pgd(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, _seed: int) -> Craft:
    step = 2.5 * budget / steps
    return _generate(
        ProjectedGradientDescent(estimator, norm=2, eps=budget, eps_step=step, max_iter=steps, verbose=False)
    )


def _auto_pgd(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, _seed: int) -> Craft:
    return _generate(
        AutoProjectedGradientDescent(
            estimator.attack_view(),
            norm=2,
            eps=budget,
            eps_step=2.0 * budget,
            max_iter=steps,
            nb_random_init=1,
            loss_type="cross_entropy",
            verbose=False,
        )
    )


def _square(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, _seed: int) -> Craft:
    return _generate(SquareAttack(estimator.attack_view(), norm=2, eps=budget, max_iter=10 * steps, verbose=False))


def _carlini(estimator: PyTorchSmoothedClassifier, _budget: float, steps: int, _seed: int) -> Craft:
    return _generate(CarliniL2Method(estimator.attack_view(), max_iter=steps, binary_search_steps=5, verbose=False))


def _deepfool(estimator: PyTorchSmoothedClassifier, _budget: float, steps: int, _seed: int) -> Craft:
    return _generate(DeepFool(estimator.attack_view(), max_iter=steps, verbose=False))


def _smoothed_pgd(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, seed: int) -> Craft:
    attack = SmoothedPGD(steps=steps, samples=estimator.bank_samples, block=estimator.performance.block)
    limits = as_limits(estimator.clip_values, estimator.input_shape, estimator.channels_first)
    if limits is not None:
        limits = limits[0].to(estimator.device), limits[1].to(estimator.device)

    def craft(x: Images, y: NDArray[np.int64]) -> Images:
        inputs, labels = torch.as_tensor(x, device=estimator.device), torch.as_tensor(y, device=estimator.device)
        with evaluating(estimator.model):
            if _is_plain(estimator, inputs):
                noise, probabilities = Gaussian(estimator.scale), estimator.model.probabilities
                settings = {"seed": seed, "clip_values": limits, "probabilities": probabilities}
                adversarial = attack.perturb(estimator.model.f, inputs, labels, noise, budget, **settings)
            else:
                adversarial = attack.perturb_soft(
                    lambda step: estimator.attack_view(seed=derive_seed(seed, step)).model,
                    inputs,
                    labels,
                    budget,
                    clip_values=limits,
                )
        return adversarial.cpu().numpy()

    return craft


def _is_plain(estimator: PyTorchSmoothedClassifier, x: torch.Tensor) -> bool:
    """Whether one noise on the input and one network are all there is; every input then gets draws of its own."""
    return type(estimator.model) is SmoothedModule and estimator.model.f.lift(x) is x


def _generate(attack: Any) -> Craft:
    def craft(x: Images, y: NDArray[np.int64]) -> Images:
        with np.errstate(all="ignore"):
            adversarial: Images = attack.generate(x, y)
        return adversarial

    return craft


ATTACKS: Mapping[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("fgm", _fgm),
        Attack("pgd", _pgd),
        Attack("smoothed-pgd", _smoothed_pgd),
        Attack("autopgd", _auto_pgd),
        Attack("square", _square),
        Attack("carlini", _carlini, budgeted=False),
        Attack("deepfool", _deepfool, budgeted=False),
    )
}
"""Attacks by name. Those that need scores attack `attack_view`; fresh votes of the estimator judge all of them."""


def run_attack(
    attack: Attack,
    estimator: PyTorchSmoothedClassifier,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    budgets: Sequence[float],
    certificates: Certificates | None = None,
    steps: int = 20,
    n: int = 200,
    seed: int | None = None,
    verbose: bool = False,
) -> AttackOutcomes:
    """Attack b inputs at a grid of budgets, and let fresh votes judge the results.

    Parameters
    ----------
    attack : Attack
        One of `ATTACKS`, or your own around any of ART's evasion attacks.
    estimator : PyTorchSmoothedClassifier
        The classifier under attack.
    x : array_like, shape (b, *input_shape)
        Raw inputs.
    labels : array_like of int, shape (b,)
        True classes.
    budgets : sequence of float
        l2 budgets, ascending and > 0. What an attack returns beyond its budget is pulled back to it.
    certificates : Certificates, optional
        Of the same inputs. Adversarial inputs within a certified radius are then voted on again, with 10,000 fresh
        draws at a failure probability of 1e-6, before they count as confirmed.
    steps : int
        Gradient steps, or what the attack makes of that number.
    n : int
        Votes for each adversarial input, at the estimator's alpha.
    seed : int, optional
        Seed of votes and draws; None takes entropy from the system.
    verbose : bool
        Show a progress bar.

    Returns
    -------
    AttackOutcomes

    Raises
    ------
    ValueError, TypeError
        For inputs, labels or budgets that do not fit.
    """
    inputs = np.asarray(x, dtype=np.float32)
    known = check_labels(labels, len(inputs))
    grid = np.asarray(budgets, dtype=np.float64)
    if grid.ndim != 1 or not len(grid) or np.any(~np.isfinite(grid) | (grid <= 0)) or np.any(np.diff(grid) <= 0):
        raise ValueError(f"budgets must be ascending and > 0, in the units of the input, got {list(budgets)}")
    if np.any(known < 0) or np.any(known >= estimator.nb_classes):
        span = f"[{known.min()}, {known.max()}]"
        raise ValueError(f"labels must be class indices in [0, {estimator.nb_classes}), got values in {span}")
    if not np.all(np.isfinite(inputs)):
        raise ValueError("x must be finite, got NaN or Inf; remove or repair these inputs")
    if certificates is not None and len(certificates) != len(inputs):
        raise ValueError(f"certificates must be those of x: there are {len(certificates)}, for {len(inputs)} inputs")
    if 2.0 * 0.5 ** check_count(n, "n") > estimator.alpha:
        raise ValueError(f"n={n} votes can never reach alpha={estimator.alpha}: every answer would abstain; raise n")
    seed = check_seed(seed)
    check_count(steps, "steps")
    found: Images | None = None
    adversarial = np.empty((len(grid), *inputs.shape), dtype=np.float32)
    answers = []
    for level, budget in enumerate(tqdm(grid.tolist(), desc=attack.name, disable=not verbose)):
        if attack.budgeted or found is None:
            found = attack.make(estimator, budget, steps, derive_seed(seed, level, 0))(inputs, known)
        spent = torch.from_numpy(_within(inputs, found, budget, attack.name))
        accepted = estimator.noise(estimator.scale).nearest(spent, toward=torch.from_numpy(inputs))
        adversarial[level] = accepted.numpy()
        answers.append(estimator.predictions(adversarial[level], n=n, seed=derive_seed(seed, level, 1)))
    outcomes = AttackOutcomes(
        name=attack.name,
        budgets=grid,
        prediction=np.stack([answer.prediction for answer in answers]),
        abstained=np.stack([answer.abstained for answer in answers]),
        distance=_distances(adversarial, inputs[None]),
        confirmed=np.zeros((len(grid), len(inputs)), dtype=bool),
        n=n,
        alpha=estimator.alpha,
    )
    return outcomes if certificates is None else _confirm(estimator, adversarial, certificates, outcomes, seed)


def _confirm(
    estimator: PyTorchSmoothedClassifier,
    adversarial: Images,
    certificates: Certificates,
    outcomes: AttackOutcomes,
    seed: int,
) -> AttackOutcomes:
    """Vote again on every answer that would contradict a certificate."""
    doubtful = suspects(certificates, outcomes)
    if not doubtful.any():
        return outcomes
    fresh = derive_seed(seed, len(adversarial), 2)
    again = estimator.predictions(adversarial[doubtful], n=CONFIRMATION_VOTES, alpha=CONFIRMATION_ALPHA, seed=fresh)
    certified = np.broadcast_to(certificates.prediction, doubtful.shape)[doubtful]
    confirmed = np.zeros_like(doubtful)
    confirmed[doubtful] = ~again.abstained & (again.prediction != certified)
    return replace(outcomes, confirmed=confirmed)


def _distances(adversarial: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float64]:
    """l2 distances over all axes of one input, in float64. Shape (e, b)."""
    difference = adversarial.astype(np.float64) - x.astype(np.float64)
    return np.asarray(np.sqrt(np.sum(difference**2, axis=tuple(range(2, difference.ndim)))), dtype=np.float64)


def _within(x: Images, found: Images, budget: float, name: str) -> Images:
    """Adversarial inputs pulled back to the budget; where the attack returned NaN, the input as it was."""
    broken = ~np.isfinite(found).reshape(len(x), -1).all(axis=1)
    if broken.any():
        logger.warning("%s returned NaN or Inf for %d inputs; they count as not attacked", name, broken.sum())
        found = np.where(broken.reshape(-1, *[1] * (x.ndim - 1)), x, found)
    distance = _distances(found[None], x[None])[0]
    factor = np.minimum(1.0, budget / np.maximum(distance, 1e-30)).reshape(-1, *[1] * (x.ndim - 1))
    return np.asarray(np.where(factor < 1.0, x + factor * (found.astype(np.float64) - x), found), dtype=np.float32)
