"""Rules over several noise levels, against classifiers whose probabilities are exact and simulations of their alpha.

Every promise stands beside the claim that it replaces, which has to be caught: the published one of a sigma chosen for
each input, and rules with one of their terms left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from closed_forms import allowed
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.establish import Hypotheses, SampleAt, establish
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import Decision, OneSided, SequentialUnder
from art_rs_plugins.theory.scales import Cascade, Envelope, ScaleRule, Selector, SequentialScales, VotesAt

MANY = 10**9   # draws that leave nothing to chance


def drawn(tables: list[np.ndarray], seed: int) -> VotesAt:
    """Multinomial votes; rows of a table (b, k) that sum to less than 1 leave the rest to invalid votes."""
    rng = np.random.default_rng(seed)

    def votes_at(level: int, rows: np.ndarray, n: int) -> np.ndarray:
        p = tables[level][rows]
        rest = np.maximum(1.0 - p.sum(axis=1, keepdims=True), 0.0)
        return rng.multinomial(n, np.concatenate([p, rest], axis=1))[:, :-1]

    return votes_at


def streamed(tables: list[np.ndarray], seed: int) -> SampleAt:
    """Multinomial votes, a part of the draws at a time."""
    votes_at = drawn(tables, seed)
    return lambda level, rows, start, stop: votes_at(level, rows, stop - start)


def expected(tables: list[np.ndarray]) -> VotesAt:
    """The votes of infinitely patient draws."""
    return lambda level, rows, n: np.floor(tables[level][rows] * n).astype(np.int64)


def certified(rule: ScaleRule, tables: list[np.ndarray], n: int = MANY, seed: int | None = None) -> Decision:
    size = len(tables[0])
    if seed is None:
        return rule.run(expected(tables), n, expected(tables), n, size)[0]
    return rule.run(drawn(tables, 2 * seed), 100, drawn(tables, 2 * seed + 1), n, size)[0]


def terms(tables: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """sigma Phi^-1(p) for probabilities (m, ..., k) and sigmas (m,) or (m, b)."""
    return np.reshape(sigmas, (*np.shape(sigmas), *[1] * (tables.ndim - np.ndim(sigmas)))) * ndtri(tables)


def envelope_radius(tables: np.ndarray, sigmas: np.ndarray, label: np.ndarray) -> np.ndarray:
    """True radius (b,) of a class under an envelope of unit weights, from probabilities (m, b, k)."""
    score = terms(tables, sigmas).max(axis=0)
    own = np.take_along_axis(score, label[..., None], axis=-1)[..., 0]
    np.put_along_axis(score, label[..., None], -np.inf, axis=-1)
    return 0.5 * (own - score.max(axis=-1))


# --- piecewise constant classifiers of the line ---------------------------------------------------------------------

GRID = np.linspace(-3.0, 3.0, 1501)
CENTRES = np.arange(250, 1251, 12)   # 84 of them, within [-2, 2]


@dataclass(frozen=True)
class Bases:
    """b random classifiers of the line with 3 classes, constant between 6 random edges in [-2, 2]."""

    edges: np.ndarray
    classes: np.ndarray

    @classmethod
    def random(cls, b: int, seed: int) -> "Bases":
        rng = np.random.default_rng(seed)
        return cls(np.sort(rng.uniform(-2.0, 2.0, (b, 6)), axis=1), rng.integers(0, 3, (b, 7)))

    def probabilities(self, sigma: np.ndarray | float) -> np.ndarray:
        """Of every class at every point of GRID, (b, g, 3); three votes in a million are cast at random."""
        scale = np.broadcast_to(sigma, (len(self.edges),))[:, None, None]
        inner = ndtr((self.edges[:, None, :] - GRID[None, :, None]) / scale)
        ends = np.zeros((*inner.shape[:2], 1))
        mass = np.diff(np.concatenate([ends, inner, ends + 1.0], axis=2), axis=2)
        p = np.stack([(mass * (self.classes == c)[:, None, :]).sum(axis=2) for c in range(3)], axis=2)
        return (1.0 - 3e-6) * p + 1e-6   # so that no digits are lost to cancellation where p is close to 0


def violations(labels: np.ndarray, radius: np.ndarray) -> int:
    """Centres (of b classifiers) with another label on GRID closer than their radius (b, centres)."""
    changes = labels[:, 1:] != labels[:, :-1]
    index = np.arange(len(GRID))
    after = np.where(changes, index[1:], 10**6)
    before = np.where(changes, index[:-1], -(10**6))
    edge = np.full((len(labels), 1), 10**6)
    following = np.minimum.accumulate(np.concatenate([after, edge], axis=1)[:, ::-1], axis=1)[:, ::-1]
    previous = np.maximum.accumulate(np.concatenate([-edge, before], axis=1), axis=1)
    steps = np.minimum(following - index, index - previous)[:, CENTRES]
    return int((steps * (GRID[1] - GRID[0]) < radius - 1e-9).sum())


def random_scales(b: int, seed: int) -> np.ndarray:
    return np.sort(np.exp(np.random.default_rng(seed).uniform(np.log(0.1), np.log(1.5), (3, b))), axis=0)


BASES, SIGMAS = Bases.random(400, 1), random_scales(400, 2)
TABLES = np.stack([BASES.probabilities(sigma) for sigma in SIGMAS])   # (3, b, g, 3)
AT = TABLES[:, :, CENTRES]
TOTAL = AT.shape[1] * AT.shape[2]


def each(rules: Callable[[int], ScaleRule], tables: Callable[[int], list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Radius and class (b, centres) that the rules certify at all centres."""
    found = [certified(rules(i), tables(i)) for i in range(len(BASES.edges))]
    return np.stack([d.radius for d in found]), np.stack([d.prediction for d in found])


