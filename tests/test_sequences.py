"""Sampling until the answer is clear: exact errors by a second recursion, and what is saved on published logs."""

import itertools
import math
import os
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, norm

from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.radii import gaussian_probability
from art_rs_plugins.theory.sequences import (
    GatekeptTable,
    anytime_lower,
    crossing_probability,
    group_sequential,
    log_e_value,
    plan_draws,
    schedule,
)

LEVELS = (0.55, 0.69, 0.84, 0.93, 0.977, 0.9987)
N = 100_000
LOOKS = schedule(N)
PEEKS = tuple(range(1000, N + 1, 1000))


def slow_crossing(
    p: float, looks: tuple[int, ...], boundary: NDArray[np.int64], futility: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """The law of `crossing_probability`, one draw at a time: no binomial mass, no convolution, no inequality."""
    state = np.zeros(looks[-1] + 2)
    state[0], low, high = 1.0, 0, 0
    law = np.zeros((2, len(looks)))
    for n in range(1, looks[-1] + 1):
        high += 1
        old = state[low : high + 1].copy()
        state[low : high + 1] = (1.0 - p) * old
        state[low + 1 : high + 1] += p * old[:-1]
        if n in looks:
            j = looks.index(n)
            law[0, j] = state[boundary[j] :].sum()
            state[boundary[j] :] = 0.0
            if futility is not None:
                law[1, j] = state[: futility[j] + 1].sum()
                state[: futility[j] + 1] = 0.0
        if n % 50 == 0 or n in looks:
            alive = np.flatnonzero(state > 1e-40)
            if not len(alive):
                break
            low, high = alive[0], alive[-1]
    return law


def peeking_boundary(p0: float, looks: tuple[int, ...], alpha: float) -> NDArray[np.int64]:
    """Least counts whose fixed-sample test rejects p <= p0, as if each look were the only one."""
    return binom.isf(alpha, looks, p0).astype(np.int64) + 1


# schedule


@given(st.integers(1, 500), st.floats(1.01, 3.0), st.integers(1, 300), st.integers(0, 200_000))
def test_schedule_ends_at_n_max_in_whole_chunks(first: int, ratio: float, step: int, more: int) -> None:
    start = -(-first // step) * step
    looks = schedule(start + more, first, ratio, step)
    assert looks[-1] == start + more
    assert looks[0] == start or len(looks) == 1
    assert all(type(n) is int and n % step == 0 for n in looks[:-1])
    assert all(a < b for a, b in itertools.pairwise(looks))
    assert all(b <= max(a + step, a * ratio + step) for a, b in itertools.pairwise(looks))
    assert all(b >= min(a * ratio - step, looks[-1]) for a, b in itertools.pairwise(looks))


def test_schedule_of_the_default_size() -> None:
    assert LOOKS[:10] == tuple(range(100, 1001, 100))
    assert (len(LOOKS), len(schedule(N, step=1))) == (43, 51)
    assert schedule(100) == (100,)
    assert schedule(150) == (100, 150)


# the recursion


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0, 1e-9, 1.0 - 1e-9])),
    st.data(),
)
def test_recursion_agrees_with_all_paths(steps: list[int], p: float, data: st.DataObject) -> None:
    looks = tuple(int(n) for n in np.cumsum(steps))
    boundary = np.array([data.draw(st.integers(0, n + 1)) for n in looks])
    futility = np.array([data.draw(st.integers(-1, c - 1)) for c in boundary])
    law = crossing_probability(p, looks, boundary, futility)
    expected, paths = np.zeros((2, len(looks))), 0.0
    # every path of counts at the looks, by its own product of binomial masses
    for increments in itertools.product(*(range(d + 1) for d in steps)):
        mass = math.prod(binom.pmf(i, d, p) for i, d in zip(increments, steps, strict=True))
        paths += mass
        for j, count in enumerate(np.cumsum(increments)):
            if count >= boundary[j] or count <= futility[j]:
                expected[0 if count >= boundary[j] else 1, j] += mass
                break
    assert paths == pytest.approx(1.0)
    np.testing.assert_allclose(law, expected, rtol=1e-9, atol=1e-28)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.83, 0.85, 0.9987])
