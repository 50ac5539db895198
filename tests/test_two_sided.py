"""Rules that bound the runner-up: exact probabilities of a false certificate, and controls that must be caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from closed_forms import Strips, allowed
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from test_rules import all_tables, multinomial

from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.theory import establish
from art_rs_plugins.theory.bounds import clopper_pearson_lower, clopper_pearson_upper
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import Decision, OneSided, Rule, Sequential
from art_rs_plugins.theory.sequences import group_sequential, schedule
from art_rs_plugins.theory.two_sided import SequentialTwoSided, TwoSided

FIELDS = ("prediction", "abstained", "failure", "p_lower", "p_upper", "count", "runner_up_count", "n")


def radius_of(decision: Decision, sigma: float = 1.0) -> np.ndarray:
    return np.where(decision.abstained, 0.0, gaussian_radius(decision.failure, decision.p_upper, sigma))


def naming(guess: int, classes: int, b: int) -> np.ndarray:
    return np.repeat(np.eye(classes, dtype=np.int64)[[guess]], b, axis=0)


def spread(top: int, rival: int, n: int) -> np.ndarray:
    """One row of n votes: the class, its rival, and classes with no more votes than the rival."""
    rest, row = n - top - rival, [top, rival]
    while rest:
        row.append(min(rest, rival))
        rest -= row[-1]
    return np.array([row])


def true_radius(law: np.ndarray) -> float:
    """Radius over sigma of class 0, by its probability and its strongest rival's; negative where it does not win."""
    with np.errstate(invalid="ignore"):
        return float(0.5 * (ndtri(law[0]) - ndtri(law[1:].max())))


def share(false: np.ndarray, mass: np.ndarray) -> float:
    return float(mass[false].sum())


# ------------------------------------------------------------------------------------------- the fixed number of draws


@pytest.mark.parametrize(
    "top, rival, one_sided, half, nine",
    [(40_000, 20_000, 0.0, 0.280096, 0.279469), (55_000, 5_000, 0.1134, 0.8677, 0.8666),
     (55_000, 45_000, 0.1134, 0.1126, 0.1132), (90_000, 1_111, 1.264845, 1.756589, 1.754667),
     (99_000, 500, 2.290000, 2.406578, 2.404366), (99_900, 11, 3.0002, 3.2287, 3.2187),
     (100_000, 0, 3.811457, 3.787759, 3.807714)],
)   # fmt: skip
def test_golden_radii(top: int, rival: int, one_sided: float, half: float, nine: float) -> None:
    votes = spread(top, rival, 100_000)
    for rule, golden in ((OneSided(), one_sided), (TwoSided(split=0.5), half), (TwoSided(), nine)):
        decision = rule.decide(votes, votes, 100_000)
        digits = len(str(golden).split(".")[1])
        assert radius_of(decision)[0] == pytest.approx(golden, abs=max(1e-5, 0.6 * 10.0**-digits))
        assert decision.abstained[0] == (golden == 0.0)
        assert decision.runner_up_count[0] == rival


def test_golden_bounds_of_rare_rivals() -> None:
    assert clopper_pearson_upper([0, 500], 100_000, 1e-3) == pytest.approx([6.9075e-5, 0.00572818], rel=1e-5)
    bounds = clopper_pearson_upper([500, 20_000, 100], 100_000, 1e-4)
    assert bounds == pytest.approx([0.00588289, 0.20473780, 0.001427], abs=5e-7)
    assert clopper_pearson_lower([99_000, 60_000], 100_000, 1e-3) == pytest.approx([0.98898934, 0.59520105], rel=1e-8)
    assert clopper_pearson_lower(99_000, 100_000, 9e-4) == pytest.approx(0.98897890, rel=1e-8)