def test_sigma_chosen_for_each_input_is_caught() -> None:
    """The published claim: the sigma of the longest radius, as if it were everybody's."""
    ordered = np.sort(TABLES, axis=3)
    radius = np.reshape(SIGMAS, (3, -1, 1)) / 2 * (ndtri(ordered[..., -1]) - ndtri(ordered[..., -2]))
    chosen = radius.argmax(axis=0)
    labels = np.take_along_axis(TABLES.argmax(axis=3), chosen[None], axis=0)[0]
    assert TOTAL > 30_000
    assert violations(labels, radius.max(axis=0)[:, CENTRES]) > 0.2 * TOTAL


def test_envelope_is_constant_within_its_radius() -> None:
    labels = terms(TABLES, SIGMAS).max(axis=0).argmax(axis=2)
    exact = envelope_radius(AT, SIGMAS, labels[:, CENTRES])
    assert violations(labels, exact) == 0
    assert violations(labels, 2.0 * exact) > 0.05 * TOTAL   # the class alone, its rivals forgotten

    radius, prediction = each(lambda i: Envelope(SIGMAS[:, i]), lambda i: list(AT[:, i]))
    claims = radius > 0.0
    assert np.array_equal(prediction[claims], labels[:, CENTRES][claims])
    assert (radius <= exact).all()
    assert (radius > 0.97 * exact - 0.005).all()


def test_weights_and_offsets_keep_the_promise_of_an_envelope() -> None:
    rng = np.random.default_rng(3)
    weights, offsets = rng.uniform(0.2, 1.0, SIGMAS.shape), rng.uniform(-0.2, 0.2, SIGMAS.shape)
    score = terms(TABLES, SIGMAS * weights) - offsets[:, :, None, None]
    labels = score.max(axis=0).argmax(axis=2)
    rules = [Envelope(*settings) for settings in zip(SIGMAS.T, weights.T, offsets.T, strict=True)]
    radius, prediction = each(lambda i: rules[i], lambda i: list(AT[:, i]))
    assert np.array_equal(prediction[radius > 0], labels[:, CENTRES][radius > 0])
    assert violations(labels, radius) == 0
    assert violations(labels, 1.5 * radius) > 0
    plain = np.sort(score[:, :, CENTRES].max(axis=0), axis=2)   # half the gap of the scores would hold as well
    assert (radius > 0.98 * (plain[..., 2] - plain[..., 1]) / 2 - 0.005).all()
    assert np.array_equal(rules[0].scores(TABLES[:, 0]), score[:, 0].max(axis=0))


def test_cascade_is_constant_within_its_radius() -> None:
    descending = SIGMAS[::-1]
    tables, thresholds = TABLES[::-1], np.random.default_rng(4).uniform(0.5, 0.9, 400)
    thresholds[:100] = 0.5
    passes = tables > thresholds[:, None, None]                      # (3, b, g, 3): no two classes at once
    assert passes.sum(axis=3).max() == 1
    level = np.where(passes.any(axis=3).any(axis=0), passes.any(axis=3).argmax(axis=0), 3)
    labels = np.full(level.shape, -1)
    for i in range(3):
        labels = np.where(level == i, passes[i].argmax(axis=2), labels)
    radius, prediction = each(
        lambda i: Cascade(descending[:, i], float(thresholds[i])), lambda i: list(tables[:, i][:, CENTRES])
    )
    here, claims = labels[:, CENTRES], radius > 0
    assert np.array_equal(prediction[claims], here[claims])
    assert claims[here >= 0].mean() > 0.9
    assert violations(labels, radius) == 0

    rows = np.maximum(here, 0)[None, ..., None]
    own = np.take_along_axis(terms(tables, descending)[:, :, CENTRES], rows, axis=3)[..., 0]
    first = own - descending[:, :, None] * ndtri(thresholds)[None, :, None]
    alone = np.take_along_axis(first, np.minimum(level[:, CENTRES], 2)[None], axis=0)[0]
    assert (radius <= np.where(here >= 0, alone, 0.0) + 1e-9).all()
    assert violations(labels, np.where(here >= 0, alone, 0.0)) > 100   # the levels before it forgotten


def test_selector_is_constant_within_its_radius_however_badly_it_selects() -> None:
    selector, sigma_e = Bases.random(400, 5), np.random.default_rng(6).uniform(0.2, 1.0, 400)
    votes = selector.probabilities(sigma_e)                          # (b, g, 3): of the three levels, at random
    chosen = votes.argmax(axis=2)
    labels = np.take_along_axis(TABLES.argmax(axis=3), chosen[None], axis=0)[0]
    radius, prediction = each(
        lambda i: Selector(SIGMAS[:, i], sigma_e[i]), lambda i: [*AT[:, i], votes[i, CENTRES]]
    )
    assert np.array_equal(prediction[radius > 0], labels[:, CENTRES][radius > 0])
    assert violations(labels, radius) == 0
    assert (radius > 0).mean() > 0.6

    own = np.take_along_axis(terms(TABLES, SIGMAS).max(axis=3), chosen[None], axis=0)[0][:, CENTRES]
    exact = np.minimum(own, sigma_e[:, None] * ndtri(votes.max(axis=2)[:, CENTRES]))
    assert (radius <= np.maximum(exact, 0.0)).all()
    assert (radius > 0.97 * exact - 0.005).all()
    assert violations(labels, np.maximum(own, 0.0)) > 0.02 * TOTAL   # the radius of the selector forgotten


# --- golden numbers -------------------------------------------------------------------------------------------------


def island(x: float | np.ndarray, sigma: float) -> np.ndarray:
    """A for |z| <= 1, else B."""
    a = ndtr((1.0 - x) / sigma) - ndtr((-1.0 - x) / sigma)
    return np.stack([a, 1.0 - a], axis=-1)