def test_recursion_agrees_with_single_draws_at_scale(p: float) -> None:
    test = group_sequential(0.84, looks=schedule(20_000), alpha=0.01)
    law = crossing_probability(p, test.looks, test.efficacy, test.futility)
    slow = slow_crossing(p, test.looks, test.efficacy, test.futility)
    np.testing.assert_allclose(law, slow, rtol=1e-9, atol=1e-28)


# the group-sequential test


@pytest.mark.parametrize("alpha", [1e-3, 1e-2])
@pytest.mark.parametrize("p0", LEVELS)
def test_error_is_at_most_alpha_and_nearly_alpha(p0: float, alpha: float) -> None:
    test = group_sequential(p0, looks=schedule(20_000), alpha=alpha)
    error = slow_crossing(p0, test.looks, test.efficacy)[0].sum()
    assert 0.9 * alpha < error <= alpha
    for p in (p0 - 0.002, 0.9 * p0, 0.2):
        assert crossing_probability(p, test.looks, test.efficacy)[0].sum() < error


@pytest.mark.slow
@pytest.mark.parametrize("p0", LEVELS)
def test_error_is_at_most_alpha_at_full_size(p0: float) -> None:
    for looks in (LOOKS, schedule(N, step=1)):
        test = group_sequential(p0, looks=looks)
        assert 0.97e-3 < slow_crossing(p0, looks, test.efficacy)[0].sum() <= 1e-3


@pytest.mark.parametrize("p0", LEVELS)
def test_naive_peeking_fails_the_same_check(p0: float) -> None:
    boundary = peeking_boundary(p0, PEEKS, 1e-3)
    looks = np.array(PEEKS)
    # it is the count from which recomputed Clopper-Pearson certifies
    assert np.all((boundary > looks) | (clopper_pearson_lower(np.minimum(boundary, looks), looks, 1e-3) > p0 - 1e-9))
    assert np.all(clopper_pearson_lower(boundary - 1, looks, 1e-3) < p0)
    assert 8e-3 < crossing_probability(p0, PEEKS, boundary)[0].sum() < 1.35e-2


def test_naive_peeking_golden() -> None:
    errors = [crossing_probability(p, PEEKS, peeking_boundary(p, PEEKS, 1e-3))[0].sum() for p in LEVELS]
    assert errors == pytest.approx([1.3234e-2, 1.3143e-2, 1.3028e-2, 1.2787e-2, 1.2755e-2, 8.024e-3], rel=1e-3)
    often = tuple(range(100, N + 1, 100))
    assert crossing_probability(0.84, often, peeking_boundary(0.84, often, 1e-3))[0].sum() > 0.02