@given(
    st.lists(st.integers(0, 400), min_size=2, max_size=6),
    st.integers(0, 20),
    st.integers(0, 5),
    st.sampled_from([0.05, 0.5, 0.9, 0.99]),
    st.sampled_from([1e-9, 0.001, 0.1]),
)
def test_never_shorter_than_one_sided_at_its_share(
    row: list[int], invalid: int, guess: int, split: float, alpha: float
) -> None:
    votes, n = np.array([row]), sum(row) + invalid + 1
    selection = naming(guess % len(row), len(row), 1)
    one = OneSided(split * alpha).decide(selection, votes, n)
    two = TwoSided(alpha, split).decide(selection, votes, n)
    assert radius_of(two)[0] >= radius_of(one)[0] * (1 - 1e-14)
    assert not (two.abstained[0] and not one.abstained[0])
    assert (two.failure[0], two.p_lower[0]) == (one.failure[0], one.p_lower[0])
    assert two.p_upper[0] <= one.p_upper[0]
    if len(row) == 2 and split >= 0.5:
        for name in FIELDS:
            assert getattr(two, name)[0] == getattr(one, name)[0], name
    # an invalid vote counts for the rival: it never helps, wherever it would have gone instead
    for place in range(len(row)):
        moved = votes + np.eye(len(row), dtype=np.int64)[place]
        if place != guess % len(row):
            other = TwoSided(alpha, split).decide(selection, moved, n)
            assert radius_of(other)[0] >= radius_of(two)[0] * (1 - 1e-14)


def test_selection_and_estimation_that_contradict_each_other_abstain() -> None:
    selection, estimation = np.array([[10, 90, 0]]), np.array([[900, 60, 40]])
    for rule in (TwoSided(), TwoSided(split=0.5), TwoSided(split=None)):
        decision = rule.decide(selection, estimation, 1000)
        assert decision.abstained.tolist() == [True]
        assert decision.prediction.tolist() == [1]
        assert (decision.count.tolist(), decision.runner_up_count.tolist()) == ([60], [900])