def test_island() -> None:
    sigmas = np.array([0.25, 2.25])

    def tables(x: float) -> np.ndarray:
        return np.stack([island(np.array([x]), sigma) for sigma in sigmas])

    def label(x: float) -> int:
        return int(Envelope(sigmas).scores(tables(x))[0].argmax())

    # the published rule claims .958 at 0, and changes its mind at .0873
    assert terms(tables(0.0), sigmas)[0, 0, 0] == pytest.approx(0.958204, abs=1e-6)
    assert terms(tables(0.0), sigmas)[1, 0, 1] == pytest.approx(0.9079, abs=1e-4)
    gap = [float(terms(tables(x), sigmas)[0, 0, 0] - terms(tables(x), sigmas)[1, 0, 1]) for x in (0.0, 0.1)]
    assert gap[0] > 0 > gap[1]
    # and so does the envelope, but it says so
    crossing = brentq(lambda x: float(np.subtract(*Envelope(sigmas).scores(tables(x))[0])), 0.0, 0.5)
    assert crossing == pytest.approx(0.087299, abs=1e-5)
    assert [label(x) for x in (0.0, crossing - 1e-6, crossing + 1e-6, 0.1, 3.0)] == [0, 0, 1, 1, 1]
    for x, golden, prediction in ((0.0, 0.025129, 0), (0.1, 0.006032, 1)):
        exact = envelope_radius(tables(x), sigmas, np.array([prediction]))[0]
        assert exact == pytest.approx(golden, abs=1e-6)
        assert exact < abs(crossing - x)
        decision = certified(Envelope(sigmas), list(tables(x)))
        assert decision.prediction[0] == prediction
        assert exact - 1e-3 < decision.radius[0] <= exact


def linear(distance: float, sigmas: tuple[float, ...], size: int = 1) -> list[np.ndarray]:
    p = ndtr(np.array([distance, -distance]) / np.array(sigmas)[:, None])
    return [np.tile(row, (size, 1)) for row in p]


def test_linear_classifiers_lose_nothing() -> None:
    sigmas = (0.25, 0.5, 1.0)
    tables = linear(0.5, sigmas)
    assert np.stack(tables)[:, 0, 0] == pytest.approx([0.97725, 0.84134, 0.69146], abs=1e-5)
    assert Envelope(sigmas).scores(np.stack(tables))[0] == pytest.approx([0.5, -0.5], abs=1e-12)
    radius = certified(Envelope(sigmas), tables).radius
    assert radius is not None
    assert 0.5 - 1e-3 < radius[0] <= 0.5
    # a cascade whose first level accepts at 1/2 is plain smoothing at that level
    cascade, _ = Cascade(sigmas[::-1]).run(drawn(tables[::-1], 0), 100, drawn(tables[::-1], 1), 1000, 1)
    failure = 1.0 - clopper_pearson_lower(cascade.count, 1000, 0.001)
    assert cascade.radius == pytest.approx(gaussian_radius(failure, failure, 1.0), rel=1e-9)


@pytest.mark.parametrize("n, alpha, distance, mean", [(1000, 0.05, 0.3, 0.231), (10_000, 0.01, 0.6, 0.567)])
def test_linear_classifiers_by_simulation(n: int, alpha: float, distance: float, mean: float) -> None:
    trials, sigmas = 30_000, (0.25, 0.5, 1.0)
    decision = certified(Envelope(sigmas, alpha=alpha), linear(distance, sigmas, trials), n, seed=1)
    wrong = (decision.radius > distance) | ((decision.prediction == 1) & ~decision.abstained)
    assert wrong.sum() <= allowed(trials, alpha)
    assert decision.radius.mean() == pytest.approx(mean, abs=0.01)


# --- alpha ----------------------------------------------------------------------------------------------------------


def false_claims(decision: Decision, truth: np.ndarray) -> int:
    """Claims beyond the true radius (k,) of the class that they name, which is negative for a wrong class."""
    return int((decision.radius > np.maximum(truth[decision.prediction], 0.0)).sum())


def envelope_truth(tables: list[np.ndarray], sigmas: tuple[float, ...]) -> np.ndarray:
    one = np.stack(tables)[:, :1]
    classes = one.shape[2]
    return np.array([envelope_radius(one, np.array(sigmas), np.array([c]))[0] for c in range(classes)])


def fifty_classes(
    scores: list[list[float]], sigmas: tuple[float, ...], mine: list[float], size: int
) -> list[np.ndarray]:
    """Class 0 has the scores `mine`; at level i, classes of its own have scores[i], and the rest what is left."""
    tables = []
    for i, sigma in enumerate(sigmas):
        p = np.zeros(50)
        p[0] = ndtr(mine[i] / sigma)
        p[1 + 9 * i : 1 + 9 * i + len(scores[i])] = ndtr(np.array(scores[i]) / sigma)
        rest = p == 0
        assert p.sum() < 1.0
        p[rest] = (1.0 - p.sum()) / rest.sum()
        tables.append(np.tile(p, (size, 1)))
    return tables


@pytest.mark.slow
def test_five_scales_and_fifty_classes_need_no_correction() -> None:
    alpha, trials, n, sigmas = 0.05, 20_000, 1000, (0.06, 0.12, 0.25, 0.5, 1.0)
    # the rivals that bind are others at every scale, and some of them come in pairs
    binding = [[-0.02, -0.02], [-0.02], [-0.02], [-0.02], [-0.06]]
    spread = fifty_classes(binding, sigmas, [-0.1, -0.2, -0.3, -0.05, 0.04], trials)
    # one rival, at the smallest scale, whose own error is small against that of the class: alpha is spent
    single = fifty_classes([[-0.003], [], [], [], []], sigmas, [-0.1, -0.2, -0.3, -0.5, 1.2], trials)
    for tables, careless in (
        (spread, Envelope(sigmas, alpha=0.999, split=0.5)),   # estimates in the place of bounds
        (single, Envelope(sigmas, alpha=2.5 * alpha)),
    ):
        truth = envelope_truth(tables, sigmas)
        assert truth.argmax() == 0
        assert truth[1:].max() < 0
        false = false_claims(certified(Envelope(sigmas, alpha=alpha), tables, n, seed=1), truth)
        assert false <= allowed(trials, alpha)
        assert tables is spread or false > 0.4 * alpha * trials
        assert false_claims(certified(careless, tables, n, seed=1), truth) > allowed(trials, alpha)