@given(
    st.sampled_from(LEVELS),
    st.sampled_from([1e-12, 1e-6, 1e-3, 0.05, 0.5]),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_each_boundary_is_the_least_within_its_budget(p0: float, alpha: float, steps: list[int]) -> None:
    looks = tuple(int(n) for n in np.cumsum(steps))
    test = group_sequential(p0, looks=looks, alpha=alpha)
    for j, n in enumerate(looks):
        budget = alpha * math.sqrt(n / looks[-1])
        part = slow_crossing(p0, looks[: j + 1], test.efficacy[: j + 1])
        assert part[0].sum() <= budget
        lower = test.efficacy[: j + 1] - np.eye(j + 1, dtype=np.int64)[j]
        assert slow_crossing(p0, looks[: j + 1], lower)[0].sum() > budget * (1.0 - 1e-8)


@pytest.mark.parametrize("n", [1, 10, 40])
def test_a_tie_with_alpha_is_not_left_to_rounding(n: int) -> None:
    alpha = 0.5**n   # exactly the probability of n successes
    assert group_sequential(0.5, looks=(n,), alpha=alpha).efficacy.tolist() == [n + 1]
    assert group_sequential(0.5, looks=(n,), alpha=alpha * (1.0 + 1e-8)).efficacy.tolist() == [n]


@pytest.mark.parametrize("alpha", [1e-15, 1e-9, 1e-3, 0.3, 0.9])
@pytest.mark.parametrize("p0", [1e-4, 0.05, 0.5, 0.84, 0.9999])
def test_level_holds_for_tiny_and_for_large_alpha(p0: float, alpha: float) -> None:
    test = group_sequential(p0, looks=schedule(20_000), alpha=alpha)
    error = crossing_probability(p0, test.looks, test.efficacy)[0].sum()
    assert error <= alpha * (1.0 - 5e-10)
    if p0**test.looks[-1] > alpha:   # even successes only prove nothing
        assert error == 0.0
        assert np.array_equal(test.efficacy, np.array(test.looks) + 1)
    elif 0.01 < p0 < 0.99:
        assert error > 0.99 * alpha


@pytest.mark.parametrize("p0", LEVELS)
def test_futility_only_lowers_the_error_and_costs_little_power(p0: float) -> None:
    test = group_sequential(p0, looks=LOOKS, beta=0.01)
    without = crossing_probability(p0, LOOKS, test.efficacy)[0].sum()
    assert 0.0 < test.pass_probability(p0) < without
    never = np.array(LOOKS) + 1
    assert 0.009 < crossing_probability(p0, LOOKS, never, test.futility)[1].sum() <= 0.01
    for p in (p0, 0.5 * (1.0 + p0)):
        plain = crossing_probability(p, LOOKS, test.efficacy)[0].sum()
        assert plain - 0.01 <= test.pass_probability(p) <= plain
    assert test.expected_draws(p0 - 0.1) < 2000
    assert np.all(group_sequential(p0, looks=LOOKS, beta=0.2).efficacy == test.efficacy)


def test_futility_mirrors_efficacy() -> None:
    test = group_sequential(0.75, looks=LOOKS, alpha=0.01, beta=0.001)
    mirror = group_sequential(0.25, looks=LOOKS, alpha=0.001, beta=0.01)
    assert np.array_equal(test.futility, np.array(LOOKS) - mirror.efficacy)
    assert np.array_equal(test.efficacy, np.array(LOOKS) - mirror.futility)


def test_designs_are_shared_and_cannot_be_written() -> None:
    test = group_sequential(0.84, looks=[100, 200])
    assert group_sequential(np.float64(0.84), looks=np.array([100, 200])) is test
    for array in (test.efficacy, test.futility, GatekeptTable((0.84,), (100, 200)).efficacy):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("p", [0.3, 0.8, 0.84, 0.86, 1.0])
def test_expected_draws_match_what_the_table_does(p: float) -> None:
    test, looks = group_sequential(0.84, looks=LOOKS), np.array(LOOKS)
    table = GatekeptTable((0.84,), LOOKS)
    b = 4000
    counts = np.random.default_rng(7).binomial(np.diff(looks, prepend=0), p, (b, len(looks))).cumsum(axis=1)
    progress = table.decide(counts)
    assert progress.decided.all()
    draws = looks[progress.looks - 1]
    assert draws.mean() == pytest.approx(test.expected_draws(p), abs=5 * draws.std() / math.sqrt(b) + 1e-6)
    passes = int(progress.passed.sum())
    low, high = binom.ppf([1e-6, 1 - 1e-6], b, min(test.pass_probability(p), 1.0))
    assert low <= passes <= high


# the gatekept table


def all_paths(draws: int) -> NDArray[np.int64]:
    """Cumulative counts of every sequence of outcomes, shape (2 ** draws, draws)."""
    return np.array(list(itertools.product((0, 1), repeat=draws)), dtype=np.int64).cumsum(axis=1)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.3])
def test_joint_error_on_every_path(alpha: float) -> None:
    looks, levels = (4, 8, 12, 16), (0.3, 0.5, 0.56, 0.57, 0.7, 0.8)
    table = GatekeptTable(levels, looks, alpha=alpha, beta=0.2)
    paths = all_paths(16)
    passed = table.decide(paths[:, np.array(looks) - 1]).passed
    worst = 0.0
    for p in (*levels, 0.1, 0.4, 0.565, 0.75, 0.9):
        true = sum(level < p for level in levels)
        mass = p ** paths[:, -1] * (1.0 - p) ** (16 - paths[:, -1])
        worst = max(worst, float(mass[passed > true].sum()))
    assert 0.5 * alpha < worst <= alpha


def simulate(table: GatekeptTable, p: float, b: int, seed: int) -> NDArray[np.int64]:
    draws = np.diff(table.looks, prepend=0)
    return np.random.default_rng(seed).binomial(draws, p, (b, len(draws))).cumsum(axis=1)


