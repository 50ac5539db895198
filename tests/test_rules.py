"""Rules: exact probabilities of a false certificate and of a wrong answer, with controls that must be caught."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaln, ndtr, ndtri, xlogy
from scipy.stats import binom, binomtest

from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import Decision, Marginal, OneSided, Sequential, TopTwo, by_part
from art_rs_plugins.theory.votes import strongest_rival


def two_class_table(n: int) -> np.ndarray:
    counts = np.arange(n + 1)
    return np.stack([counts, n - counts], axis=1)


def all_tables(n: int, outcomes: int) -> np.ndarray:
    """Every way in which n draws can fall on `outcomes` outcomes."""
    rows = [row for row in itertools.product(range(n + 1), repeat=outcomes - 1) if sum(row) <= n]
    table = np.array(rows)
    return np.concatenate([table, n - table.sum(1, keepdims=True)], axis=1)


def multinomial(table: np.ndarray, p: np.ndarray) -> np.ndarray:
    n = table[0].sum()
    return np.exp(gammaln(n + 1) - gammaln(table + 1.0).sum(1) + xlogy(table, p).sum(1))


def radius_of(decision: Decision) -> np.ndarray:
    return np.where(decision.abstained, 0.0, gaussian_radius(decision.failure, decision.p_upper, 1.0))


def worst_case(n: int, n0: int, alpha: float, *, inflate: float = 1.0) -> float:
    """Largest P(certificate false) of the rule over linear classifiers of distance Phi^-1(p), by enumeration."""
    votes = two_class_table(n)
    claims = inflate * radius_of(OneSided(alpha).decide(votes, votes, n))
    # the worst cases lie just below the p that a claim needs, so these join the grid
    p = np.concatenate([np.linspace(0.001, 0.999, 999), ndtr(claims[claims > 0]) * (1 - 1e-9)])
    result = np.zeros(len(p))
    for guess in (0, 1):
        selection = np.zeros_like(votes)
        selection[:, guess] = n0
        radius = inflate * radius_of(OneSided(alpha).decide(selection, votes, n))
        truth = ndtri(p) if guess == 0 else -ndtri(p)   # signed distance to the boundary, seen from the guessed class
        false = (radius > 0) & (radius > truth[:, None])
        picked = binom.sf(n0 // 2, n0, p) if guess == 0 else binom.cdf(n0 // 2, n0, p)   # n0 is odd: no ties
        result += picked * (binom.pmf(np.arange(n + 1), n, p[:, None]) * false).sum(1)
    return float(result.max())


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("n", [15, 60, 200])
def test_false_certificates_by_exact_enumeration(n: int, alpha: float) -> None:
    assert worst_case(n, 1, alpha) <= alpha * (1 + 1e-9)
    assert 0.95 * alpha < worst_case(n, 201, alpha) <= alpha * (1 + 1e-9)   # it does reach what the rule may spend
    assert worst_case(n, 201, 2 * alpha) > 1.9 * alpha
    assert worst_case(n, 201, alpha, inflate=1.05) > 1.1 * alpha


@pytest.mark.parametrize("p", [(0.499, 0.501), (0.4985, 0.4995, 0.002), (0.001, 0.4985, 0.4985, 0.002)])
def test_reusing_the_selection_draws_breaks_the_promise(p: tuple[float, ...]) -> None:
    n, alpha = 24, 0.04
    law, table = np.array(p), all_tables(24, len(p))
    mass = multinomial(table, law)
    assert mass.sum() == pytest.approx(1.0)

    def false_rate(selection: np.ndarray) -> float:
        decision = OneSided(alpha).decide(selection, table, n)
        # p_A of the named class is all that the radius rests on; with two classes it is the true distance
        return float((mass * (~decision.abstained & (decision.p_lower > law[decision.prediction]))).sum())

    assert false_rate(table) > alpha * 1.2
    fresh = sum(
        binom_mass * false_rate(np.eye(len(p), dtype=int)[[guess] * len(table)])
        for guess, binom_mass in enumerate(law)   # selection by one draw of its own
    )
    assert fresh <= alpha


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6), st.integers(1, 30), st.integers(0, 5))
def test_invalid_votes_never_help(row: list[int], invalid: int, guess: int) -> None:
    votes = np.array([row])
    n = sum(row) + invalid + 1   # one invalid vote more than in the comparison below
    selection = np.eye(len(row), dtype=int)[[guess % len(row)]]
    decision = OneSided(0.01).decide(selection, votes, n)
    assert decision.prediction[0] == guess % len(row)
    others = [c for i, c in enumerate(row) if i != guess % len(row)]
    assert decision.runner_up_count[0] == max(others) + invalid + 1
    assert decision.count[0] == row[guess % len(row)]
    assert decision.p_lower[0] == clopper_pearson_lower(decision.count[0], n, 0.01)
    fewer = OneSided(0.01).decide(selection, votes, n - 1)
    assert fewer.p_lower[0] >= decision.p_lower[0]
    assert fewer.failure[0] <= decision.failure[0]
    assert bool(decision.abstained[0]) == (not decision.failure[0] < 0.5)


def test_sixty_percent_invalid_never_certifies() -> None:
    votes = np.array([[40_000, 0]])
    assert OneSided(0.001).decide(votes, votes, 100_000).abstained[0]
    assert TopTwo(0.001).decide(votes, 100_000).abstained[0]
    # without the invalid draws the same votes would be as sure as they come
    assert not OneSided(0.001).decide(votes, votes, 40_000).abstained[0]
    assert not TopTwo(0.001).decide(votes, 40_000).abstained[0]


def test_rule_certifies_the_selected_class_and_not_the_leader() -> None:
    selection, estimation = np.array([[9, 1], [0, 0]]), np.array([[10, 990], [990, 10]])
    decision = OneSided(0.001).decide(selection, estimation, 1000)
    assert decision.prediction.tolist() == [0, 0]
    assert decision.abstained.tolist() == [True, False]
    assert decision.count.tolist() == [10, 990]
    assert decision.runner_up_count.tolist() == [990, 10]


def answers(table: np.ndarray, classes: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    verdict = TopTwo(alpha).decide(table[:, :classes], int(table[0].sum()))
    return verdict.prediction, ~verdict.abstained


@pytest.mark.parametrize("classes, outcomes, n", [(2, 2, 60), (2, 3, 30), (3, 3, 30), (3, 4, 14)])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_wrong_answers_by_exact_enumeration(classes: int, outcomes: int, n: int, alpha: float) -> None:
    """Outcomes beyond the classes are invalid votes: an answer is wrong unless it is the most probable outcome."""
    table = all_tables(n, outcomes)
    steps = {2: 200, 3: 24, 4: 10}[outcomes]
    laws = [np.array(w) / steps for w in itertools.product(range(steps + 1), repeat=outcomes) if sum(w) == steps]
    # near ties are the worst case
    for best in range(outcomes):
        laws.append(np.where(np.arange(outcomes) == best, 1e-6, -1e-6 / (outcomes - 1)) + 1 / outcomes)
    laws += [np.roll([0.5 + 1e-6, 0.5 - 1e-6] + [0.0] * (outcomes - 2), i) for i in range(outcomes)]
    prediction, answered = answers(table, classes, alpha)
    loose_prediction, loose = answers(table, classes, min(8 * alpha, 0.99))
    worst = worst_loose = worst_valid = 0.0
    for law in laws:
        mass = multinomial(table, law)
        wrong = law[prediction] < law.max()
        wrong_valid = law[prediction] < law[:classes].max()   # the deployed classifier answers among the classes alone
        worst = max(worst, float((mass * (answered & wrong)).sum()))
        worst_valid = max(worst_valid, float((mass * (answered & wrong_valid)).sum()))
        worst_loose = max(worst_loose, float((mass * (loose & (law[loose_prediction] < law.max()))).sum()))
    assert max(worst, worst_valid) <= alpha
    assert worst_loose > alpha


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.3, 0.05, 0.001]))
def test_answers_follow_the_two_sided_binomial_test(a: int, b: int, invalid: int, alpha: float) -> None:
    verdict = TopTwo(alpha).decide(np.array([[a, b]]), a + b + invalid)
    top, rival = max(a, b), min(a, b) + invalid
    p_value = binomtest(top, top + rival, 0.5).pvalue if top > rival else 1.0
    assert bool(verdict.abstained[0]) == (p_value > alpha)
    assert verdict.prediction[0] == int(b > a)


def test_few_draws_always_abstain() -> None:
    assert TopTwo(0.001).decide(np.array([[10, 0]]), 10).abstained[0]         # 2 ** -9 > 0.001
    assert not TopTwo(0.001).decide(np.array([[11, 0]]), 11).abstained[0]     # 2 ** -10 < 0.001
    assert TopTwo(0.001).decide(np.array([[11, 0]]), 12).abstained[0]         # one vote was invalid


def test_strongest_rival_ignores_the_class_itself() -> None:
    votes = np.array([[5, 3, 1], [0, 9, 0]])
    assert strongest_rival(votes, np.array([0, 1]), 10).tolist() == [4, 1]
    assert votes.tolist() == [[5, 3, 1], [0, 9, 0]]


@pytest.mark.parametrize("rule", [OneSided, TopTwo])
def test_alpha_is_checked(rule) -> None:
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1"):
            rule(alpha)


def test_tables_are_checked() -> None:
    good = np.array([[3, 4]])
    for bad, error, message in (
        (good.astype(float), TypeError, "votes must be integers"),
        (np.array([3, 4]), ValueError, "shape"),
        (np.array([[3]]), ValueError, "k >= 2 classes"),
        (np.array([[-1, 4]]), ValueError, ">= 0"),
        (np.array([[5, 6]]), ValueError, "sum to at most n = 10"),
    ):
        with pytest.raises(error, match=f"estimation.*{message}"):
            OneSided().decide(good, bad, 10)
        with pytest.raises(error, match=f"prediction.*{message}"):
            TopTwo().decide(bad, 10)
    with pytest.raises(ValueError, match="selection votes must be >= 0"):
        OneSided().decide(-good, good, 10)


def test_marginal_reads_the_votes_of_one_of_several_classifiers() -> None:
    rng = np.random.default_rng(5)
    draws = np.stack([rng.choice(4, 300, p=[0.7, 0.1, 0.15, 0.05]), rng.choice(3, 300, p=[0.1, 0.85, 0.05])])
    cells = draws[0] * 3 + draws[1]   # outcomes 3 and 2 are the invalid votes

    def joint(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        return np.repeat(np.bincount(cells[start:stop], minlength=12)[None], len(rows), axis=0)

    def alone(part: int):
        return lambda rows, start, stop: np.repeat(
            np.bincount(draws[part][start:stop], minlength=4)[None, : (3, 2)[part]], len(rows), axis=0
        )

    first = np.zeros(1, dtype=np.int64)
    for part, rule in itertools.product((0, 1), (OneSided(0.01), Sequential((0.0, 0.25), 0.01))):
        marginal = Marginal(rule.alpha, rule, partial(by_part, sizes=(4, 3), part=part))
        mine = marginal.run(joint(first, 0, 50), 50, joint, 300, np.array([0.5]))
        theirs = rule.run(alone(part)(first, 0, 50), 50, alone(part), 300, np.array([0.5]))
        for name in ("prediction", "abstained", "failure", "count", "runner_up_count", "n"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
        assert not mine.abstained[0]
    assert Marginal(1e-6, OneSided(0.01), partial(by_part, sizes=(4, 3), part=1)).rule == OneSided(1e-6)
