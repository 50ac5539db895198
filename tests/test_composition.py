"""The algebra of compositions: exact numbers, brute force on functions of a line, and rates that a lie would exceed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from closed_forms import allowed, certificates
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom, multinomial

from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.composition import (
    CERTIFY,
    CORE,
    Claim,
    Fallback,
    Histogram,
    Leading,
    Minimum,
    Split,
    Threshold,
    as_certificates,
    by_answer,
    by_class,
    by_score,
    check_tau,
    compose,
    settle,
)
from art_rs_plugins.theory.metrics import average_certified_radius, certified_accuracy, certified_correct
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import Marginal, OneSided, Verdict

ONE = np.array([1.0])


def claim(prediction, radius, abstained=False) -> Claim:
    prediction = np.atleast_1d(np.asarray(prediction, dtype=np.int64))
    shape = prediction.shape
    return Claim(
        prediction,
        np.broadcast_to(np.asarray(radius, dtype=np.float64), shape).copy(),
        np.broadcast_to(np.asarray(abstained), shape).copy(),
    )


def verdict(prediction, abstained=False) -> Verdict:
    prediction = np.atleast_1d(np.asarray(prediction, dtype=np.int64))
    return Verdict(prediction, np.broadcast_to(np.asarray(abstained), prediction.shape).copy())


def of(decision) -> Claim:
    """A decision as a claim, its radius from its bounds at sigma 1 where it names none."""
    radius = gaussian_radius(decision.failure, decision.p_upper, 1.0) if decision.radius is None else decision.radius
    return Claim(decision.prediction, np.where(decision.abstained, 0.0, radius), decision.abstained)


def both(count: np.ndarray, n: int) -> np.ndarray:
    """Votes (b, 2) of which `count` are for 1."""
    return np.stack([n - count, count], axis=1)


# ---------------------------------------------------------------------------------------------- certificates


def test_the_table_of_routes():
    core = Claim.fixed([7])
    for allocation in (Split(), Minimum()):
        for selector, smoothed, expected in (
            (claim(CERTIFY, 0.4), claim(3, 0.9), (3, 0.4, False)),
            (claim(CERTIFY, 0.9), claim(3, 0.4), (3, 0.4, False)),
            (claim(CERTIFY, 0.9), claim(3, 0.0, True), (3, 0.0, True)),
            (claim(CORE, 0.9), claim(3, 0.4), (7, 0.0, False)),   # routing is robust, the class is not
            (claim(CORE, 0.9), claim(3, 0.0, True), (7, 0.0, False)),
            (claim(CERTIFY, 0.0, True), claim(3, 0.4), (3, 0.0, True)),
            (claim(CORE, 0.0, True), claim(3, 0.4), (7, 0.0, True)),
        ):
            known = compose(allocation, [(selector, smoothed)], core)
            assert (known.prediction[0], known.radius[0], known.abstained[0]) == expected


def test_agreement_of_both_branches_needs_no_selector_but_the_sum_of_alphas():
    for guess in (CERTIFY, CORE):
        parts = [(claim(guess, 0.0, True), claim(7, 0.4))]
        known = compose(Split(), parts, Claim.fixed([7]))
        assert (known.prediction[0], known.radius[0], known.abstained[0]) == (7, 0.0, False)
        assert compose(Minimum(), parts, Claim.fixed([7])).abstained[0]
        assert compose(Split(), parts, Claim.fixed([7], abstained=[True])).abstained[0]
        assert compose(Split(), [(parts[0][0], claim(7, 0.0, True))], Claim.fixed([7])).abstained[0]


def test_a_core_that_never_changes_class():
    """Selector boundary at 0.6, smoothed boundary at 0.9; the core says 0, or it says 1 as the smoothed one does."""
    x = np.array([0.6, 0.9])
    selector, smoothed = claim(CERTIFY, 0.6), claim(1, 0.9)
    angle, reach = np.linspace(0.0, 2.0 * np.pi, 20_001), np.linspace(0.5, 1.0, 501)
    for core, distance, claimed in ((0, 0.6, {Split: 0.6, Minimum: 0.6}), (1, 0.9, {Split: 0.9, Minimum: 0.6})):
        z = x + reach[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        answers = np.where(z[..., 0] >= 0.0, (z[..., 1] >= 0.0).astype(int), core)
        assert reach[(answers != 1).any(axis=1)].min() == pytest.approx(distance, abs=2e-3)
        for allocation, radius in claimed.items():
            assert compose(allocation(), [(selector, smoothed)], Claim.fixed([core], np.inf)).radius[0] == radius
        assert compose(Split(), [(selector, smoothed)], Claim.fixed([core])).radius[0] == 0.6


@pytest.mark.parametrize(("other", "split"), [(5, 0.5), (4, 0.4)], ids=["agrees", "differs"])
def test_a_chain_by_its_path_and_by_what_is_reachable(other, split):
    first = claim(CORE, 0.4), claim(other, 0.9)
    second = claim(CERTIFY, 0.7), claim(5, 0.5)
    core = Claim.fixed([0])
    for allocation, radius in ((Minimum(), 0.4), (Split(), split)):
        known = compose(allocation, [first, second], core)
        assert (known.prediction[0], known.radius[0]) == (5, radius)
    assert compose(Minimum(), [second], core).radius[0] == compose(Split(), [second], core).radius[0] == 0.5


LINE = range(-6, 7)
values = st.lists(st.integers(0, 2), min_size=len(LINE), max_size=len(LINE))
bits = st.lists(st.integers(0, 1), min_size=len(LINE), max_size=len(LINE))


def exact(function: list[int]) -> Claim:
    """The whole truth about a function of a line, at 0."""
    here = function[LINE.index(0)]
    changes = [abs(t) for t, value in zip(LINE, function, strict=True) if value != here]
    return claim(here, min(changes, default=np.inf))


@given(stages=st.lists(st.tuples(bits, values), min_size=1, max_size=3), core=values, known=st.booleans())
def test_compositions_of_functions_of_a_line(stages, core, known):
    """Brute force: within the composed radius the composition is what it is said to be, at whatever depth."""

    def answer(position: int) -> int:
        return next((values[position] for bit, values in stages if bit[position] == CERTIFY), core[position])

    claims = [(exact(bit), exact(values)) for bit, values in stages]
    last = exact(core) if known else Claim.fixed([core[LINE.index(0)]])
    answers = [answer(position) for position in range(len(LINE))]
    found = {allocation: compose(allocation(), claims, last) for allocation in (Split, Minimum)}
    for result in found.values():
        assert not result.abstained[0]
        inside = [answers[i] for i, t in enumerate(LINE) if abs(t) < max(result.radius[0], 0.5)]
        assert set(inside) == {result.prediction[0]}
    assert found[Split].radius[0] >= found[Minimum].radius[0]


# ---------------------------------------------------------------------------------------------- bookkeeping


def test_core_rows_count_at_zero_alone_and_radii_are_not_rounded():
    smoothed = certificates([0.9996, 0.8, 0.8, np.nan, 0.7], prediction=[1, 1, 1, 1, 0])
    selector = claim([CERTIFY, CORE, CERTIFY, CERTIFY, CORE], [2.0, 2.0, 0.0, 2.0, 2.0], [0, 0, 1, 0, 0])
    known = compose(Split(), [(selector, Claim.of(smoothed))], Claim.fixed([0, 1, 0, 0, 0]))
    found = as_certificates(known, [(selector, smoothed)], 0.001)
    labels = np.array([1, 1, 1, 1, 0])
    assert certified_correct(found, labels).tolist() == [True, True, False, False, True]
    assert certified_accuracy(found, labels, [0.0, 0.5, 0.9996, 1.0]).accuracy.tolist() == [0.6, 0.2, 0.2, 0.0]
    assert average_certified_radius(certified_correct(found, labels), found.radius) == pytest.approx(0.9996 / 5)
    assert found.radius.tolist() == [0.9996, 0.0, 0.0, 0.0, 0.0]
    assert found.abstained.tolist() == [False, False, True, True, False]
    assert found.alpha.tolist() == [0.001] * 5
    assert found.count.tolist() == [950, 0, 950, 950, 0]   # the core has no votes
    assert found.p_lower.tolist() == [0.9, 0.0, 0.9, 0.9, 0.0]


def test_evidence_is_that_of_the_stage_that_answers():
    stages = [
        (claim([CERTIFY, CORE, CORE], 9.0), certificates([0.5] * 3, n=[1000] * 3, sigma=[1.0] * 3)),
        (claim([CERTIFY, CERTIFY, CORE], 9.0), certificates([0.5] * 3, n=[2000] * 3, sigma=[0.25] * 3)),
    ]
    known = compose(Split(), [(selector, Claim.of(part)) for selector, part in stages], Claim.fixed([0, 0, 0]))
    found = as_certificates(known, stages, 0.01)
    assert found.sigma.tolist() == [1.0, 0.25, 0.25]
    assert found.n.tolist() == [1000, 2000, 2000]
    assert found.p_upper.tolist() == [0.1, 0.1, 1.0]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("certified", "certified"), "certified"),
        (("exact", "exact"), "exact"),
        (("exact", "certified"), "certified"),
        (("certified", "committed"), "committed"),
    ],
)
def test_a_composition_promises_what_its_weakest_part_does(kinds, expected):
    stages = [(claim(CERTIFY, 1.0), certificates([0.5], kind=kind)) for kind in kinds]
    known = compose(Split(), [(selector, Claim.of(part)) for selector, part in stages], Claim.fixed([0]))
    found = as_certificates(known, stages, 0.001)
    assert found.kind == expected
    if expected == "committed":
        with pytest.raises(ValueError, match="committed certificates are no theorems"):
            certified_correct(found, [0])


def test_a_sigma_of_its_own_for_each_input_is_refused():
    """f = 1[|t| <= 1], sigma(0) = 0.25, sigma(0.3) = 2: the radius at 0 covers 0.3, where another class answers."""
    inside = ndtr(1.0 / 0.25) - ndtr(-1.0 / 0.25)
    assert 0.25 * ndtri(inside) == pytest.approx(0.9582, abs=1e-4)
    assert ndtr(0.7 / 2.0) - ndtr(-1.3 / 2.0) == pytest.approx(0.37898, abs=1e-5)
    with pytest.raises(ValueError, match=r"conditional certificates cannot be composed.*Envelope"):
        Claim.of(certificates([0.9582], kind="conditional"))


# ---------------------------------------------------------------------------------------------- selectors


def test_saturated_selectors_have_the_known_caps():
    n, sigma = 100_000, np.array([1.0])
    full, none = both(np.array([n]), n), both(np.array([0]), n)
    for alpha, bound, cap in ((0.001, 0.9999309, 3.8115), (5e-4, 0.9999240, 3.7878)):
        found = Threshold(0.5, alpha).decide(full, full, n, sigma)
        assert clopper_pearson_lower(n, n, alpha) == pytest.approx(bound, abs=5e-8)
        assert found.p_lower[0] == pytest.approx(bound, abs=5e-8)
        assert found.radius[0] == pytest.approx(cap, abs=5e-5)
        assert found.prediction[0] == CERTIFY
        mirrored = Threshold(0.5, alpha).decide(none, none, n, sigma)
        assert (mirrored.prediction[0], mirrored.radius[0]) == (CORE, found.radius[0])
        against = Threshold(0.5, alpha).decide(full, none, n, sigma)   # certify named, and no vote for it
        assert (against.abstained[0], against.radius[0], against.p_lower[0]) == (True, 0.0, 0.0)
        assert np.isfinite(against.failure[0])


def test_at_a_half_the_radius_is_bit_for_bit_that_of_cohen():
    votes = both(np.arange(501, 1001), 1000)
    found = Threshold(0.5, 0.01).decide(votes, votes, 1000, np.full(500, 0.3))
    known = OneSided(0.01).decide(votes, votes, 1000)
    expected = np.where(known.abstained, 0.0, gaussian_radius(known.failure, known.p_upper, 0.3))
    assert np.array_equal(found.radius, expected)
    assert np.array_equal(found.abstained, known.abstained | (expected == 0.0))


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_a_shifted_threshold_shifts_both_radii(tau):
    n, alpha, sigma = 2000, 0.01, np.array([0.5])
    for count in (1, 150, 700, 1300, 1990):
        votes = both(np.array([count]), n)
        found = Threshold(tau, alpha).decide(votes, votes, n, sigma)
        certify = count >= tau * n
        assert found.prediction[0] == (CERTIFY if certify else CORE)
        # second implementation, from the definition
        bound = binom_lower(count if certify else n - count, n, alpha)
        margin = ndtri(bound) - ndtri(tau) if certify else ndtri(tau) - ndtri(1.0 - bound)
        assert found.radius[0] == pytest.approx(max(0.0, 0.5 * margin), abs=1e-6)
        assert found.radius[0] <= max(0.0, 0.5 * margin) + 1e-12
        assert found.abstained[0] == (found.radius[0] == 0.0)


def binom_lower(count: int, n: int, alpha: float) -> float:
    """The smallest p with P(Bin(n, p) >= count) >= alpha, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if binom.sf(count - 1, n, middle) < alpha else (low, middle)
    return low