@pytest.mark.slow
def test_joint_error_at_full_size_and_a_control_that_breaks_it() -> None:
    levels, b, alpha = tuple(gaussian_probability(np.arange(7) * 0.25, 0.5)), 20_000, 0.01
    table = GatekeptTable(levels, PEEKS, alpha=alpha)
    naive = np.stack([peeking_boundary(p, PEEKS, alpha) for p in levels])
    allowed = binom.isf(1e-6, b, alpha)
    for i in (0, 2, 5):
        counts = simulate(table, levels[i], b, seed=i)   # exactly at the i-th level: claims i, i + 1, ... are false
        assert 0 < (table.decide(counts).passed > i).sum() <= allowed
        crossed = (counts[:, None, :] >= naive).any(axis=2)
        assert crossed[:, i:].any(axis=1).sum() > 4 * allowed


def test_a_larger_entry_counts_only_with_the_smaller_ones() -> None:
    table = GatekeptTable((0.56, 0.57), (4, 8, 12, 16), alpha=0.1, beta=0.2)
    assert table.efficacy.tolist() == [[5, 7, 11, 13], [5, 8, 10, 13]]
    # at the third look 10 votes cross the second boundary, but not the first
    progress = table.decide([[3, 6, 10, 13], [3, 6, 10, 12], [3, 7, 10, 10]])
    assert progress.passed.tolist() == [2, 0, 2]
    assert progress.looks.tolist() == [4, 4, 3]
    assert progress.crossed.tolist() == [[True, True], [False, True], [True, True]]
    halfway = table.decide([[3, 6, 10], [3, 6, 10], [3, 7, 10]])
    assert halfway.passed.tolist() == [0, 0, 2]
    assert halfway.decided.tolist() == [False, False, True]


def test_boundaries_belong_to_the_decision() -> None:
    table = GatekeptTable((0.7,), (100, 200))
    up, down = int(table.efficacy[0, 0]), int(table.futility[0, 0])
    progress = table.decide([[up], [up - 1], [down + 1], [down]])
    assert progress.passed.tolist() == [1, 0, 0, 0]
    assert progress.decided.tolist() == [True, False, False, True]


