"""A memory between users and an attacker: what is kept once it is promised, and what whoever asks first achieves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tabulate import tabulate

from art_rs_plugins.benchmark.attacks import ATTACKS, Attack, run_attack
from art_rs_plugins.benchmark.config import RunConfig, parse_examples
from art_rs_plugins.benchmark.files import write_atomic
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.estimators.data_dependent import PyTorchDataDependentSmoothing
from art_rs_plugins.estimators.modes import Commit
from art_rs_plugins.smoothing.noise import check_seed, derive_seed
from art_rs_plugins.theory.audit import suspects
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.metrics import check_labels
from art_rs_plugins.theory.regions import Case

__all__ = ["MemoryStudy", "study_memory", "write_study"]


@dataclass(frozen=True, slots=True, eq=False)
class MemoryStudy:
    """Who asks first, and what comes of it; arrays of shape (e,) over the budgets, fractions of all b inputs.

    Attributes
    ----------
    budgets : float64
        l2 budgets of the attacker.
    promised : float64
        Users first: right class, promised at least as far as the budget.
    kept : float64
        Users first, and then the attacker: right class at the adversarial input.
    first : float64
        The attacker first, with a memory that is empty: right class at the adversarial input.
    afterwards : float64
        And then the users: right class at the clean input.
    broken : int
        Adversarial inputs within a promised ball that were answered otherwise, confirmed; anything but 0 is a defect.
    total, order_seed : int
        Number of inputs, and seed of the order in which users ask, one after the other.
    cases : Counter
        How the users' promises came about.
    radius_lost : float
        Sum of what was trimmed from the users' radii.
    spent : float
        Alpha that the users' promises took.
    """

    budgets: NDArray[np.float64]
    promised: NDArray[np.float64]
    kept: NDArray[np.float64]
    first: NDArray[np.float64]
    afterwards: NDArray[np.float64]
    broken: int
    total: int
    order_seed: int
    cases: Counter[Case]
    radius_lost: float
    spent: float

    def markdown(self) -> str:
        """Table by budget, and in words what it does not say."""
        rows = [
            {
                "budget": f"{budget:g}",
                "promised and right": f"{self.promised[level]:.3f}",
                "users first: right under attack": f"{self.kept[level]:.3f}",
                "attacker first: right under attack": f"{self.first[level]:.3f}",
                "and users afterwards: right": f"{self.afterwards[level]:.3f}",
            }
            for level, budget in enumerate(self.budgets)
        ]
        cases = ", ".join(f"{self.cases[case]} {case.name.lower()}" for case in Case)
        return (
            f"{tabulate(rows, 'keys', 'github', disable_numparse=True)}\n\n"
            f"Mode Commit; {self.total} inputs, asked one after the other in an order of seed {self.order_seed}: "
            f"{cases}. Radius lost to other promises: {self.radius_lost:.4g} in all; alpha spent: {self.spent:.4g}. "
            f"Promises broken: {self.broken}. What is promised holds for whoever asks later; it bounds nothing that an "
            "attacker who asks first achieves, and is no certified accuracy.\n"
        )


def study_memory(
    classifier: PyTorchDataDependentSmoothing,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    budgets: Sequence[float],
    attack: Attack = ATTACKS["pgd"],
    n: int = 10_000,
    steps: int = 20,
    votes: int = 200,
    seed: int | None = None,
) -> MemoryStudy:
    """Let users and an attacker ask the same classifier, in both orders, each time with a memory of its own.

    Parameters
    ----------
    classifier : PyTorchDataDependentSmoothing
        Under ``Commit``; its own memory is neither asked nor changed.
    x, labels, budgets
        As in `run_attack`.
    attack : Attack
        Aims at the smoothed classifier at the sigma that is chosen anew wherever it looks. Both orders meet the same
        adversarial inputs.
    n : int
        Estimation draws of a user's certificate.
    steps, votes, seed
        As in `run_attack`, with ``votes`` for an answer to the attacker.

    Returns
    -------
    MemoryStudy

    Raises
    ------
    ValueError, TypeError
        Under another mode, and as `run_attack`.
    """
    mode = classifier.mode
    if not isinstance(mode, Commit):
        raise ValueError(f"classifier must be in mode Commit, got {type(mode).__name__}: only a memory has an order")
    inputs, known, seed = np.asarray(x, dtype=np.float32), check_labels(labels, len(np.asarray(x))), check_seed(seed)
    remembered = _remembering(attack)
    settings: dict[str, Any] = {"steps": steps, "n": votes, "seed": seed}

    def fresh() -> PyTorchDataDependentSmoothing:
        return type(classifier).from_classifier(classifier, mode=replace(mode, path=None))

    users = fresh()
    order = np.random.default_rng([seed, 0]).permutation(len(inputs))
    replies = [users.reply(inputs[row : row + 1], n=n, indices=[row], seed=derive_seed(seed, 1)) for row in order]
    committed = Certificates.concatenate([reply.certificates for reply in replies])[np.argsort(order)]
    lost = float((users.memory.records["raw_radius"] - users.memory.records["radius"]).sum())
    spent = users.memory.spent
    right = ~committed.abstained & (committed.prediction == known)
    outcomes = run_attack(remembered, users, inputs, known, budgets=budgets, certificates=committed, **settings)
    users.close()
    first, afterwards = [], []
    for level, budget in enumerate(outcomes.budgets.tolist()):
        crowd = fresh()
        alone = run_attack(remembered, crowd, inputs, known, budgets=(budget,), **settings)
        first.append(np.mean(~alone.abstained[0] & (alone.prediction[0] == known)))
        later = crowd.certificates(inputs, n=n, seed=derive_seed(seed, 2, level))
        afterwards.append(np.mean(~later.abstained & (later.prediction == known)))
        crowd.close()
    return MemoryStudy(
        budgets=outcomes.budgets,
        promised=np.array([np.mean(right & committed.holds_at(budget)) for budget in outcomes.budgets.tolist()]),
        kept=np.mean(~outcomes.abstained & (outcomes.prediction == known), axis=1),
        first=np.array(first),
        afterwards=np.array(afterwards),
        broken=int((suspects(committed, outcomes) & outcomes.confirmed).sum()),
        total=len(inputs),
        order_seed=seed,
        cases=Counter(promise.case for reply in replies for promise in reply.promises),
        radius_lost=lost,
        spent=spent,
    )


def _remembering(attack: Attack) -> Attack:
    """An attack that makes its adversarial inputs once for each budget."""
    made: dict[float, Any] = {}

    def make(estimator: Any, budget: float, steps: int, seed: int) -> Callable[..., Any]:
        def craft(x: Any, y: Any) -> Any:
            if budget not in made:
                made[budget] = attack.make(estimator, budget, steps, seed)(x, y)
            return made[budget]

        return craft

    return replace(attack, make=make)


def write_study(
    config: RunConfig, output: Path, *, budgets: Sequence[float] = (0.25, 0.5), inputs: int = 20, steps: int = 5
) -> MemoryStudy:
    """Study the memory of a configuration on some of its examples, and write the table to `output`, as Markdown."""
    data, classifier = open_estimator(config)
    if not isinstance(classifier, PyTorchDataDependentSmoothing):
        raise ValueError(f"method must be data-dependent, got {config.method!r}: only a memory has an order")
    rows = parse_examples(config.examples, len(data.x_test))
    rows = rows[:: max(1, len(rows) // inputs)][:inputs]
    found = study_memory(
        classifier, data.x_test[rows], data.y_test[rows], budgets=budgets, n=config.n, steps=steps, seed=config.seed
    )
    write_atomic(output, found.markdown().encode())
    return found
