"""An attack in two halves: adversarial inputs within a grid of budgets, and fresh votes that judge them."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from art_rs_plugins.benchmark.config import check_budgets
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.noise import check_seed, derive_seed
from art_rs_plugins.smoothing.sampling import check_count
from art_rs_plugins.theory.audit import AttackOutcomes, suspects
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.metrics import check_labels

__all__ = [
    "Attack",
    "Craft",
    "Images",
    "check_votes",
    "find_examples",
    "global_seeds",
    "judge",
    "linf_budget",
    "run_attack",
]

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


def find_examples(
    attack: Attack,
    estimator: PyTorchSmoothedClassifier,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    budgets: Sequence[float],
    steps: int = 20,
    seed: int | None = None,
    verbose: bool = False,
) -> Images:
    """Adversarial inputs at a grid of budgets, judged by nobody yet.

    Parameters
    ----------
    attack, estimator, x, labels, budgets, steps, seed, verbose
        As in `run_attack`.

    Returns
    -------
    ndarray of float32, shape (e, b, *input_shape)
        Each within its budget, up to a rounding error of float32.

    Raises
    ------
    ValueError, TypeError
        For inputs, labels or budgets that do not fit; the attack's own errors go through.
    """
    inputs, known, grid = _checked(estimator, x, labels, budgets)
    seed = check_seed(seed)
    check_count(steps, "steps")
    found: Images | None = None
    adversarial = np.empty((len(grid), *inputs.shape), dtype=np.float32)
    for level, budget in enumerate(tqdm(grid.tolist(), desc=attack.name, disable=not verbose)):
        if attack.budgeted or found is None:
            with global_seeds(derive_seed(seed, level, 3)):
                found = attack.make(estimator, budget, steps, derive_seed(seed, level, 0))(inputs, known)
        spent = torch.from_numpy(_within(inputs, found, budget, attack.name))
        accepted = estimator.noise(estimator.scale).nearest(spent, toward=torch.from_numpy(inputs))
        adversarial[level] = accepted.numpy()
    return adversarial


def judge(
    name: str,
    estimator: PyTorchSmoothedClassifier,
    x: ArrayLike,
    adversarial: Images,
    *,
    budgets: Sequence[float],
    certificates: Certificates | None = None,
    n: int = 200,
    seed: int | None = None,
) -> AttackOutcomes:
    """Let fresh votes judge what an attack found.

    Parameters
    ----------
    name : str
        Of the attack.
    estimator, x, budgets, certificates, n, seed
        As in `run_attack`.
    adversarial : ndarray of float32, shape (e, b, *input_shape)
        As `find_examples` returns them.

    Returns
    -------
    AttackOutcomes

    Raises
    ------
    ValueError
        If the certificates are not those of x, or if n votes can never decide.
    """
    inputs, seed = np.asarray(x, dtype=np.float32), check_seed(seed)
    check_votes(estimator, n)
    if certificates is not None:
        _check_lengths(certificates, inputs)
    answers = [
        estimator.predictions(found, n=n, seed=derive_seed(seed, level, 1)) for level, found in enumerate(adversarial)
    ]
    outcomes = AttackOutcomes(
        name=name,
        budgets=np.asarray(budgets, dtype=np.float64),
        prediction=np.stack([answer.prediction for answer in answers]),
        abstained=np.stack([answer.abstained for answer in answers]),
        distance=_distances(adversarial, inputs[None]),
        confirmed=np.zeros((len(adversarial), len(inputs)), dtype=bool),
        n=n,
        alpha=estimator.alpha,
    )
    return outcomes if certificates is None else _confirm(estimator, adversarial, certificates, outcomes, seed)


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
        Seed of votes and draws, and of the global generators while ART's attack runs; None takes entropy from the
        system.
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
    inputs, _, _ = _checked(estimator, x, labels, budgets)
    check_votes(estimator, n)
    if certificates is not None:
        _check_lengths(certificates, inputs)
    seed = check_seed(seed)
    found = find_examples(attack, estimator, x, labels, budgets=budgets, steps=steps, seed=seed, verbose=verbose)
    return judge(attack.name, estimator, x, found, budgets=budgets, certificates=certificates, n=n, seed=seed)


def _checked(
    estimator: PyTorchSmoothedClassifier, x: ArrayLike, labels: ArrayLike, budgets: Sequence[float]
) -> tuple[Images, NDArray[np.int64], NDArray[np.float64]]:
    inputs = np.asarray(x, dtype=np.float32)
    known = check_labels(labels, len(inputs))
    grid = check_budgets(budgets)
    if np.any(known < 0) or np.any(known >= estimator.nb_classes):
        span = f"[{known.min()}, {known.max()}]"
        raise ValueError(f"labels must be class indices in [0, {estimator.nb_classes}), got values in {span}")
    if not np.all(np.isfinite(inputs)):
        raise ValueError("x must be finite, got NaN or Inf; remove or repair these inputs")
    return inputs, known, grid


def linf_budget(estimator: Any, budget: float) -> float:
    """Largest linf budget whose ball lies in the l2 ball of `budget`: each of d values moves by budget / sqrt(d)."""
    return budget / math.sqrt(math.prod(estimator.input_shape))


def check_votes(estimator: PyTorchSmoothedClassifier, n: int) -> None:
    """Raise ``ValueError`` where n votes can never decide at the estimator's alpha."""
    if 2.0 * 0.5 ** check_count(n, "n") > estimator.alpha:
        raise ValueError(f"n={n} votes can never reach alpha={estimator.alpha}: every answer would abstain; raise n")


def _check_lengths(certificates: Certificates, x: Images) -> None:
    if len(certificates) != len(x):
        raise ValueError(f"certificates must be those of x: there are {len(certificates)}, for {len(x)} inputs")


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


@contextmanager
def global_seeds(seed: int) -> Iterator[None]:
    """Seed of the global generators that ART draws from, on the CPU; afterwards they go on as before."""
    numbers, standard, tensors = np.random.get_state(), random.getstate(), torch.get_rng_state()   # noqa: NPY002
    np.random.seed(seed % 2**32)   # noqa: NPY002
    random.seed(seed)
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    try:
        yield
    finally:
        np.random.set_state(numbers)   # noqa: NPY002
        random.setstate(standard)
        torch.set_rng_state(tensors)


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