def test_sampling_goes_on_only_while_the_gate_is_open() -> None:
    table = GatekeptTable((0.5, 0.84, 0.93), (100, 200, 400, 800))
    counts = np.array([[88, 176, 352, 700], [100, 200, 0, 0], [20, 0, 0, 0], [90, 150, 330, 660], [90, 178, 354, 708]])
    progress = table.decide(counts)
    assert progress.passed.tolist() == [1, 3, 0, 1, 2]
    assert progress.decided.all()
    assert progress.looks.tolist() == [4, 2, 1, 2, 4]
    assert progress.count.tolist() == [700, 200, 20, 150, 708]
    assert not progress.crossed[3, 1]
    assert progress.futile[3, 1]


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_state_is_the_same_look_by_look_and_ignores_what_comes_after(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    looks = schedule(3000)
    table = GatekeptTable(tuple(gaussian_probability(np.arange(m) * 0.2, 0.5)), looks, alpha=0.05, beta=0.1)
    p = rng.uniform(0.3, 1.0, (12, 1))
    counts = rng.binomial(np.diff(looks, prepend=0), p, (12, len(looks))).cumsum(axis=1)
    whole = table.decide(counts)
    for nonsense in (-7, 10**9):
        spoiled = table.decide(np.where(np.arange(len(looks)) < whole.looks[:, None], counts, nonsense))
        for name in ("passed", "decided", "looks", "count", "crossed", "futile"):
            assert np.array_equal(getattr(spoiled, name), getattr(whole, name)), name
    for row in range(12):
        end = int(whole.looks[row])
        alone = table.decide(counts[row : row + 1, :end])
        assert (alone.passed[0], alone.decided[0], alone.looks[0]) == (whole.passed[row], True, end)
        assert not table.decide(counts[row : row + 1, : end - 1]).decided[0]
    # more is never claimed than single tests claim, and the gate is the only difference
    for i in range(m):
        alone = (counts >= table.efficacy[i]).any(axis=1)
        assert not np.any((whole.passed > i) & ~alone)


# the anytime-valid bound


def test_golden_radii_of_the_anytime_bound() -> None:
    n = np.array([1000, 10_000, 100_000, 100_000])
    k = np.array([1000, 10_000, 100_000, 99_000])
    assert norm.ppf(anytime_lower(k, n, 1e-3)).round(3).tolist() == [2.407, 3.153, 3.773, 2.274]


@given(
    st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([1e-9, 1e-3, 0.05, 0.5]),
)
def test_anytime_bound_is_the_root_rounded_down(pair: tuple[int, int], alpha: float) -> None:
    k, n = pair
    bound = float(anytime_lower(k, n, alpha))
    assert 0.0 <= bound < (k / n if 0 < k < n else 1.0 if k else 1e-300)
    assert bound <= float(clopper_pearson_lower(k, n, alpha))
    if bound:
        assert float(log_e_value(bound, k, n)) >= -math.log(alpha)
        assert float(log_e_value(bound + 1e-4 * (1.0 - bound) * bound, k, n)) < -math.log(alpha)


@pytest.mark.parametrize(("k", "n"), [(1, 50), (30, 50), (50, 50), (990, 1000), (1000, 1000), (7000, 10_000)])
def test_anytime_bound_against_a_grid(k: int, n: int) -> None:
    grid = np.linspace(1e-5, 1.0 - 1e-5, 200_001)
    enough = log_e_value(grid, k, n) >= math.log(1000.0)
    root = grid[enough].max() if enough.any() else 0.0
    assert root - 1e-9 <= float(anytime_lower(k, n, 1e-3)) <= root + 1e-5
    assert np.array_equal(enough, np.arange(len(grid)) < enough.sum())   # an interval from 0


@pytest.mark.parametrize(("k", "n"), [(90, 100), (1, 20), (40, 40), (501, 1000), (99_000, 100_000), (600_000, 10**6)])
def test_margin_covers_the_rounding_of_the_e_value(k: int, n: int) -> None:
    p0 = float(anytime_lower(k, n, 1e-3))
    with mp.workdps(40):
        p, half = mp.mpf(p0), mp.mpf("0.5")
        scale = k * mp.log(mp.mpf(k) / n / p) + ((n - k) * mp.log((1 - mp.mpf(k) / n) / (1 - p)) if k < n else 0)

        def integrand(q: mp.mpf) -> mp.mpf:
            # prior density and likelihood ratio to p; the square root at q = 1 is left to the substitution q = 1 - u^2
            ratio = k * mp.log(q / p) + ((n - k) * mp.log((1 - q) / (1 - p)) if k < n else 0)
            return mp.exp(ratio - scale) / mp.sqrt(q)

        end = mp.sqrt(1 - p)
        middle, width = mp.sqrt(1 - mp.mpf(k) / n), mp.sqrt(mp.mpf(1) / n)
        cuts = {min(max(middle + j * width, mp.mpf(0)), end) for j in (-9, -6, -4, -2, -1, 0, 1, 2, 4, 6, 9)}
        mixture = 2 * mp.quad(lambda u: integrand(1 - u * u) if u < 1 else mp.mpf(0), sorted(cuts | {mp.mpf(0), end}))
        exact = scale + mp.log(mixture) - mp.log(mp.betainc(half, half, p, 1))
    assert exact >= mp.log(1000)
    assert float(exact) == pytest.approx(float(log_e_value(p0, k, n)), abs=1e-12 * n + 1e-9)


@given(
    st.integers(1, 10**5).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    st.floats(0.1, 1.0),
    st.floats(0.1, 3.0),
)
def test_evidence_decreases_in_the_hypothesis(pair: tuple[int, int], a: float, b: float) -> None:
    k, n = pair
    grid = np.linspace(0.001, 0.999, 301) * k / n
    values = log_e_value(grid, k, n, a, b)
    assert np.all(np.diff(values)[values[1:] > -5.0] < 1e-8)


@pytest.mark.parametrize("alpha", [1e-3, 1e-2])
@pytest.mark.parametrize("p0", LEVELS)
def test_anytime_bound_holds_at_all_looks_at_once(p0: float, alpha: float) -> None:
    looks = tuple(range(100, 10_001, 100))
    boundary = []
    for n in looks:   # the least count that certifies; every count beyond the range does, or none is possible
        counts = np.arange(int(n * p0), min(n, int(n * p0 + 4.0 * math.sqrt(n) + 20)) + 1)
        boundary.append(int(counts[0]) + int((anytime_lower(counts, n, alpha) < p0).sum()))
    error = crossing_probability(p0, looks, np.array(boundary))[0].sum()
    assert 0.05 * alpha < error <= alpha
    assert slow_crossing(p0, looks, np.array(boundary))[0].sum() == pytest.approx(error, rel=1e-9)


def test_ends_of_the_anytime_bound() -> None:
    assert anytime_lower([0, 0, 0], [1, 100, 10**9], 0.05).tolist() == [0.0, 0.0, 0.0]
    huge = float(anytime_lower(10**9, 10**9, 1e-3))
    assert 1.0 - 3e-8 < huge < 1.0
    assert float(anytime_lower(10**15, 10**15, 0.5)) < 1.0
    assert float(anytime_lower(1, 10**6, 1e-30)) == 0.0
    counts = np.arange(201)
    assert np.all(np.diff(anytime_lower(counts, 200, 0.01)) > -1e-15)
    assert anytime_lower(counts[:, None], np.array([200, 300]), 0.01).shape == (201, 2)


# the plan


def test_plan_spends_where_a_radius_is_to_be_won() -> None:
    pilot = np.array([500, 498, 450, 300, 250, 100, 0])
    plan = plan_draws(pilot, 500, n_max=N, tolerance=0.02)
    assert plan.dtype == np.int64
    assert set(plan.tolist()) <= set(LOOKS)
    assert plan[0] > 50_000
    assert plan[-1] == plan[-2] == 100
    for tight, loose in itertools.pairwise([1e-6, 1e-3, 1e-2, 1e-1, 1.0]):
        narrow, wide = (plan_draws(pilot, 500, n_max=N, tolerance=value) for value in (tight, loose))
        assert np.all(narrow >= wide)
    assert np.all(plan_draws(pilot[:4], 500, n_max=N, tolerance=1e-9) == N)
    assert np.all(plan_draws(pilot, 500, n_max=N, tolerance=10.0) == 100)
    assert plan_draws(400, 500, n_max=1000, tolerance=0.02).shape == ()


@pytest.mark.parametrize("p", [0.55, 0.75, 0.95, 0.999])
@pytest.mark.parametrize("tolerance", [0.01, 0.05])
def test_plan_is_the_least_within_tolerance_where_the_pilot_leaves_no_doubt(p: float, tolerance: float) -> None:
    sizes = schedule(20_000)
    values = []
    for n in sizes:
        counts = np.arange(n + 1)
        radius = np.maximum(norm.ppf(clopper_pearson_lower(counts, n, 1e-3)), 0.0)
        values.append(float(binom.pmf(counts, n, p) @ radius))
    plan = int(plan_draws(round(1e7 * p), 10**7, n_max=20_000, tolerance=tolerance))
    place = sizes.index(plan)
    assert values[-1] - values[place] < 1.2 * tolerance
    assert values[-1] - values[place - 1] > 0.8 * tolerance
    assert plan < 20_000


@pytest.mark.parametrize("p", [0.45, 0.55, 0.75, 0.95, 0.999])
def test_planned_certificates_keep_their_level_with_fresh_draws_only(p: float) -> None:
    """Exact: sum over the pilot's counts; the pilot decides the sample size and nothing else."""
    pilot_n, alpha, n_max = 200, 0.01, 5000
    pilots = np.arange(pilot_n + 1)
    weight = binom.pmf(pilots, pilot_n, p)
    plan = plan_draws(pilots, pilot_n, n_max=n_max, alpha=alpha, tolerance=0.05)
    assert len(set(plan[weight > 1e-4].tolist())) > 1 or p in (0.45, 0.999)
    fresh, reused = np.zeros(len(pilots)), np.zeros(len(pilots))
    for n in np.unique(plan):
        rows = plan == n
        wrong = clopper_pearson_lower(np.arange(n + 1), int(n), alpha) > p
        fresh[rows] = binom.pmf(np.arange(n + 1), n, p)[wrong].sum()
        # the control: claim what the pilot already claims, as well
        pilot_wrong = clopper_pearson_lower(pilots, pilot_n, alpha)[rows] > p
        reused[rows] = np.where(pilot_wrong, 1.0, fresh[rows])
    assert weight @ fresh <= alpha
    if p in (0.55, 0.75, 0.95):
        assert weight @ reused > alpha


# what it saves, on the probabilities behind a published table

SHARED = os.environ.get("ART_RS_SHARED_DATA", "")
LOGS = Path(SHARED) / "cohen_logs" / "cohen" / "cifar10" / "resnet110"
needs_logs = pytest.mark.skipif(
    not SHARED or not LOGS.is_dir(), reason="ART_RS_SHARED_DATA names no folder with the logs of Cohen et al."
)


def published(sigma: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """p_A of the 500 inputs of a log, and whether a certificate of them is right.

    The radii were made with alpha = 0.01 and n = 100,000 (their largest value says so), so each names a count; the
    p_A of abstentions is unknown and below one half.
    """
    rows = np.loadtxt(LOGS / f"noise_{sigma}" / "test" / f"sigma_{sigma}.tsv", skiprows=1, usecols=(2, 3, 4))
    counts = np.arange(N // 2, N + 1)
    radii = float(sigma) * norm.ppf(clopper_pearson_lower(counts, N, 0.01))
    abstained = rows[:, 0] == -1
    nearest = counts[np.abs(radii[None] - rows[:, 1:2]).argmin(axis=1)]
    printed = np.where(rows[:, 1] >= 1.0, 0.00501, 0.000501)   # three significant digits
    assert np.all(abstained | (np.abs(radii[nearest - counts[0]] - rows[:, 1]) <= printed))
    unknown = np.random.default_rng(0).uniform(0.2, 0.5, len(rows))
    return np.where(abstained, unknown, nearest / N), (rows[:, 2] == 1) & ~abstained


def information_bound(p: NDArray[np.float64], p0: float, alpha: float, beta: float) -> NDArray[np.float64]:
    """Wald's least expected number of draws for errors alpha and beta, capped at N."""
    q = np.maximum(1.0 - p, 1e-300)
    divergence = p * np.log(p / p0) + q * np.log(q / (1.0 - p0))
    return np.minimum(N, np.where(p > p0, -math.log(alpha), -math.log(beta)) / np.maximum(divergence, 1e-12))


@needs_logs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "radius", "speed", "loss"),
    [*(("0.50", radius, 35, 0.1) for radius in (0.25, 0.5, 0.75, 1.0)), ("0.25", 0.75, 12, 0.4)],
)
def test_one_radius_on_published_probabilities(sigma: str, radius: float, speed: float, loss: float) -> None:
    """Exact for the inverted probabilities: no simulation. The measured numbers are printed; ``-rP`` shows them."""
    p, correct = published(sigma)
    test = group_sequential(float(gaussian_probability(radius, float(sigma))), looks=LOOKS)
    draws = 100 + np.mean([test.expected_draws(q) for q in p])
    passes = np.array([test.pass_probability(q) for q in p])
    fixed = binom.sf(binom.isf(1e-3, N, test.p0), N, p)
    change = 100.0 * float(np.mean(correct * (passes - fixed)))
    ratio = float(draws / (100 + information_bound(p, test.p0, 1e-3, 0.01).mean()))
    print(f"{100_100 / draws:.1f}x, {change:+.3f} pp, {ratio:.3f} of the information bound")
    assert draws * speed <= 100_100
    assert abs(change) <= loss
    assert ratio <= 1.2


@needs_logs
@pytest.mark.slow
def test_whole_table_on_published_probabilities() -> None:
    p, correct = published("0.50")
    levels = gaussian_probability(np.arange(7) * 0.25, 0.5)
    replicates = 32
    draws = np.diff(LOOKS, prepend=0)
    counts = np.random.default_rng(1).binomial(draws, np.repeat(p, replicates)[:, None], (500 * replicates, len(draws)))
    progress = GatekeptTable(tuple(levels), LOOKS).decide(counts.cumsum(axis=1))
    mean = 100 + np.array(LOOKS)[progress.looks - 1].mean()
    right = np.repeat(correct, replicates)
    change = [
        100.0 * float(np.mean(right & (progress.passed > i)) - np.mean(correct * binom.sf(binom.isf(1e-3, N, q), N, p)))
        for i, q in enumerate(levels)
    ]
    print(f"{100_100 / mean:.2f}x, {np.round(change, 3).tolist()} pp")
    assert mean * 5 <= 100_100
    assert np.abs(change).max() <= 0.3


@needs_logs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "tolerance", "speed"), [("0.25", 0.017, 1.9), ("0.50", 0.015, 2.4), ("1.00", 0.011, 3.0)]
)
def test_plan_on_published_probabilities(sigma: str, tolerance: float, speed: float) -> None:
    p, correct = published(sigma)
    rng, replicates = np.random.default_rng(2), 40
    p, correct = np.repeat(p, replicates), np.repeat(correct, replicates)
    plan = plan_draws(rng.binomial(500, p), 500, n_max=N, tolerance=tolerance)

    def radius(n: NDArray[np.int64]) -> float:
        return float(np.mean(correct * np.maximum(norm.ppf(clopper_pearson_lower(rng.binomial(n, p), n, 1e-3)), 0.0)))

    lost, saved = 1.0 - radius(plan) / radius(np.full(len(p), N)), 100_100 / (500 + plan.mean())
    print(f"{saved:.2f}x at {100 * lost:.2f} % of the average certified radius")
    assert lost <= 0.01
    assert saved >= speed