def cascade_truth(tables: list[np.ndarray], rule: Cascade, level: int) -> float:
    """True radius of class 0, accepted at a level."""
    floor = ndtri(np.array(rule.threshold))
    own = rule.sigmas[level] * (ndtri(tables[level][0, 0]) - floor[level])
    before = [rule.sigmas[i] * (floor[i] - ndtri(tables[i][0, 1:].max())) for i in range(level)]
    return min([own, *before])


@pytest.mark.parametrize("rival, binding", [(0.62, "rival"), (0.2, "class"), (0.5529, "both")])
def test_cascade_spends_alpha_once(rival: float, binding: str) -> None:
    """Accepted at the second of two levels: either bound may bind, and each takes the whole alpha."""
    alpha, trials = 0.05, 20_000
    own = min(0.6, 0.95 - rival)
    tables = [np.tile(p, (trials, 1)) for p in ([own, rival, 1.0 - own - rival], [0.85, 0.1, 0.05])]

    def false(spent: float) -> int:
        rule = Cascade((1.0, 0.5), (0.7, 0.6), alpha=spent)
        truth = cascade_truth(tables, rule, 1)
        assert (truth == 0.5 * (ndtri(0.85) - ndtri(0.6))) == (binding == "class")
        decision, sigma = rule.run(drawn(tables, 3), 400, drawn(tables, 4), 1000, trials)
        claims = (sigma == 0.5) & (decision.prediction == 0)
        assert claims.mean() > 0.99
        return int((decision.radius[claims] > truth).sum())

    assert false(alpha) <= allowed(trials, alpha)
    if binding != "both":
        assert false(alpha) > 0.5 * alpha * trials
        assert false(2 * alpha) > allowed(trials, alpha)


def test_cascade_asks_no_further_than_the_level_that_accepts() -> None:
    tables = [np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]), np.array([[0.0, 0.0], [0.1, 0.9], [0.5, 0.5]]),
              np.array([[0.0, 0.0], [0.0, 0.0], [0.8, 0.2]])]   # fmt: skip
    asked: list[tuple[str, int, list[int]]] = []

    def recording(name: str) -> VotesAt:
        def votes_at(level: int, rows: np.ndarray, n: int) -> np.ndarray:
            asked.append((name, level, rows.tolist()))
            return expected(tables)(level, rows, n)

        return votes_at

    decision, sigma = Cascade((1.0, 0.5, 0.25), 0.7).run(recording("select"), 1000, recording("estimate"), 1000, 3)
    assert sigma.tolist() == [1.0, 0.5, 0.25]
    assert decision.prediction.tolist() == [0, 1, 0]
    assert decision.count.tolist() == [900, 900, 800]
    assert decision.runner_up_count.tolist() == [100, 100, 200]
    levels = [(0, [0, 1, 2]), (1, [1, 2]), (2, [2])]
    assert asked == [(name, *level) for name in ("select", "estimate") for level in levels]

    asked.clear()
    tables = [*[np.full((3, 2), 0.5)] * 3, np.array([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9], [0.9, 0.0, 0.1]])]
    Selector((0.25, 0.5, 1.0), 1.0).run(recording("select"), 100, recording("estimate"), 100, 3)
    assert {(level, *rows) for _, level, rows in asked} == {(3, 0, 1, 2), (0, 0, 2), (2, 1)}
    assert len(asked) == 6


@pytest.mark.parametrize("selected, named", [(0.5, 0.5), (0.5, 2.0), (2.0, 0.5), (0.0, 0.5), (0.5, -0.1)])
def test_selector_spends_alpha_once(selected: float, named: float) -> None:
    """A linear selector and linear classes: the true radius is the smaller of two distances."""
    alpha, trials, n, sigma_e, sigmas = 0.05, 20_000, 1000, 0.8, (0.25, 1.0)
    truth = min(selected, named)
    tables = [*linear(named, sigmas, trials), linear(selected, (sigma_e,), trials)[0][:, ::-1]]

    def false(spent: float) -> int:
        rule = Selector(sigmas, sigma_e, alpha=spent)
        decision, sigma = rule.run(drawn(tables, 5), 101, drawn(tables, 6), n, trials)
        right = (sigma == 1.0) & (decision.prediction == 0)
        if selected > 0 and named > 0:
            return int((right & (decision.radius > truth)).sum())
        return int((~decision.abstained).sum() if selected == 0 else (right & ~decision.abstained).sum())

    assert false(alpha) <= allowed(trials, alpha)
    if selected != named and min(selected, named) > 0:
        assert false(alpha) > 0.5 * alpha * trials
        assert false(2 * alpha) > allowed(trials, alpha)


