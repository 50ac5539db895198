"""The audit on tables made by hand, and on certificates that are false on purpose."""

import numpy as np
import pytest
import torch
from closed_forms import Linear, certificates
from hypothesis import given
from hypothesis import strategies as st

from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.theory.audit import AttackOutcomes, audit, suspects


def outcomes(
    prediction, distance, *, budgets=(0.25, 0.5), abstained=False, confirmed=True, name="pgd", norm=2.0
) -> AttackOutcomes:
    prediction = np.array(prediction)
    return AttackOutcomes(
        name=name, budgets=np.array(budgets), prediction=prediction,
        abstained=np.broadcast_to(abstained, prediction.shape), distance=np.array(distance, dtype=np.float64),
        confirmed=np.broadcast_to(confirmed, prediction.shape), n=1000, alpha=0.001, norm=norm,
    )   # fmt: skip


def test_contradiction_is_another_class_strictly_inside_the_ball() -> None:
    some = certificates([0.4, 0.4, 0.4, np.nan, 0.4], prediction=[0, 0, 0, 0, 0], index=np.array([10, 11, 12, 13, 14]))
    run = outcomes([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1]], [[0.3, 0.4, 0.1, 0.1, 0.1], [0.5, 0.399, 0.1, 0.1, 0.1]],
                   abstained=np.array([[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]], bool),
                   confirmed=np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool))   # fmt: skip
    assert np.argwhere(suspects(some, run)).tolist() == [[0, 0], [1, 1]]
    report = audit(some, run, np.zeros(5, int))
    assert [(c.index, c.budget, c.confirmed) for c in report.suspected] == [(10, 0.25, False), (11, 0.5, True)]
    (case,) = report.contradictions
    assert (case.attack, case.distance, case.radius, case.certified, case.adversarial) == ("pgd", 0.399, 0.4, 0, 1)


def test_bracket_by_hand() -> None:
    some = certificates([0.3, 0.6, np.nan, 0.6], prediction=[0, 0, 0, 1])
    run = outcomes([[1, 0, 0, 1], [1, 0, 0, 1]], [[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5]],
                   abstained=np.array([[1, 0, 1, 0], [0, 0, 1, 0]], bool))   # fmt: skip
    report = audit(some, run, np.zeros(4, int))
    # input 0 abstains, then falls; 1 stands; 2 abstains; 3 was wrong from the start
    assert report.correct.tolist() == [0.25, 0.25]
    assert report.abstained.tolist() == [0.5, 0.25]
    assert report.wrong.tolist() == [0.25, 0.5]
    assert report.attacked.tolist() == [0.75, 0.5]
    assert report.certified.accuracy.tolist() == [0.5, 0.25]
    assert report.gap.tolist() == [0.25, 0.25]
    assert report.total == 4
    assert report.suspected == ()


def test_an_example_counts_at_every_budget_that_it_keeps_and_at_no_other() -> None:
    some = certificates([np.nan] * 4)
    # found within 0.5, though asked for within another budget; the last one overshoots by a rounding error of float32
    run = outcomes([[1, 0, 1, 1], [0, 1, 0, 0]], [[0.6, 0.0, 0.2, 0.25 * (1 + 5e-7)], [0.5, 0.1, 0.5, 0.5]])
    report = audit(some, run, np.zeros(4, int))
    assert report.wrong.tolist() == [0.75, 0.75]   # the first overshoots both budgets and counts at none
    clear = outcomes([[1, 0, 0, 0], [0, 0, 0, 0]], [[0.25001, 0, 0, 0], [0, 0, 0, 0]])
    assert audit(some, clear, np.zeros(4, int)).wrong.tolist() == [0.0, 0.25]


cells = st.tuples(st.integers(0, 1), st.booleans(), st.floats(0, 1))