def test_the_split_is_chosen_from_the_selection_votes_alone() -> None:
    n, rule = 100_000, TwoSided(split=None)
    selection = np.array([[50, 10, 10, 10, 10, 10], [96, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    splits = []
    for row in range(2):
        votes = selection[row : row + 1] * (n // 100)   # what was seen, at full size
        radii = {w: radius_of(TwoSided(split=w).decide(votes, votes, n))[0] for w in np.arange(99, 0, -1) / 100}
        splits.append(max(radii, key=lambda w: radii[w]))
    splits.append(0.99)   # nothing to choose by
    assert 0.2 < splits[0] < 0.8
    assert splits[1] == 0.99
    for votes in (spread(55_000, 9_000, n), spread(55_000, 9_000, n)[:, ::-1], spread(90_000, 2_000, n)):
        estimation = np.repeat(votes, 3, axis=0)
        found = rule.decide(selection[:, : votes.shape[1]], estimation, n)
        for row, split in enumerate(splits):
            expected = TwoSided(split=split).decide(selection[row : row + 1], estimation[row : row + 1], n)
            for name in FIELDS:
                assert getattr(found, name)[row] == getattr(expected, name)[0], name


def fixed_sample_laws(claims: np.ndarray) -> list[np.ndarray]:
    """A grid of step 0.02, and laws on which a claim has just become false: the worst cases."""
    grid = np.arange(51) / 50
    laws = [(a, b, max(1 - a - b, 0.0)) for a in grid for b in grid if a + b <= 1 + 1e-9]
    for r in np.unique(claims[claims > 0].round(9))[::4]:
        for middle in (0.0, -0.1, -0.2, -0.3, -0.4):
            a, b = ndtr(middle + r) * (1 - 1e-9), ndtr(middle - r)
            if 1 - a - b <= b:
                laws.append((a, b, 1 - a - b))
    return [np.array(law) / sum(law) for law in laws]


def worst_fixed(decision: Decision, table: np.ndarray, laws: list[np.ndarray], inflate: float = 1.0) -> list[float]:
    """Largest probability of a radius that is too long, and of a bound that is false."""
    claims, worst = inflate * radius_of(decision), np.zeros(2)
    for law in laws:
        mass, rival = multinomial(table, law), law[1:].max()
        wrong = (decision.p_lower > law[0]) | (decision.p_upper < rival)
        found = share(~decision.abstained & (claims > true_radius(law)), mass), share(wrong, mass)
        worst = np.maximum(worst, found)
    return worst.tolist()


def test_false_certificates_by_exact_enumeration() -> None:
    n, alpha = 40, 0.05
    table = all_tables(n, 3)
    selection = naming(0, 3, len(table))
    nine = TwoSided(alpha).decide(selection, table, n)
    laws = fixed_sample_laws(radius_of(nine))
    radius, bounds = worst_fixed(nine, table, laws)
    assert max(radius, bounds) <= alpha
    assert radius > 0.8 * alpha   # on the edge p_A + p_B = 1 its share of alpha is spent
    for rule in (TwoSided(alpha, 0.5), TwoSided(alpha, None)):
        assert max(worst_fixed(rule.decide(selection, table, n), table, laws)) <= alpha
    # the same enumeration catches twice the level, and a radius that is 5 % too long
    assert worst_fixed(TwoSided(2 * alpha).decide(selection, table, n), table, laws)[0] > 1.5 * alpha
    assert worst_fixed(nine, table, laws, inflate=1.05)[0] > alpha


def test_a_runner_up_frozen_before_the_draws_is_caught() -> None:
    """The mistake: bound only the class that came second among the selection votes."""
    law = np.array([0.5, 0.11, 0.10, *[0.29 / 7] * 7])
    n, alpha, trials, rng = 100_000, 0.001, 3_000, np.random.default_rng(3)
    selection, votes = rng.multinomial(100, law, trials), rng.multinomial(n, law, trials)
    selection[:, 0] = 100   # names the class; the rest is as drawn
    honest = TwoSided(alpha).decide(selection, votes, n)
    frozen = votes[np.arange(trials), 1 + selection[:, 1:].argmax(axis=1)]
    p_upper = clopper_pearson_upper(frozen, n, 0.1 * alpha)
    limit = allowed(trials, alpha)
    truth = true_radius(law)
    assert np.sum(radius_of(honest) > truth) + np.sum(honest.p_upper < law[1]) <= limit
    assert np.sum(gaussian_radius(honest.failure, p_upper, 1.0) > truth) > 50 * limit
    assert 0.3 < np.mean(p_upper < law[1]) < 0.5


def strip(distance: float, width: float) -> tuple[Strips, torch.Tensor]:
    """Class 0 right of the origin, then a strip of class 1, then class 2, and a point at a distance from the origin."""
    return Strips([-width, 0.0], [2, 1, 0], [1.0]), torch.full((400, 1), distance)


@pytest.mark.parametrize("distance, width, truth", [(0.3, 0.1, 0.35), (0.1, 0.2, 0.2)])
def test_strips_have_the_radius_that_the_runner_up_gives(distance: float, width: float, truth: float) -> None:
    f, x = strip(distance, width)
    assert f.distance(distance, 0.5, reach=2.0) == pytest.approx(truth, abs=1e-9)
    assert f.probabilities(distance, 0.5).argsort().tolist() == [1, 2, 0]
    settings = {"num_classes": 3, "n": 4_000, "seed": 5, "block": 4_000}
    found = certify(f, x, Gaussian(0.5), rule=TwoSided(0.05), **settings)
    limit = allowed(len(x), 0.05)
    assert np.sum(found.radius > truth) <= limit
    assert np.sum(1.4 * found.radius > truth) > limit
    one = certify(f, x, Gaussian(0.5), rule=OneSided(0.05), **settings)
    assert np.median(found.radius) > np.median(one.radius) + 0.4 * (truth - distance)
    exact = (f.probabilities(distance, 0.5) * 1_000_000).round().astype(np.int64)[None]
    exact[0, 0] += 1_000_000 - exact.sum()
    # at a million draws in their expected shares, nothing but the level is lost
    decision = TwoSided().decide(exact, exact, 1_000_000)
    assert truth - 0.02 < radius_of(decision, 0.5)[0] < truth


# ------------------------------------------------------------------------------------------------- the sequential rule


class Paths:
    """Everything that can happen at three looks: increments of the votes, and their probability under a law."""

    def __init__(self, step: int, outcomes: int) -> None:
        self.step, self.looks = step, (step, 2 * step, 3 * step)
        self.table = all_tables(step, outcomes)
        self.index = np.indices((len(self.table),) * 3).reshape(3, -1)
        self.size = self.index.shape[1]
        self.counts = self.table[self.index].cumsum(axis=0)   # (looks, paths, outcomes)

    def decide(self, rule: Rule, pilot: list[int], classes: int) -> Decision:
        def sample(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
            assert (start, stop) in zip((0, *self.looks), self.looks, strict=False)
            return self.table[self.index[start // self.step][rows], :classes]

        selection = np.repeat(np.array([pilot]), self.size, axis=0)
        return rule.run(selection, sum(pilot), sample, self.looks[-1], np.ones(self.size))

    def mass(self, law: np.ndarray) -> np.ndarray:
        one = multinomial(self.table, law)
        return (one[:, None, None] * one[:, None] * one).ravel()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Paths]:
    """Paths of three short looks, at which the rules look as well."""

    def make(step: int, outcomes: int) -> Paths:
        paths = Paths(step, outcomes)
        monkeypatch.setattr(establish, "schedule", lambda n: paths.looks)
        return paths

    return make


MIDDLES = (0.0, -0.2, -0.4, -0.6)
PILOTS = {
    3: [[97, 95, 8], [81, 80, 39], [68, 67, 65]],
    4: [[97, 95, 4, 4], [81, 80, 20, 19], [66, 65, 35, 34], [52, 51, 49, 48]],
}


def corners(radii: tuple[float, ...], outcomes: int) -> list[np.ndarray]:
    """Laws at which a hypothesis is only just true."""
    laws = []
    for r in radii:
        for middle in MIDDLES:
            a, b = ndtr(middle + r), min(ndtr(middle - r), 1 - ndtr(middle + r))
            rest = (1 - a - b) / (outcomes - 2)
            laws += [np.array([a, b, *[rest] * (outcomes - 2)]), np.array([1 - b, b, *[0.0] * (outcomes - 2)])]
            laws += [np.array([a, *[(1 - a) / (outcomes - 1)] * (outcomes - 1)])]
            laws += [np.array([b, a, 1 - a - b, *[0.0] * (outcomes - 3)])]
    return laws


def sequential_laws(radii: tuple[float, ...], outcomes: int) -> list[np.ndarray]:
    return [row / 8 for row in all_tables(8, outcomes)] + corners(radii, outcomes)


def worst_sequential(paths: Paths, found: Decision, laws: list[np.ndarray], classes: int) -> list[float]:
    """Largest probability of a radius that is not true, and of a bound that is not."""
    assert found.radius is not None
    worst = np.zeros(2)
    for law in laws:
        mass, rival, known = paths.mass(law), law[1:classes].max(), ~found.abstained
        long = known & ~(true_radius(law[:classes]) > found.radius + 1e-9)
        wrong = known & ((found.p_lower >= law[0] - 1e-12) | (found.p_upper <= rival + 1e-12))
        worst = np.maximum(worst, (share(long, mass), share(wrong, mass)))
    return worst.tolist()


@pytest.mark.parametrize("classes, outcomes, step", [(3, 3, 6), (4, 4, 4), (3, 4, 4)])   # a further outcome is invalid
@pytest.mark.parametrize("radii", [(0.0,), (0.2,), (0.0, 0.15, 0.3)])
def test_false_radii_on_every_path(
    short: Callable[[int, int], Paths], classes: int, outcomes: int, step: int, radii: tuple[float, ...]
) -> None:
    alpha, paths = 0.15, short(step, outcomes)
    laws, spent = sequential_laws(radii, outcomes), []
    for pilot in PILOTS[classes]:
        found = paths.decide(SequentialTwoSided(radii, alpha, beta=0.05), pilot, classes)
        radius, bounds = worst_sequential(paths, found, laws, classes)
        assert max(radius, bounds) <= alpha
        spent.append((radius, bounds))
    assert max(spent)[0] > 0.5 * alpha                  # at the middle 0, on the edge p_A + p_B = 1
    assert min(bounds for _, bounds in spent) > 0.3 * alpha   # and a bound of the pair anywhere


def certified_by(crossed: np.ndarray, missed: np.ndarray, r: float, middle: float) -> Decision:
    known = crossed & missed
    radius = np.where(known, r, 0.0)
    ones = np.ones(len(known), dtype=np.int64)
    p_lower, p_upper = np.full(len(known), ndtr(middle + r)), np.full(len(known), ndtr(middle - r))
    return Decision(0 * ones, ~known, 1 - p_lower, p_lower, p_upper, ones, ones, ones, radius)


def test_the_same_check_catches_peeking_and_a_frozen_runner_up(short: Callable[[int, int], Paths]) -> None:
    alpha, r, paths = 0.15, 0.2, short(4, 4)
    laws, n = sequential_laws((r,), 4), np.array(paths.looks)[:, None]
    top, rival = paths.counts[:, :, 0], paths.counts[:, :, 1:].max(axis=2)
    peeking, frozen = [], []
    for middle in MIDDLES:
        a, b = ndtr(middle + r), ndtr(middle - r)
        above = (clopper_pearson_lower(top, n, alpha) > a).any(axis=0)
        below = (clopper_pearson_upper(rival, n, alpha) < b).any(axis=0)
        peeking.append(worst_sequential(paths, certified_by(above, below, r, middle), laws, 4))
        tests = [group_sequential(p, looks=paths.looks, alpha=alpha) for p in (a, 1 - b)]
        crossed, others = ((tests[0].efficacy[:, None] <= top).any(axis=0), (tests[1].efficacy[:, None] <= n - rival))
        honest = certified_by(crossed, others.any(axis=0), r, middle)
        assert max(worst_sequential(paths, honest, laws, 4)) <= alpha
        second = (tests[1].efficacy[:, None] <= n - paths.counts[:, :, 1]).any(axis=0)   # class 1, come what may
        frozen.append(worst_sequential(paths, certified_by(crossed, second, r, middle), laws, 4))
    assert max(radius for radius, _ in peeking) > 1.1 * alpha
    assert max(radius for radius, _ in frozen) > 2 * alpha


def test_the_level_is_kept_and_spent_at_full_size() -> None:
    """The rival's probability is just what the pair forbids, while p_A is well above its own: every claim is false."""
    middle, r, alpha, b, n = -0.4, 0.2, 0.05, 6_000, 3_000
    rival = float(ndtr(middle - r))
    law = np.array([0.7, rival, 0.3 - rival, 0.0])
    pilot = np.repeat([PILOTS[4][2]], b, axis=0)
    found, doubled = (
        SequentialTwoSided((r,), level).run(pilot, 200, draws(law, b, n, seed=11), n, np.ones(b))
        for level in (alpha, 2 * alpha)
    )
    false, doubly = (int(np.sum(decision.p_upper <= rival * (1 + 1e-12))) for decision in (found, doubled))
    assert 0.7 * alpha * b < false <= allowed(b, alpha) < doubly


def draws(law: list[float] | np.ndarray, b: int, n: int, seed: int) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Votes of b inputs among prefixes of their draws, the same whatever is asked for first."""
    looks = schedule(n)
    votes = np.random.default_rng(seed).multinomial(np.diff(looks, prepend=0)[:, None], law, (len(looks), b))
    return lambda rows, start, stop: votes[looks.index(stop)][rows]


def slowly(rule: SequentialTwoSided, votes: np.ndarray, looks: tuple[int, ...], middle: float) -> tuple[int, int]:
    """The rule for one input of class 0, in loops: radii established, draws taken. Votes (looks, k) are cumulative."""
    levels = [[float(ndtr(r + shift) * (1 + 1e-12)) for r in rule.radii] for shift in (middle, -middle)]
    tests = [[group_sequential(p, looks=looks, alpha=rule.alpha, beta=rule.beta) for p in row] for row in levels]
    crossed = np.zeros((2, len(rule.radii)), dtype=bool)
    futile = crossed.copy()
    for j, n in enumerate(looks):
        for i, count in enumerate((votes[j, 0], votes[j].sum() - votes[j, 1:].max())):   # invalid votes are no success
            for m, test in enumerate(tests[i]):
                crossed[i, m] |= count >= test.efficacy[j]
                futile[i, m] |= count <= test.futility[j]
        passed = 0
        while passed < len(rule.radii) and crossed[:, : passed + 1].all():
            passed += 1
        if passed == len(rule.radii) or (futile[:, passed] & ~crossed[:, passed]).any():
            return passed, n
    return passed, looks[-1]


@pytest.mark.parametrize(
    "law",   # what is missing from 1 is invalid
    [(0.5, 0.2, 0.2, 0.1), (0.35, 0.25, 0.2, 0.2), (0.8, 0.1, 0.05, 0.05), (0.9, 0.1, 0, 0), (0.55, 0.1, 0.1, 0.1)],
)
def test_radii_and_draws_agree_with_plain_loops(law: tuple[float, ...]) -> None:
    rule, b, n = SequentialTwoSided((0.0, 0.15, 0.3, 0.6), alpha=0.02, beta=0.05), 60, 4_000
    outcomes = np.array([*law, max(1 - sum(law), 0.0)])
    pilot = np.random.default_rng(8).multinomial(300, outcomes, b)[:, :-1]
    pilot = pilot[pilot.argmax(axis=1) == 0]
    whole = draws(outcomes, len(pilot), n, seed=9)

    def sample(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        return whole(rows, start, stop)[:, :-1]

    found = rule.run(pilot, 300, sample, n, np.ones(len(pilot)))
    looks, rows = schedule(n), np.arange(len(pilot))
    votes = np.cumsum([sample(rows, 0, look) for look in looks], axis=0)
    for row in rows:
        first, second = pilot[row, 0], pilot[row, 1:].max() + 300 - pilot[row].sum()
        middle = min(round(5 * float(ndtri((first + 0.5) / 301) + ndtri((second + 0.5) / 301))) / 10, 0.0)
        passed, taken = slowly(rule, votes[:, row], looks, middle)
        assert found.radius[row] == (0.0, *rule.radii)[passed]
        assert (found.n[row], found.abstained[row]) == (taken, passed == 0)
        if passed:
            assert found.p_lower[row] == pytest.approx(ndtr(middle + found.radius[row]))
            assert found.p_upper[row] == pytest.approx(ndtr(middle - found.radius[row]))
            assert gaussian_radius(found.failure[row], found.p_upper[row], 1.0) == pytest.approx(found.radius[row])


@given(st.integers(0, 10**6), st.integers(50, 100), st.sampled_from([0.0, 0.02]))
def test_two_classes_leave_sequential(seed: int, top: int, invalid: float) -> None:
    law = np.array([top / 100, 1 - top / 100, 0.0]) * (1 - invalid) + [0, 0, invalid]
    rng, looks = np.random.default_rng(seed), schedule(3_000)
    votes = rng.multinomial(np.diff(looks, prepend=0)[:, None], law, (len(looks), 6))[:, :, :2]
    pilot, sigma = rng.multinomial(100, law, 6)[:, :2], np.array([0.5, 0.5, 0.25, 0.25, 1.0, 1.0])
    one, two = (
        rule(radii=(0.0, 0.2, 0.4), alpha=0.01).run(
            pilot, 100, lambda rows, start, stop: votes[looks.index(stop)][rows], 3_000, sigma
        )
        for rule in (Sequential, SequentialTwoSided)
    )
    for name in (*FIELDS, "radius"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_spread_votes_are_certified_further_and_below_one_half() -> None:
    n, b, sigma, radii = 100_000, 300, np.full(300, 0.5), (0.25, 0.5, 0.75)
    law = np.array([0.55, *[0.05] * 9])   # radius 0.4427 by the pair, 0.0628 by p_A alone
    pilot = np.random.default_rng(1).multinomial(500, law, b)
    one, two = (
        rule(radii).run(pilot, 500, draws(law, b, n, seed=2), n, sigma) for rule in (Sequential, SequentialTwoSided)
    )
    assert one.abstained.all()
    assert np.array_equal(two.radius, np.full(b, 0.25))
    assert two.n.mean() < 2_000
    law = np.array([0.4, *[0.1] * 6])     # radius 0.257
    pilot = np.random.default_rng(3).multinomial(500, law, b)
    below = SequentialTwoSided((0.0, 0.1, 0.2, 0.3)).run(pilot, 500, draws(law, b, n, seed=4), n, sigma)
    assert np.mean(below.radius == 0.2) > 0.95
    assert np.all(below.radius < 0.257)
    assert np.all(below.p_lower < 0.4)
    assert np.all(below.p_upper > 0.1)


def test_a_peaked_law_loses_little() -> None:
    """Where nothing is to be won, the choice of the pair costs a few draws at most."""
    n, b, sigma, law = 100_000, 300, np.full(300, 0.5), np.array([0.8, 0.195, 0.005])
    pilot = np.random.default_rng(1).multinomial(100, law, b)
    one, two = (
        rule.run(pilot, 100, draws(law, b, n, seed=2), n, sigma)
        for rule in (Sequential((0.25, 0.5)), SequentialTwoSided((0.25, 0.5)))
    )
    assert two.radius.mean() >= one.radius.mean() - 0.005
    assert two.n.mean() < 1.5 * one.n.mean()


def test_a_class_that_the_selection_draws_named_wrongly_is_not_certified() -> None:
    pilot, law = np.repeat([[45, 25, 15, 15]], 20, axis=0), (0.35, 0.45, 0.1, 0.1)
    found = SequentialTwoSided((0.0, 0.1)).run(pilot, 100, draws(law, 20, 10_000, seed=7), 10_000, np.full(20, 0.5))
    assert found.abstained.all()
    assert not found.prediction.any()
    assert np.all(found.n < 5_000)


def test_a_radius_of_zero_and_radii_beyond_reach() -> None:
    pilot, law = np.array([[45, 25, 30]]), (0.45, 0.25, 0.3)
    sample, sigma = draws(law, 1, 20_000, seed=6), np.array([0.5])
    found = SequentialTwoSided((0.0, 5.0)).run(pilot, 100, sample, 20_000, sigma)
    assert (found.radius.tolist(), found.abstained.tolist()) == ([0.0], [False])
    assert found.p_upper[0] == ndtr(-0.3)
    assert found.p_lower[0] == 1.0 - ndtr(0.3)
    assert found.n[0] < 20_000
    beyond = SequentialTwoSided((5.0,)).run(pilot, 100, sample, 20_000, sigma)
    assert (beyond.abstained.tolist(), beyond.n.tolist()) == ([True], [0])
    empty = SequentialTwoSided((0.1,)).run(pilot[:0], 100, sample, 20_000, sigma[:0])
    assert empty.radius is not None
    assert len(empty.radius) == 0


@pytest.mark.parametrize("rule", [TwoSided(), TwoSided(split=None), SequentialTwoSided((0.1, 0.25, 0.4))], ids=repr)
def test_bits_do_not_depend_on_grouping_or_block(rule: Rule) -> None:
    f = Strips([-0.4, -0.2, 0.0], [3, 2, 1, 0], [1.0])
    distances = np.array([0.05, 0.15, 0.2, 0.3, 0.4, 0.5, 0.1, -0.1, -0.25])
    sigma = np.array([0.5, 0.25, 0.5, 0.5, 0.25, 0.5, 0.5, 0.25, 0.5])

    def run(rows: np.ndarray, block: int | None = None) -> dict[str, np.ndarray]:
        x = torch.from_numpy(distances[rows, None]).float()
        settings = {"num_classes": 4, "n": 4_000, "rule": rule, "seed": 9, "indices": rows, "block": block}
        found = certify(f, x, Gaussian(sigma[rows]), **settings)
        return {name: getattr(found, name) for name in ("prediction", "radius", "p_lower", "p_upper", "count", "n")}

    whole, order = run(np.arange(9)), np.array([4, 0, 8, 2, 6, 1, 3, 7, 5])
    assert np.any(whole["radius"] > 0)
    alone = [run(np.array([i])) for i in range(9)]
    joined = {name: np.concatenate([part[name] for part in alone]) for name in whole}
    shuffled = {name: values[np.argsort(order)] for name, values in run(order).items()}
    for other in (joined, shuffled, run(np.arange(9), block=100), run(np.arange(9), block=400)):
        for name, values in whole.items():
            assert np.array_equal(other[name], values), name


def test_both_rules_serve_wherever_a_rule_is_taken() -> None:
    f, noise, n = Strips([-0.4, -0.2, 0.0], [3, 2, 1, 0], [1.0]), GridGaussian(0.5), 10_000
    x, alpha = torch.tensor([[50 / 255], [120 / 255]]), 0.001
    settings = {"num_classes": 4, "n": n, "seed": 3}
    fixed = certify(f, x, noise, rule=TwoSided(alpha), **settings)
    level = noise.level(alpha, n, 1)
    assert level < alpha
    assert np.array_equal(fixed.p_lower, clopper_pearson_lower(fixed.count, n, 0.9 * level))
    named = certify(f, x, noise, rule=SequentialTwoSided((0.2, 0.5), alpha), n0=500, **settings)
    assert named.radius.tolist() == [0.2, 0.5]
    assert np.all(fixed.radius > named.radius)
    assert np.all(named.n < n)
    assert fixed.alpha.tolist() == named.alpha.tolist() == [alpha, alpha]


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, float("nan")])
def test_parameters_are_checked(bad: float) -> None:
    with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1"):
        TwoSided(bad)
    with pytest.raises(ValueError, match="split must be None or lie strictly between 0 and 1"):
        TwoSided(split=bad)
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=f"{name} must lie strictly between 0 and 1"):
            SequentialTwoSided((0.5,), **{name: bad})
    with pytest.raises(ValueError, match="radii must be strictly increasing"):
        SequentialTwoSided((0.5, 0.25))


def test_tables_are_checked() -> None:
    good = np.array([[3, 4]])
    with pytest.raises(ValueError, match="estimation votes must be >= 0 and sum to at most n = 6"):
        TwoSided().decide(good, good, 6)
    for rule in (TwoSided(), SequentialTwoSided((0.1,))):
        with pytest.raises(ValueError, match="selection votes must be >= 0 and sum to at most n = 6"):
            rule.run(good, 6, lambda rows, start, stop: good[rows], 200, np.array([0.5]))
    with pytest.raises(ValueError, match="n_max must be at least the first look"):
        SequentialTwoSided((0.1,)).run(good, 7, lambda rows, start, stop: good[rows], 50, np.array([0.5]))