def test_selector_takes_the_smaller_radius_and_abstains_with_either_part() -> None:
    sure, even = np.array([990, 10]), np.array([520, 480])
    votes = [np.stack(rows) for rows in ([sure, even, sure, even], [sure, sure, sure, sure], [sure, sure, even, even])]
    rule = Selector((0.25, 0.5), 2.0, alpha=0.001)
    decision, sigma = rule.run(*[lambda level, rows, n: votes[level][rows], 1000] * 2, 4)
    assert decision.abstained.tolist() == [False, True, True, True]
    assert sigma.tolist() == [0.25] * 4
    failure = 1.0 - clopper_pearson_lower(990, 1000, 0.001)
    assert decision.radius[0] == pytest.approx(gaussian_radius(failure, failure, 0.25), rel=1e-9)
    decision, _ = Selector((0.25, 0.5), 0.1).run(*[lambda level, rows, n: votes[level][rows], 1000] * 2, 4)
    assert decision.radius[0] == pytest.approx(gaussian_radius(failure, failure, 0.1), rel=1e-9)


def test_choosing_sigma_on_the_draws_that_certify_it_is_caught() -> None:
    alpha, trials, n, m, distance = 0.01, 20_000, 1000, 10, 0.3
    sigmas = np.linspace(0.2, 0.6, m)
    p = ndtr(distance / sigmas)
    rng = np.random.default_rng(7)

    def radius(counts: np.ndarray) -> np.ndarray:
        return sigmas * ndtri(clopper_pearson_lower(counts, n, alpha))

    shared = radius(rng.binomial(n, p, (trials, m)))
    fresh = radius(rng.binomial(n, p, (trials, m)))
    chosen = shared.argmax(axis=1)
    counts = np.arange(n + 1)
    each_fails = [float(binom.pmf(counts, n, q) @ (clopper_pearson_lower(counts, n, alpha) > q)) for q in p]
    rate = (shared.max(axis=1) > distance).mean()
    assert rate == pytest.approx(1.0 - np.prod(1.0 - np.array(each_fails)), abs=0.008)
    assert rate == pytest.approx(0.094, abs=0.012)
    assert (fresh[np.arange(trials), chosen] > distance).sum() <= allowed(trials, alpha)


# --- named radii -----------------------------------------------------------------------------------------------------

RULES = [Envelope((0.25, 0.5, 1.0)), Cascade((1.0, 0.5, 0.25), (0.7, 0.7, 0.5)), Selector((0.25, 0.5, 1.0), 1.0)]
RADII = tuple(np.linspace(0.0, 1.5, 61).tolist())


def named(rule: ScaleRule, tables: list[np.ndarray], *, rivals: bool = True, choosers: bool = True) -> np.ndarray:
    """Largest of RADII up to which no hypothesis is true, by exact probabilities; -1 if there is none."""
    plan = rule.plan(expected(tables), MANY, len(tables[0]), RADII)
    free = np.ones((len(tables[0]), len(RADII)), dtype=bool)
    for each in [*plan.own, *plan.others]:
        others = tables[each.level].copy()
        own = np.take_along_axis(others, each.target[:, None], axis=1)
        np.put_along_axis(others, each.target[:, None], -1.0, axis=1)
        left_out = (each.rival and not rivals) or (each.target is not plan.guess and not choosers)
        p = others.max(axis=1, keepdims=True) if each.rival else 1.0 - own
        free &= ~each.asked[:, None] | (p < each.limits) | left_out
    return np.where(free.any(axis=1), np.append(RADII, -1.0)[np.cumprod(free, axis=1).sum(axis=1) - 1], -1.0)


def of_all(rules: Callable[[int], ScaleRule], tables: Callable[[int], list[np.ndarray]], **left: bool) -> np.ndarray:
    return np.stack([named(rules(i), tables(i), **left) for i in range(len(BASES.edges))])


@pytest.mark.parametrize("kind", ["envelope", "cascade", "selector"])
def test_where_no_hypothesis_is_true_the_answer_is_constant(kind: str) -> None:
    """30,000 inputs with exact probabilities: hypotheses exclude what changes the answer, and little else."""
    selector, sigma_e = Bases.random(400, 5), np.random.default_rng(6).uniform(0.2, 1.0, 400)
    votes = selector.probabilities(sigma_e)
    if kind == "envelope":
        rules, tables = (lambda i: Envelope(SIGMAS[:, i])), lambda i: list(AT[:, i])
        labels = terms(TABLES, SIGMAS).max(axis=0).argmax(axis=2)
        forgotten = {"rivals": False}
    elif kind == "cascade":
        rules, tables = (lambda i: Cascade(SIGMAS[::-1, i], 0.6)), lambda i: list(AT[::-1, i])
        passes = TABLES[::-1] > 0.6
        level = passes.any(axis=3).argmax(axis=0)
        labels = np.take_along_axis(passes, level[None, ..., None], axis=0)[0].argmax(axis=2)
        labels = np.where(passes.any(axis=(0, 3)), labels, -1)
        forgotten = {"rivals": False}
    else:
        rules, tables = (lambda i: Selector(SIGMAS[:, i], sigma_e[i])), lambda i: [*AT[:, i], votes[i, CENTRES]]
        labels = np.take_along_axis(TABLES.argmax(axis=3), votes.argmax(axis=2)[None], axis=0)[0]
        forgotten = {"choosers": False}
    radius = of_all(rules, tables)
    assert TOTAL > 30_000
    assert violations(labels, radius) == 0
    assert violations(labels, of_all(rules, tables, **forgotten)) > 50
    whole, _ = each(rules, tables)   # by a billion draws; an envelope may lose what its middle is rounded by
    assert (radius <= whole + 0.01).all()
    lost = 0.026 + (0.1 * SIGMAS[0][:, None] if kind == "envelope" else 0.0)
    assert (radius >= np.minimum(whole, 1.5) - lost)[whole > 0.03].mean() > 0.995