def test_tau_zero_selects_everything_and_invalid_votes_count_against_either_answer():
    nothing = np.zeros((1, 2), dtype=np.int64)
    found = Threshold(0.0, 0.01).decide(nothing, nothing, 100, ONE)
    assert (found.prediction[0], found.abstained[0]) == (CERTIFY, False)
    assert compose(Minimum(), [(of(found), claim(3, 0.7))], Claim.fixed([0])).radius[0] == 0.7
    assert Threshold(0.0, 0.01).verdict(nothing, 100).prediction[0] == CERTIFY
    for votes in ([[0, 600]], [[600, 0]]):   # 400 of 1000 draws were NaN
        table = np.array(votes)
        lame = Threshold(0.5, 0.001).decide(table, table, 1000, ONE)
        filled = np.where(table == 0, 400, table)   # all of them for the other answer
        assert lame.radius[0] == Threshold(0.5, 0.001).decide(table, filled, 1000, ONE).radius[0] < 0.3
        assert Threshold(0.5, 0.001).verdict(table // 2, 1000).abstained[0]


@given(
    tau=st.sampled_from([0.1, 0.5, 0.8]),
    margin=st.floats(-3.0, 3.0),
    n=st.sampled_from([50, 400]),
    alpha=st.sampled_from([0.001, 0.05]),
)
def test_selectors_are_wrong_as_seldom_as_they_say(tau, margin, n, alpha):
    """All counts, weighed exactly: claims beyond the true distance, and answers for the wrong side."""
    p = float(ndtr(margin))
    counts = np.arange(n + 1)
    weight = binom.pmf(counts, n, p)
    votes = both(counts, n)
    right, distance = (CERTIFY if p >= tau else CORE), abs(margin - ndtri(tau))
    for guess in (CERTIFY, CORE):
        first = np.tile(both(np.array([n if guess == CERTIFY else 0]), n), (n + 1, 1))
        found = Threshold(tau, alpha).decide(first, votes, n, np.ones(n + 1))
        false = ~found.abstained & ((found.prediction != right) | (found.radius > distance))
        assert weight[false].sum() <= alpha
    answer = Threshold(tau, alpha).verdict(votes, n)
    assert weight[~answer.abstained & (answer.prediction != right)].sum() <= alpha / 2.0


def test_on_the_threshold_an_answer_is_as_rare_as_alpha():
    counts = np.arange(1001)
    for tau, alpha in ((0.5, 0.05), (0.5, 0.001), (0.1, 0.05)):
        answer = Threshold(tau, alpha).verdict(both(counts, 1000), 1000)
        spoken = binom.pmf(counts, 1000, tau)[~answer.abstained].sum()
        assert 0.6 * alpha < spoken <= alpha


@pytest.mark.parametrize("tau", [0.3, 0.35, 0.5, 0.7])
def test_confidence_is_wrong_as_seldom_as_it_says(tau):
    """Three classes, all counts of a small sample, weighed exactly."""
    n, alpha = 40, 0.05
    grid = [(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]
    votes = np.array(grid)
    for p in ((0.5, 0.3, 0.2), (0.34, 0.33, 0.33), (0.7, 0.2, 0.1), (0.5, 0.5, 0.0), (0.29, 0.29, 0.42), (0.6, 0.4, 0)):
        weight = multinomial.pmf(votes, n, p)
        top = max(p)
        right, distance = (CERTIFY if top >= tau else CORE), abs(ndtri(top) - ndtri(tau))
        rule = Leading(tau, alpha)
        for first in np.eye(3, dtype=np.int64) * 20:
            for selection in (first, np.array([7, 7, 6])):
                found = rule.run(
                    np.tile(selection, (len(votes), 1)), 20, lambda rows, *_: votes[rows], n, np.ones(len(votes))
                )
                false = ~found.abstained & ((found.prediction != right) | (found.radius > distance))
                assert weight[false].sum() <= alpha
        answer = rule.verdict(votes, n)
        assert weight[~answer.abstained & (answer.prediction != right)].sum() <= alpha


def test_confidence_counts_invalid_votes_against_either_answer():
    first, votes = np.array([[5, 5, 10]]), np.array([[100, 200, 300]])   # 400 of 1000 were invalid
    for tau, count in ((0.8, 1000 - (300 + 400)), (0.25, 300)):
        found = Leading(tau, 0.01).run(first, 20, lambda *_: votes, 1000, ONE)
        assert found.count[0] == count
    assert Leading(0.6, 0.01).verdict(votes, 1000).abstained[0]   # all of them may have been for the leader
    assert Leading(0.8, 0.01).verdict(votes, 1000).prediction[0] == CORE


def test_joint_votes_fall_apart_into_those_of_class_and_score():
    joint = np.arange(24).reshape(1, 2 * 12)[:, :24] % 5
    cube = joint.reshape(1, 2, 12)
    assert by_class(joint, 12).tolist() == cube.sum(axis=2).tolist()
    scores = by_score(joint, 12)
    assert scores.tolist() == cube.sum(axis=1).tolist()
    assert by_answer(scores, 3).tolist() == [[scores[0, 4:11].sum(), scores[0, :4].sum()]]
    kept = Histogram(scores, scores, scores, scores, 9, 9, np.arange(10) / 10.0, 0.5, 0.5)
    assert kept.at(0.3)[0].tolist() == by_answer(scores, 3).tolist()
    with pytest.raises(ValueError, match="theta must be an edge of the histogram"):
        kept.at(0.35)


def test_a_marginal_rule_decides_as_on_its_own_votes():
    rng = np.random.default_rng(0)
    joint = rng.multinomial(1000, np.full(6, 1 / 6), size=50)
    rule = Marginal(0.02, OneSided(0.5), lambda votes: by_class(votes, 3))
    assert rule.rule == OneSided(0.02)
    found = rule.run(joint, 1000, lambda rows, *_: joint[rows], 1000, np.ones(50))
    expected = OneSided(0.02).decide(by_class(joint, 3), by_class(joint, 3), 1000)
    assert np.array_equal(found.p_lower, expected.p_lower)
    assert np.array_equal(found.abstained, expected.abstained)


# ---------------------------------------------------------------------------------------------- coverage


N, N0, A, REPETITIONS = 1000, 20, 0.05, 200_000


def false_rate(allocation, level: float, shared: bool, p_s: float, p_c: float, seed: int = 0) -> float:
    """Fraction of 200,000 certificates of selector and smoothed classifier, at `level` each, that claim too much."""
    rng = np.random.default_rng(seed)
    tables = {}
    for name, p in (("selector", p_s), ("smoothed", p_c)):
        if shared and name == "smoothed":
            tables[name] = tables["selector"]   # one projection decides both
        else:
            tables[name] = rng.binomial(N0, p, REPETITIONS), rng.binomial(N, p, REPETITIONS)
    claims = []
    for name in ("selector", "smoothed"):
        first, count = tables[name]
        distinct, back = np.unique(np.stack([first >= N0 / 2, count], axis=1), axis=0, return_inverse=True)
        selection, estimation = both(distinct[:, 0] * N0, N0), both(distinct[:, 1], N)
        if name == "selector":
            known = of(Threshold(0.5, level).decide(selection, estimation, N, np.ones(len(distinct))))
        else:
            known = of(OneSided(level).decide(selection, estimation, N))
        claims.append(Claim(*(getattr(known, field)[back] for field in ("prediction", "radius", "abstained"))))
    result = compose(allocation, [tuple(claims)], Claim.fixed(np.full(REPETITIONS, 9)))
    truth = min(ndtri(p_s), ndtri(p_c))
    beyond = ~result.abstained & (result.radius > 0.0) & ((result.prediction != 1) | (result.radius > truth))
    return float(beyond.mean())


@pytest.mark.parametrize(
    ("p_s", "p_c", "shared"),
    [(ndtr(0.3), ndtr(0.3), True), (0.9, 0.9, True), (ndtr(0.3), ndtr(0.3), False), (ndtr(0.3), 0.9, False)],
)
def test_no_more_false_certificates_than_alpha(p_s, p_c, shared):
    limit = allowed(REPETITIONS, A) / REPETITIONS
    assert false_rate(Minimum(A), Minimum(A).share(2), shared, p_s, p_c) <= limit
    assert false_rate(Split(A), Split(A).share(2), shared, p_s, p_c) <= allowed(REPETITIONS, A / 2) / REPETITIONS


def test_the_rates_are_the_exact_ones_and_a_doubled_level_is_caught():
    """One shared count: a false certificate is a bound that fails, where the selection draws name the right answer."""
    counts, named = np.arange(N + 1), binom.sf(N0 / 2 - 1, N0, ndtr(0.3))
    for allocation, level, golden in ((Minimum(A), A, 0.044), (Split(A), A / 2, 0.023), (Minimum(A), 2 * A, 0.090)):
        fails = clopper_pearson_lower(counts, N, level) > ndtr(0.3)
        expected = named * binom.pmf(counts, N, ndtr(0.3))[fails].sum()
        assert expected == pytest.approx(golden, rel=0.12)   # some of which were taken without the factor `named`
        rate = false_rate(allocation, level, True, ndtr(0.3), ndtr(0.3))
        assert rate == pytest.approx(expected, abs=5 * np.sqrt(expected / REPETITIONS))
    assert rate > allowed(REPETITIONS, A) / REPETITIONS   # the doubled level
    assert false_rate(Minimum(A), A, True, 0.9, 0.9) == pytest.approx(0.048, abs=0.002)
    assert false_rate(Minimum(A), A, False, 0.9, 0.9) == pytest.approx(0.0023, abs=0.0006)


def test_naming_the_class_by_the_estimation_draws_is_caught():
    """Two classes of probability 1/2, a selector that is sure: any certificate is false."""
    counts = np.arange(N + 1)
    weight = binom.pmf(counts, N, 0.5)
    sure = Claim(np.full(N + 1, CERTIFY), np.full(N + 1, 9.0), np.zeros(N + 1, dtype=bool))
    rates = {}
    for name, first in (("reused", both(counts, N)), ("fresh", np.tile([[1, 0]], (N + 1, 1)))):
        smoothed = of(OneSided(A).decide(first, both(counts, N), N))
        known = compose(Minimum(A), [(sure, smoothed)], Claim.fixed(np.zeros(N + 1)))
        rates[name] = weight[~known.abstained & (known.radius > 0.0)].sum()
    assert rates["fresh"] == pytest.approx(0.046, abs=0.001)
    assert rates["fresh"] <= A
    assert rates["reused"] == pytest.approx(0.094, abs=0.003)
    assert rates["reused"] > A


def test_taking_the_better_of_two_costs_the_second_alpha():
    """Core and smoothed classifier agree, the core for ever: the selector's radius or the smoothed one's will do."""
    counts, p = np.arange(N + 1), 0.9
    weight = binom.pmf(counts, N, p)
    joint, distance = np.outer(weight, weight), ndtri(p)

    def rate(level: float, allocation) -> float:
        first = np.tile([[20, 0]], (N + 1, 1))   # the selector is named to leave it to the core
        selector = of(Threshold(0.5, level).decide(first, both(N - counts, N), N, np.ones(N + 1)))
        smoothed = of(OneSided(level).decide(np.tile([[0, 20]], (N + 1, 1)), both(counts, N), N))
        pairs = np.meshgrid(counts, counts, indexing="ij")
        parts = [
            Claim(*(getattr(part, name)[index.ravel()] for name in ("prediction", "radius", "abstained")))
            for part, index in zip((selector, smoothed), pairs, strict=True)
        ]
        known = compose(allocation, [tuple(parts)], Claim.fixed(np.ones(joint.size), np.inf))
        return float(joint.ravel()[known.radius > distance].sum())

    assert rate(A, Split(A)) == pytest.approx(0.095, abs=0.005)   # had both the whole alpha
    assert rate(A, Split(A)) > A
    assert rate(Split(A).share(2), Split(A)) <= A
    assert rate(A, Minimum(A)) <= A   # since it takes the named path alone


# ---------------------------------------------------------------------------------------------- predictions


def test_fallbacks_answer_as_they_say():
    cases = [
        (CERTIFY, 3, 7, 3, 3, 3),
        (CORE, 3, 7, 7, 7, 7),
        (None, 3, 7, None, None, 3),
        (None, 3, 3, 3, None, 3),
        (None, None, 3, None, None, None),
        (CERTIFY, None, 3, None, None, None),
        (CORE, None, 3, 3, 3, 3),
        (CORE, 3, None, None, None, None),
        (None, 3, None, None, None, 3),
    ]
    for s, c, k, *expected in cases:
        parts = [verdict(0 if part is None else part, part is None) for part in (s, c, k)]
        for fallback, answer in zip((Fallback.AGREE, Fallback.ABSTAIN, Fallback.CERTIFY), expected, strict=True):
            found = settle(fallback, [(parts[0], parts[1])], parts[2])
            assert (None if found.abstained[0] else found.prediction[0]) == answer


def test_falling_back_to_the_core_is_refused_and_would_be_wrong():
    """Just within the certified radius an attacker would own the answer."""
    sigma, n, level = 0.5, 10_000, 5e-4
    votes = both(np.array([round(100_000 * ndtr(1.2))]), 100_000)
    radius = Threshold(0.5, level).decide(votes, votes, 100_000, np.array([sigma])).radius[0]
    assert radius == pytest.approx(0.59145, abs=5e-4)
    counts = np.arange(n + 1)
    answers = Threshold(0.5, level).verdict(both(counts, n), n)
    smoothed = verdict(np.ones(n + 1))   # rightly 1 at this place; the core says 0
    rates = {}
    for share, unclear in ((0.95, 0.005), (0.98, 0.594), (0.99, 0.88), (0.999, 0.979)):
        weight = binom.pmf(counts, n, ndtr((0.6 - share * 0.59145) / sigma))
        assert weight[answers.abstained].sum() == pytest.approx(unclear, abs=0.006)
        for fallback in (Fallback.AGREE, Fallback.ABSTAIN, Fallback.CERTIFY):
            found = settle(fallback, [(answers, smoothed)], verdict(np.zeros(n + 1)))
            assert weight[~found.abstained & (found.prediction != 1)].sum() <= 1e-3
        rates[share] = weight[answers.abstained | (answers.prediction == CORE)].sum()   # what CORE would do
    assert rates[0.98] == pytest.approx(0.594, abs=0.006)
    for ask in (
        lambda: Fallback.CORE.check(1),
        lambda: settle(Fallback.CORE, [(verdict(CERTIFY), verdict(1))], verdict(0)),
        lambda: Fallback.CORE.settle(verdict(CERTIFY), verdict(1), verdict(0)),
    ):
        with pytest.raises(ValueError, match="CORE voids the certificate"):
            ask()


def test_certify_as_a_fallback_is_refused_along_a_chain():
    """An input that skips the first stage certifiably: near its radius the first stage would answer for the second."""
    stages = [(verdict(CORE, True), verdict(4)), (verdict(CERTIFY), verdict(5))]
    with pytest.raises(ValueError, match="CERTIFY voids the certificates of a chain"):
        settle(Fallback.CERTIFY, stages, verdict(5))
    unsound = Fallback.CERTIFY.settle(*stages[0], Fallback.CERTIFY.settle(*stages[1], verdict(5)))
    assert (unsound.prediction[0], unsound.abstained[0]) == (4, False)   # where 5 is certified
    for fallback in (Fallback.AGREE, Fallback.ABSTAIN):
        assert settle(fallback, stages, verdict(5)).abstained[0]


@pytest.mark.parametrize("fallback", [Fallback.AGREE, Fallback.ABSTAIN])
def test_answers_of_a_chain_are_those_of_its_parts_or_none(fallback):
    """Whatever single test fails to speak, an answer is never another than F's."""
    for truth in itertools.product((CORE, CERTIFY), (1, 2), (CORE, CERTIFY), (1, 2), (1, 2)):
        s1, c1, s2, c2, core = truth
        right = c1 if s1 == CERTIFY else c2 if s2 == CERTIFY else core
        for silent in itertools.product((False, True), repeat=4):
            parts = [verdict(value, quiet) for value, quiet in zip(truth[:4], silent, strict=True)]
            found = settle(fallback, [(parts[0], parts[1]), (parts[2], parts[3])], verdict(core))
            assert found.abstained[0] or found.prediction[0] == right


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("tau", [-0.1, 1.0, 2.0, float("nan")])
def test_bad_tau(tau):
    for make in (check_tau, Threshold, Leading):
        with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\)"):
            make(tau)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_bad_alpha(alpha):
    for make in (Split, Minimum, lambda a: Threshold(0.5, a), lambda a: Leading(0.5, a)):
        with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1"):
            make(alpha)


def test_bad_votes():
    with pytest.raises(TypeError, match="estimation votes must be integers"):
        Threshold().decide(np.array([[1, 2]]), np.array([[1.0, 2.0]]), 3, ONE)
    with pytest.raises(ValueError, match="sum to at most n = 2"):
        Threshold().verdict(np.array([[1, 2]]), 2)


def test_shares():
    assert Split(0.001).share(2) == 0.0005
    assert Split(0.001).share(4) == 0.00025
    assert Minimum(0.001).share(4) == 0.001