# what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((99,), ValueError, "n_max must be at least the first look, 100, got 99"),
        ((1000, 150, 1.15, 100), None, ""),
        ((150, 150), ValueError, "first look, 200"),
        ((1000, 0), ValueError, "first"),
        ((1000, 100, 1.0), ValueError, "ratio"),
        ((1000, 100, math.nan), ValueError, "ratio"),
        ((1000, 100, 1.15, 0), ValueError, "step"),
        ((1e5,), TypeError, "n_max"),
        ((True,), TypeError, "n_max"),
    ],
)
def test_schedule_refuses(arguments: tuple[float, ...], error: type[Exception] | None, match: str) -> None:
    if error is None:
        assert schedule(*arguments)[0] == 200
    else:
        with pytest.raises(error, match=match):
            schedule(*arguments)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, math.nan])
def test_probabilities_outside_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="p0"):
        group_sequential(bad, looks=(100,))
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=name):
            group_sequential(0.5, looks=(100,), **{name: bad})
    with pytest.raises(ValueError, match="p0"):
        log_e_value(bad, 1, 2)
    with pytest.raises(ValueError, match="alpha"):
        anytime_lower(1, 2, bad)
    with pytest.raises(ValueError, match="alpha"):
        plan_draws(1, 2, n_max=1000, tolerance=0.01, alpha=bad)
    with pytest.raises(ValueError, match=r"p0|increasing"):
        GatekeptTable((0.5, bad), (100,))