@given(st.lists(st.lists(st.tuples(cells, cells, cells), min_size=4, max_size=4), min_size=1, max_size=3))
def test_accumulates_over_budgets_and_attacks_by_brute_force(tables) -> None:
    budgets, labels = np.array([0.2, 0.5, 0.9]), np.array([0, 1, 0, 1])
    runs = []
    for table in tables:
        columns = np.array(table, dtype=object)   # (4 inputs, 3 budgets, 3 fields)
        p, a, d = (np.array(columns[:, :, i].T.tolist()) for i in range(3))
        runs.append(outcomes(p.astype(int), d, budgets=budgets, abstained=a.astype(bool), name=f"attack {len(runs)}"))
    some = certificates([0.0, 0.0, np.nan, 0.0])
    report = audit(some, runs, labels)
    for j, budget in enumerate(budgets):
        states = []
        for i in range(4):
            found = [
                (r.abstained[e, i], r.prediction[e, i])
                for r in runs for e in range(3) if r.distance[e, i] <= budget * (1 + 1e-6) + 1e-9
            ]   # fmt: skip
            wrong = any(not silent and p != labels[i] for silent, p in found)
            states.append("wrong" if wrong else "abstained" if any(s for s, _ in found) else "correct")
        for state in ("wrong", "abstained", "correct"):
            assert getattr(report, state)[j] == states.count(state) / 4
    assert np.all(np.diff(report.wrong) >= 0)
    assert np.all(audit(some, runs[:1], labels).wrong <= report.wrong)
    assert np.allclose(report.wrong + report.abstained + report.correct, 1.0)


def test_honest_certificates_stand_and_inflated_ones_are_caught() -> None:
    f, sigma = Linear([3.0, 4.0], b=-0.5), 0.5
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.normal(size=(40, 2)).astype(np.float32))
    labels = (f.distance(x) < 0).astype(int)
    honest = certify(f, x, Gaussian(sigma), num_classes=2, n=2000, seed=1)
    # the strongest attack: straight through the boundary and a little farther
    signed = f.distance(x)
    step = np.abs(signed) + 1e-3
    budgets = np.sort(np.unique(np.append(step, 5.0)))
    run = outcomes(
        np.broadcast_to(1 - labels, (len(budgets), 40)), np.broadcast_to(step, (len(budgets), 40)), budgets=budgets
    )
    report = audit(honest, run, labels)
    assert report.contradictions == ()
    assert np.all(report.gap >= 0)
    inflated = certificates(
        np.where(honest.abstained, np.nan, honest.radius * 1.5), honest.prediction, count=honest.count, n=honest.n
    )
    caught = audit(inflated, run, labels)
    assert len({case.index for case in caught.contradictions}) > 20
    assert caught.gap.min() < 0


def test_what_does_not_fit_is_refused() -> None:
    some, run = certificates([0.5, 0.5]), outcomes([[0, 0], [0, 0]], [[0, 0], [0, 0]])
    with pytest.raises(ValueError, match="conditional"):
        audit(certificates([0.5, 0.5], kind="conditional"), run, [0, 0])
    with pytest.raises(ValueError, match="norm"):
        audit(certificates([0.5, 0.5], norm=1.0), run, [0, 0])
    with pytest.raises(ValueError, match="3 certificates, but 2 attacked"):
        suspects(certificates([0.5] * 3), run)
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        audit(some, run, [0])
    with pytest.raises(ValueError, match="at least one attack"):
        audit(some, [], [0, 0])
    with pytest.raises(ValueError, match="same budgets"):
        audit(some, [run, outcomes([[0, 0], [0, 0]], [[0, 0], [0, 0]], budgets=(0.25, 0.6))], [0, 0])
    for budgets in ((0.5, 0.25), (-0.1, 0.2), (0.3, 0.3)):
        with pytest.raises(ValueError, match="budgets must be ascending"):
            outcomes([[0], [0]], [[0], [0]], budgets=budgets)
    with pytest.raises(ValueError, match="distance must have shape"):
        outcomes([[0, 0], [0, 0]], [[0], [0]])
    with pytest.raises(ValueError, match="distance must be finite"):
        outcomes([[0], [0]], [[np.nan], [0]])