@pytest.mark.parametrize(
    "rule",
    [
        Envelope((0.25, 0.5, 1.0), alpha=0.05),
        Cascade((1.0, 0.5, 0.25), (0.6, 0.6, 0.5), alpha=0.05),
        Selector((0.25, 0.5, 1.0), 1.0, alpha=0.05),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_a_radius_that_is_false_by_a_hair_is_rarely_established(rule: ScaleRule) -> None:
    """One term is exactly at the radius, so that the claim is false: at most alpha, though every look may claim it."""
    trials, radius, names = 6_000, 0.3, (0.1, 0.3)
    if isinstance(rule, Envelope):
        tables = linear(0.3, rule.levels, trials)
    elif isinstance(rule, Cascade):   # passes the first level by, where its rival is as near as the radius
        near = ndtr(ndtri(0.6) - 0.3 / 1.0)
        tables = [np.tile(row, (trials, 1)) for row in ([1.0 - near, near], [0.95, 0.05], [0.9, 0.1])]
    else:
        chooser = np.tile([1.0 - ndtr(0.3), ndtr(0.3), 0.0], (trials, 1))
        tables = [*[np.tile([0.99, 0.01], (trials, 1))] * 3, chooser]
    sequential = SequentialScales(rule, names)
    assert (sequential.alpha, sequential.levels) == (0.05, rule.levels)
    decision, sigma = sequential.run(drawn(tables, 1), 100, streamed(tables, 2), 3_000, trials)
    right = decision.prediction == 0
    false = right & (decision.radius >= radius)
    assert false.sum() <= allowed(trials, 0.05)
    # and alpha is made use of; two tests of an envelope have to err at once
    assert false.mean() > (0.0005 if isinstance(rule, Envelope) else 0.005)
    assert (decision.radius[right] >= 0.1).mean() > 0.8
    assert decision.n.max() <= 3_000
    assert decision.n.mean() < 2_500
    assert set(sigma.tolist()) <= set(rule.levels[:3])
    # peeking: a bound for one sample size, tried at every look, errs far more often
    each, rng = np.zeros((trials, 2), dtype=np.int64), np.random.default_rng(3)
    ever = np.zeros(trials, dtype=bool)
    for step in (100, *[200] * 14):
        each += rng.multinomial(step, [ndtr(0.3), 1.0 - ndtr(0.3)], trials)
        ever |= OneSided(0.05).decide(each, each, int(each[0].sum())).failure <= ndtr(-0.3)
    assert ever.sum() > allowed(trials, 0.05)


@pytest.mark.parametrize("rule", RULES)
def test_named_radii_are_those_of_the_whole_radius_in_fewer_draws(rule: ScaleRule) -> None:
    size, tables, radii = 400, some_tables(400, 21), (0.0, 0.1, 0.25, 0.5)
    # the middle of an envelope costs what the selection votes miss it by
    n0 = 2_000 if isinstance(rule, Envelope) else 100
    plain, _ = rule.run(drawn(tables, 22), n0, drawn(tables, 23), 10_000, size)
    asked = np.zeros((len(tables), size), dtype=np.int64)

    def counting(level: int, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        assert (asked[level, rows] == start).all()   # a level that is left is left for good
        asked[level, rows] = stop
        return sample(level, rows, start, stop)

    sample = streamed(tables, 24)
    found, sigma = SequentialScales(rule, radii).run(drawn(tables, 22), n0, counting, 10_000, size)
    assert np.array_equal(found.prediction, plain.prediction)   # the same selection votes
    assert set(found.radius.tolist()) == set(radii)
    clear = np.abs(plain.radius[:, None] - np.array(radii)).min(axis=1) > (0.06 if isinstance(rule, Envelope) else 0.03)
    largest = np.array([max((r for r in radii if r < whole), default=0.0) for whole in plain.radius])
    assert (found.radius >= largest)[clear].mean() > 0.97
    assert asked.sum() < 0.7 * 10_000 * size * len(tables)
    assert np.array_equal(found.abstained, found.p_lower == 0.0)
    p = np.stack(tables[:3])[[rule.levels.index(s) for s in sigma.tolist()], np.arange(size)]
    rivals = p.copy()
    np.put_along_axis(rivals, found.prediction[:, None], 0.0, axis=1)
    certified = ~found.abstained
    assert (p[np.arange(size), found.prediction] <= found.p_lower)[certified].sum() <= allowed(size, rule.alpha)
    assert (rivals.max(axis=1) > found.p_upper).sum() <= allowed(size, rule.alpha)
    assert gaussian_radius(found.failure, found.p_upper, sigma) == pytest.approx(found.radius, abs=1e-9)
    assert (found.count + found.runner_up_count <= found.n).all()


@pytest.mark.parametrize("rule", RULES)
def test_named_radii_of_one_input_do_not_depend_on_the_others(rule: ScaleRule) -> None:
    size, tables = 40, some_tables(40, 31)
    first = [drawn([table], 32)(0, np.arange(size), 100) for table in tables]

    def run(order: np.ndarray) -> tuple[np.ndarray, ...]:
        def sample(level: int, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
            return np.stack([drawn([tables[level]], [level, row, start])(0, [row], stop - start)[0]
                             for row in order[rows]])   # fmt: skip

        rule_ = SequentialScales(rule, (0.1, 0.3), beta=0.05)
        found, sigma = rule_.run(lambda i, rows, n: first[i][order[rows]], 100, sample, 1_500, len(order))
        return (*(getattr(found, name) for name in Decision.__slots__), sigma)

    whole, order = run(np.arange(size)), np.random.default_rng(33).permutation(size)
    parts = [run(order[i : i + 9]) for i in range(0, size, 9)]
    for together, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert together[order].tobytes() == np.concatenate(split).tobytes()
    assert 0.1 < whole[1].mean() < 0.9


def test_an_envelope_below_one_half_reports_the_bounds_of_its_radius() -> None:
    """Found by a reviewer: where p_A < 1/2 the bound of 1 - p_A stood for that of the rivals, too large to agree."""
    tables = [np.tile([0.4, 0.15, 0.15, 0.15, 0.15], (50, 1))] * 2
    rule = SequentialScales(Envelope((0.25, 0.5)), (0.05, 0.1, 0.3))
    found, sigma = rule.run(drawn(tables, 41), 2_000, streamed(tables, 42), 10_000, 50)
    assert (found.radius >= 0.05).all()
    assert (found.p_lower < 0.5).all()
    assert gaussian_radius(found.failure, found.p_upper, sigma) == pytest.approx(found.radius, abs=1e-9)
    assert (found.p_upper > 0.15).all()   # and it holds


def test_limits_that_are_no_numbers_certify_nothing() -> None:
    """Found by a reviewer: a row that began with NaN asked for nothing, and all its radii passed without a draw."""
    votes = np.array([[1000, 0]] * 5)
    limits = np.array([[np.nan, 0.3], [0.3, np.nan], [0.0, 0.3], [0.3, 0.3], [1.0, 0.3]])
    found = SequentialUnder((0.0, 0.25), limits=limits).run(
        votes // 10, 100, lambda rows, start, stop: votes[rows] * (stop - start) // 1000, 2_000, np.ones(5)
    )
    assert found.radius.tolist() == [0.0, 0.0, 0.0, 0.25, 0.25]
    assert found.abstained.tolist() == [True, False, True, False, False]
    assert found.n.tolist()[:3:2] == [0, 0]
    nothing = Hypotheses(0, np.zeros(2, int), np.full((2, 1), 0.3), np.array([True, False]))
    with pytest.raises(ValueError, match="must ask something of every input"):
        establish([nothing], lambda *_: votes[:2], 1_000, [2], 0.001, 0.01)


def test_settings_of_named_radii_are_checked() -> None:
    for make, error, words in (
        (lambda: SequentialScales(OneSided(), (0.1,)), TypeError, "rule must be an Envelope"),
        (lambda: SequentialScales(Cascade((0.5,)), ()), ValueError, "radii must be finite"),
        (lambda: SequentialScales(Cascade((0.5,)), (0.2, 0.1)), ValueError, "strictly increasing"),
        (lambda: SequentialScales(Cascade((0.5,)), (-0.1,)), ValueError, "radii must be finite and >= 0"),
        (lambda: SequentialScales(Cascade((0.5,)), (0.1,), alpha=2.0), ValueError, "alpha must"),
        (lambda: SequentialScales(Cascade((0.5,)), (0.1,), alpha=0.0), ValueError, "alpha must"),
        (lambda: SequentialScales(Cascade((0.5,)), (0.1,), beta=0.0), ValueError, "beta must"),
    ):
        with pytest.raises(error, match=words):
            make()
    tables, rule = some_tables(2, 0), SequentialScales(Cascade((1.0, 0.5, 0.25)), (0.1,))
    with pytest.raises(ValueError, match="n_max must be at least the first look"):
        rule.run(drawn(tables, 0), 9, streamed(tables, 1), 50, 2)
    with pytest.raises(ValueError, match="estimation votes must be >= 0"):
        rule.run(drawn(tables, 0), 9, lambda *_: np.full((2, 4), -1), 200, 2)
    chooser = SequentialScales(Selector((0.25, 0.5), 1.0), (0.1,))
    with pytest.raises(ValueError, match="the selector needs 2 outputs"):
        chooser.run(drawn(tables, 0), 9, streamed(tables, 1), 200, 2)


# --- what every rule keeps ------------------------------------------------------------------------------------------


def some_tables(size: int, seed: int) -> list[np.ndarray]:
    """Votes of 4 classes at three levels, and of a selector among these; a class and a level are likely."""
    rng = np.random.default_rng(seed)
    tables = [rng.dirichlet(np.ones(4) * 0.3, size) * 0.98 for _ in range(3)]
    return [*tables, rng.dirichlet(np.ones(3) * 0.1, size)]


@pytest.mark.parametrize("rule", RULES)
def test_inputs_do_not_influence_each_other(rule: ScaleRule) -> None:
    size, tables = 60, some_tables(60, 8)
    select, estimate = (
        [drawn([table], seed)(0, np.arange(size), n) for table in tables] for seed, n in ((1, 100), (2, 1000))
    )

    def of(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        first, second = (lambda level, r, n, v=votes: v[level][rows[r]] for votes in (select, estimate))
        decision, sigma = rule.run(first, 100, second, 1000, len(rows))
        return (*(getattr(decision, name) for name in Decision.__slots__), sigma)

    whole = of(np.arange(size))
    order = np.random.default_rng(9).permutation(size)
    parts = [of(order[i : i + 7]) for i in range(0, size, 7)]
    for together, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert together[order].tobytes() == np.concatenate(split).tobytes()
    assert 0.1 < whole[1].mean() < 0.9   # abstained, some of them


@pytest.mark.parametrize("rule", RULES)
def test_reported_bounds_give_the_radius_and_hold(rule: ScaleRule) -> None:
    """`p_upper` is at least every rival's probability at the reported sigma, and the theorem for one sigma agrees."""
    size, tables = 4000, some_tables(4000, 10)
    decision, sigma = rule.run(drawn(tables, 11), 100, drawn(tables, 12), 1000, size)
    radius = gaussian_radius(decision.failure, decision.p_upper, sigma)
    assert decision.radius is not None
    assert radius == pytest.approx(decision.radius, abs=1e-9)
    assert np.array_equal(decision.abstained, decision.radius == 0.0)
    assert decision.failure + decision.p_lower == pytest.approx(np.ones(size), abs=1e-9)
    p = np.stack(tables[:3])[np.searchsorted(sorted(rule.levels[:3]), sigma), np.arange(size)]
    if isinstance(rule, Cascade):
        p = np.stack(tables[:3])[np.searchsorted(-np.array(rule.levels), -sigma), np.arange(size)]
    own = p[np.arange(size), decision.prediction]
    rivals = p.copy()
    rivals[np.arange(size), decision.prediction] = 0.0
    assert (decision.p_lower > own).sum() <= allowed(size, rule.alpha)
    assert (decision.p_upper < rivals.max(axis=1)).sum() <= allowed(size, rule.alpha)
    assert (decision.runner_up_count + decision.count <= decision.n).all()
    assert (decision.n == 1000).all()


@given(st.integers(0, 10**6), st.integers(0, 2), st.integers(1, 300), st.sampled_from(RULES))
def test_invalid_votes_never_help(seed: int, level: int, lost: int, rule: ScaleRule) -> None:
    """Estimation votes that turn invalid, whosever they were, leave no radius longer."""
    tables = some_tables(6, seed)
    select, estimate = [table[:] for table in tables], [drawn([t], seed)(0, np.arange(6), 1000) for t in tables]
    spoilt = [table.copy() for table in estimate]
    spoilt[level] = np.maximum(spoilt[level] - lost, 0)
    before, after = (
        rule.run(expected(select), 1000, lambda i, rows, n, v=votes: v[i][rows], 1000, 6)[0]
        for votes in (estimate, spoilt)
    )
    assert (after.radius <= before.radius).all()
    assert np.array_equal(after.prediction, before.prediction)


@pytest.mark.parametrize("rule", [Envelope((0.25, 1.0), alpha=0.05), Cascade((1.0, 0.25), alpha=0.05)])
def test_answers_on_a_boundary_are_rarely_given(rule: ScaleRule) -> None:
    """A label is returned where the radius is positive: at a point that belongs to no class, with probability alpha."""
    trials = 20_000
    decision = certified(rule, linear(0.0, rule.levels, trials), 1000, seed=13)
    assert (~decision.abstained).sum() <= allowed(trials, 0.05)
    near = certified(rule, linear(0.3, rule.levels, trials), 1000, seed=14)
    assert (~near.abstained & (near.prediction == 0)).mean() > 0.9


def test_a_small_scale_that_knows_too_little_limits_the_envelope() -> None:
    n, sigmas = 100_000, (0.12, 1.0)
    tables = linear(2.0, sigmas)   # the rival is 17 sigmas away at the small scale: never seen, whatever its score
    seen = {offset: certified(Envelope(sigmas, offsets=(offset, 0.0)), tables, n, seed=15) for offset in (0.0, 1.0)}
    top, roof = ndtri(seen[0.0].p_lower[0]), ndtri(1.0 - 0.0001 ** (1.0 / n))
    assert roof == pytest.approx(-3.74, abs=0.01)
    assert seen[0.0].radius[0] == pytest.approx(0.5 * (top - 0.12 * roof), rel=1e-6)
    assert seen[0.0].radius[0] < 1.25
    assert seen[1.0].radius[0] == pytest.approx(0.5 * (top - 0.12 * roof) + 0.5, rel=1e-6)
    assert max(decision.radius[0] for decision in seen.values()) < 2.0


def test_settings_are_checked() -> None:
    for make, message in (
        (lambda: Envelope((0.5, 0.25)), "strictly increasing"),
        (lambda: Envelope(()), "sigmas must be finite"),
        (lambda: Envelope((0.25, 0.25)), "strictly increasing"),
        (lambda: Envelope((0.25, -0.5)), "sigmas must be finite and > 0"),
        (lambda: Envelope((0.25, 0.5), weights=(0.5, 0.0)), "weights must lie in"),
        (lambda: Envelope((0.25, 0.5), weights=2.0), "weights must lie in"),
        (lambda: Envelope((0.25, 0.5), offsets=(0.1,)), "offsets must be one finite number"),
        (lambda: Envelope((0.25, 0.5), offsets=np.nan), "offsets must be one finite number"),
        (lambda: Envelope((0.25, 0.5), split=1.0), "split must lie strictly"),
        (lambda: Envelope((0.25, 0.5), alpha=0.0), "alpha must lie strictly"),
        (lambda: Cascade((0.25, 0.5)), "strictly decreasing"),
        (lambda: Cascade((0.5, 0.25), 0.4), "only one class can pass"),
        (lambda: Cascade((0.5, 0.25), 1.0), "only one class can pass"),
        (lambda: Cascade((0.5, 0.25), (0.5, 0.5, 0.5)), "threshold must be one finite number"),
        (lambda: Selector((0.25,), 0.5), "at least 2"),
        (lambda: Selector((0.25, 0.5), 0.0), "selector_sigma must be finite and > 0"),
        (lambda: Selector((0.25, 0.5), 0.5, alpha=1.0), "alpha must lie strictly"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert Envelope([0.25, 0.5], weights=0.5) == Envelope((0.25, 0.5), weights=(0.5, 0.5))
    assert Selector((0.25, 0.5), 1.0).levels == (0.25, 0.5, 1.0)


@pytest.mark.parametrize("rule", RULES)
def test_votes_are_checked(rule: ScaleRule) -> None:
    good = expected(some_tables(3, 1))
    with pytest.raises(ValueError, match="estimation votes must be >= 0 and sum to at most n = 500"):
        rule.run(good, 1000, lambda level, rows, n: good(level, rows, 1000), 500, 3)
    with pytest.raises(ValueError, match="selection votes must be >= 0 and sum to at most n = 500"):
        rule.run(lambda level, rows, n: good(level, rows, 1000), 500, good, 1000, 3)
    with pytest.raises(ValueError, match="the selector needs 2 outputs"):
        Selector((0.25, 0.5), 1.0).run(lambda level, rows, n: np.ones((3, 4), int), 4, good, 1000, 3)