def test_looks_and_boundaries_are_checked() -> None:
    for looks in ((), (10.0,), 10):
        with pytest.raises(TypeError, match="looks"):
            group_sequential(0.5, looks=looks)
    for looks in ((0, 5), (5, 5)):
        with pytest.raises(ValueError, match="looks"):
            group_sequential(0.5, looks=looks)
    with pytest.raises(ValueError, match="strictly increasing"):
        group_sequential(0.5, looks=np.array([200, 100], dtype=np.uint64))
    with pytest.raises(ValueError, match="boundary must have one entry"):
        crossing_probability(0.5, (1, 2), (1,))
    with pytest.raises(TypeError, match="futility must be integers"):
        crossing_probability(0.5, (1, 2), (1, 2), (0.0, 0.0))
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        crossing_probability(1.5, (1, 2), (1, 2))


def test_tables_are_checked() -> None:
    for levels in ((), (0.5, 0.5), (0.6, 0.5)):
        with pytest.raises(ValueError, match="strictly increasing"):
            GatekeptTable(levels, (100, 200))
    table = GatekeptTable((0.5,), (100, 200))
    with pytest.raises(ValueError, match=r"counts must have shape \(b, j\)"):
        table.decide([[1, 2, 3]])
    with pytest.raises(TypeError, match="integers"):
        table.decide([[50.0]])
    with pytest.raises(ValueError, match="grow by 0 to 100 at look 0"):
        table.decide([[101]])
    with pytest.raises(ValueError, match="grow by 0 to 100 at look 1"):
        table.decide([[50, 49]])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        table.advance(table.start(2), [1])


def test_counts_priors_and_tolerances_are_checked() -> None:
    with pytest.raises(TypeError, match="count"):
        anytime_lower(1.0, 2, 0.01)
    with pytest.raises(ValueError, match="count"):
        anytime_lower(3, 2, 0.01)
    for a, b in ((0.0, 0.5), (1.5, 0.5), (0.5, 0.0), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="prior"):
            anytime_lower(1, 2, 0.01, a, b)
        with pytest.raises(ValueError, match="prior"):
            log_e_value(0.5, 1, 2, a, b)
    for tolerance in (-1e-9, 0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="tolerance must be finite and > 0"):
            plan_draws(1, 2, n_max=1000, tolerance=tolerance)
    with pytest.raises(ValueError, match="count"):
        plan_draws([501], 500, n_max=1000, tolerance=0.01)
