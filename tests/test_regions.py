"""The memory: geometry checked in exact arithmetic, searches against brute force, alpha against simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from closed_forms import Linear, Strips, allowed, certificates
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.theory import search
from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.regions import Case, CertifiedRegions, EndlessBudget, Promise, SharedBudget
from art_rs_plugins.theory.search import SLACK, BallSearch, as_points, distances

SHRUNK = (1 - SLACK) / (1 + SLACK)


def raw(prediction, radius, **changes) -> Certificates:
    """Certificates at arbitrary sigmas; class -1 stands for an abstention."""
    prediction, radius = np.atleast_1d(prediction), np.atleast_1d(np.asarray(radius, dtype=np.float64))
    given = np.where(prediction < 0, np.nan, radius)
    return certificates(given, prediction=np.maximum(prediction, 0), kind="conditional", **changes)


def points(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def store(regions: CertifiedRegions, x: np.ndarray, prediction, radius, **changes) -> list[Promise]:
    promises = regions.settle(x, raw(prediction, radius, **changes))
    regions.insert(x, promises)
    return promises


def squared(a: np.ndarray, b: np.ndarray) -> Fraction:
    """Squared distance of two float32 points, exactly."""
    return sum(((Fraction(float(s)) - Fraction(float(t))) ** 2 for s, t in zip(a, b, strict=True)), Fraction(0))


def inside(x: np.ndarray, centre: np.ndarray, radius: float) -> bool:
    """Whether x is the centre, or in the open ball, in exact arithmetic."""
    apart = squared(x, centre)
    return apart == 0 or apart < Fraction(radius) ** 2


def check_disjoint(regions: CertifiedRegions) -> None:
    """Open balls with their centres are disjoint where labels differ, in exact arithmetic."""
    centres = regions.centres()
    for i in range(len(regions)):
        for j in range(i):
            if regions.prediction[i] != regions.prediction[j]:
                apart = squared(centres[i], centres[j])
                assert apart > 0
                assert (Fraction(float(regions.radius[i])) + Fraction(float(regions.radius[j]))) ** 2 <= apart


# ---------------------------------------------------------------------- known answers


def test_the_order_decides() -> None:
    x = points([0.0], [0.9])
    for order, expected in (((0, 1), (0, 0)), ((1, 0), (1, 1))):
        regions = CertifiedRegions((1,))
        first = store(regions, x[[order[0]]], order[0], 1.0)[0]
        second = store(regions, x[[order[1]]], order[1], 1.0)[0]
        assert (first.prediction, first.radius, first.case, first.record) == (expected[0], 1.0, Case.NEW, 0)
        assert (second.prediction, second.case, second.record) == (expected[1], Case.INHERITED, 0)
        assert second.radius == pytest.approx(1.0 - np.float64(x[1, 0]), rel=1e-7)
        assert second.radius < 1.0 - np.float64(x[1, 0])
        assert len(regions) == 1


def test_optimised_sigma_without_memory_is_false_and_with_it_is_not() -> None:
    f = Strips([-4.75, 0.15, 2.05, 4.75], [2, 0, 1, 0, 2], [1.0])

    def radius(t: float, c: int, sigma: float) -> float:
        if c == 0:
            return float(sigma * ndtri(f.probabilities(t, sigma)[c]))
        return float(-sigma * ndtri(ndtr((0.15 - t) / sigma) + ndtr((t - 2.05) / sigma)))   # its digits near p = 1

    def best(t: float, c: int) -> tuple[float, float]:
        grid = np.geomspace(0.06, 6.0, 400)
        start = grid[np.argmax([radius(t, c, s) for s in grid])]
        ends = (max(0.06, start / 1.1), start * 1.1)
        found = minimize_scalar(lambda s: -radius(t, c, s), bounds=ends, method="bounded", options={"xatol": 1e-9})
        return float(found.x), -float(found.fun)

    sigma, claimed = best(0.0, 0)
    assert (sigma, claimed) == (pytest.approx(2.92845, abs=1e-4), pytest.approx(1.188568, abs=1e-6))
    near, far = best(1.1, 0)[1], best(1.1, 1)[1]
    assert (near, far) == (pytest.approx(0.869678, abs=1e-6), pytest.approx(0.94738, abs=1e-5))
    # within the claimed radius, the classifier that optimises sigma anew says something else
    assert claimed > 1.1
    assert far > near
    x = points([0.0], [1.1])
    regions = CertifiedRegions((1,))
    store(regions, x[:1], 0, claimed)
    reply = store(regions, x[1:], 1, far)[0]
    assert (reply.prediction, reply.radius) == (0, pytest.approx(0.0886, abs=1e-4))
    regions = CertifiedRegions((1,))
    store(regions, x[1:], 1, far)
    reply = store(regions, x[:1], 0, claimed)[0]
    assert (reply.prediction, reply.case, reply.radius) == (0, Case.TRIMMED, pytest.approx(0.1526, abs=1e-4))


def test_case_by_case() -> None:
    regions = CertifiedRegions((2,))
    assert store(regions, points([0, 0]), 0, 1.0)[0] == Promise(0, 1.0, Case.NEW, 0)
    assert store(regions, points([4, 0]), 1, 1.0)[0] == Promise(1, 1.0, Case.NEW, 1)
    # tangent balls are disjoint, but only up to the slack
    tangent = store(regions, points([2.5, 0]), 2, 0.5)[0]
    assert tangent.case is Case.TRIMMED
    assert tangent.radius == pytest.approx(0.5, rel=1e-8)
    assert tangent.radius < 0.5
    # balls of one class may overlap, and the deepest one answers
    assert store(regions, points([0, 1.5]), 0, 1.0)[0] == Promise(0, 1.0, Case.NEW, 3)
    reply = store(regions, points([0, 0.75]), 1, 3.0)[0]
    assert (reply.prediction, reply.case, reply.radius) == (0, Case.INHERITED, pytest.approx(0.25, rel=1e-7))
    assert store(regions, points([0, 1.0]), 1, 3.0)[0].record == 3
    # a centre is answered with its own record
    assert regions.covering(points([0, 0])) == [Promise(0, 1.0, Case.REPLAYED, 0)]
    assert regions.covering(points([-0.0, -0.0])) == [Promise(0, 1.0, Case.REPLAYED, 0)]
    # an abstention promises nothing and changes nothing, and is answered where something is promised
    assert store(regions, points([9, 9]), -1, 0.0)[0] == Promise(0, 0.0, Case.ABSTAINED, -1)
    assert store(regions, points([4, 0]), -1, 0.0)[0] == Promise(1, 1.0, Case.REPLAYED, 1)
    assert len(regions) == 4
    regions.audit()


def test_a_point_is_promised_where_no_ball_fits() -> None:
    regions = CertifiedRegions((1,))
    store(regions, points([0.0]), 0, 1.0)
    on_the_edge = np.nextafter(np.float32(1.0), np.float32(2.0), dtype=np.float32)
    reply = store(regions, points([on_the_edge]), 1, 5.0)[0]
    assert reply.case is Case.TRIMMED
    assert reply.radius == pytest.approx(float(on_the_edge) - 1.0, rel=0.1)
    assert store(regions, points([3.0]), 2, 0.0)[0] == Promise(2, 0.0, Case.NEW, 2)
    # later balls of another class stop at the point, and it keeps its answer
    assert store(regions, points([4.0]), 0, 5.0)[0].radius == pytest.approx(1.0, rel=1e-8)
    assert store(regions, points([3.0]), 0, 5.0)[0] == Promise(2, 0.0, Case.REPLAYED, 2)
    regions.audit()
    check_disjoint(regions)


def test_a_point_in_the_skin_of_a_ball_keeps_its_answer() -> None:
    # at 1e-9 beyond the radius nothing is promised, but no other class may settle: the float64 radius moves the edge
    x = points([1.0], [0.0])
    for gap, case in ((0.5e-9, Case.INHERITED), (1.5e-9, Case.TRIMMED), (2.5e-9, Case.TRIMMED)):
        regions = CertifiedRegions((1,))
        regions.insert(x[1:], [Promise(0, 1.0 - gap, Case.NEW, 0)])
        reply = store(regions, x[:1], 1, 1.0)[0]
        assert reply.case is case
        assert (reply.radius == 0.0) == (gap < 2e-9)
        again = store(regions, x[:1], 2, 1.0)[0]
        assert (again.prediction, again.radius) == (reply.prediction, reply.radius)
        regions.audit()


def test_radii_may_be_as_large_as_they_like() -> None:
    regions = CertifiedRegions((1,))
    assert store(regions, points([0.0]), 0, 1.7e308)[0].radius == 1.7e308
    assert store(regions, points([1e15]), 1, 1.7e308)[0].prediction == 0
    regions = CertifiedRegions((1,))
    store(regions, points([0.0]), 1, 0.0)
    assert store(regions, points([3.0]), 0, 1.7e308)[0].radius == pytest.approx(3.0, rel=1e-8)
    together = regions.settle(points([5.0], [7.0]), raw([2, 3], [1.7e308, 1.7e308]))
    assert [promise.case for promise in together] == [Case.INHERITED, Case.TRIMMED]
    regions.audit()


# ---------------------------------------------------------------------- batches


def test_a_batch_shares_the_distance_in_proportion() -> None:
    regions = CertifiedRegions((1,))
    promises = store(regions, points([0.0], [1.0], [5.0]), [0, 1, 0], [1.0, 3.0, 0.5])
    assert [promise.radius for promise in promises] == pytest.approx([0.25, 0.75, 0.5], rel=1e-8)
    assert [promise.case for promise in promises] == [Case.TRIMMED, Case.TRIMMED, Case.NEW]
    assert [promise.record for promise in promises] == [0, 1, 2]
    check_disjoint(regions)
    # what is known already comes first, and trims before the sharing
    more = store(regions, points([0.1], [2.75], [3.75]), [1, 2, 3], [9.0, 3.0, 3.0])
    assert (more[0].case, more[0].prediction) == (Case.INHERITED, 0)
    # 2.75 is trimmed to 1 by the ball of radius .75 at 1, and 3.75 to .75 by the ball of radius .5 at 5
    assert [promise.radius for promise in more[1:]] == pytest.approx([1 / 1.75, 0.75 / 1.75], rel=1e-7)
    check_disjoint(regions)
    regions.audit()


def test_equal_inputs_of_a_batch_get_one_answer() -> None:
    regions = CertifiedRegions((1,))
    x = points([0.0], [-0.0], [0.0], [4.0])
    promises = store(regions, x, [2, 1, -1, 0], [1.0, 2.0, 0.0, 1.0], index=np.array([8, 3, 0, 5]))
    assert promises[1] == Promise(1, 2.0, Case.NEW, 0)
    assert promises[0] == Promise(1, 2.0, Case.REPLAYED, 0)
    assert promises[2].case is Case.ABSTAINED
    assert promises[3] == Promise(0, 1.0, Case.NEW, 1)
    both = CertifiedRegions((1,)).settle(points([0.0], [1.0]), raw([0, 1], [0.0, 0.0]))
    assert [promise.radius for promise in both] == [0.0, 0.0]


coordinate = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, -0.25, 1e-3, 1e-30, 1e4]))
size = st.sampled_from([0.0, 1e-320, 1e-9, 0.25, 0.5, 1.0, 1.5, 2.0, 7.3, 1e6, 1e300])


@st.composite
def batches(draw, dimension: int | None = None):
    width = draw(st.integers(1, 8)) if dimension is None else dimension
    rows = draw(st.lists(st.tuples(st.tuples(*[coordinate] * width), st.integers(-1, 2), size), min_size=1, max_size=6))
    x, labels, radii = zip(*rows, strict=True)
    return np.array(x, dtype=np.float32), np.array(labels), np.array(radii)


@given(st.data(), batches())
def test_a_batch_does_not_know_its_order(data, batch) -> None:
    x, labels, radii = batch
    old, old_labels, old_radii = data.draw(batches(x.shape[1]))
    order = np.array(data.draw(st.permutations(range(len(x)))))
    index = np.arange(len(x))
    found = []
    for rows in (index, order):
        regions = CertifiedRegions(x.shape[1:])
        store(regions, old, old_labels, old_radii)
        promises = store(regions, x[rows], labels[rows], radii[rows], index=index[rows])
        regions.audit()
        check_disjoint(regions)
        found.append((dict(zip(rows.tolist(), promises, strict=True)), regions))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1].radius, found[1][1].radius)
    np.testing.assert_array_equal(found[0][1].centres(), found[1][1].centres())


# ---------------------------------------------------------------------- everything at random


class Regions(RuleBasedStateMachine):
    """Queries, batches, probes and restarts in any order, on lattices that force ties; all claims in fractions."""

    @initialize(dimension=st.integers(1, 8))
    def begin(self, dimension: int) -> None:
        self.dimension = dimension
        self.regions = CertifiedRegions((dimension,))
        self.given: list[tuple[np.ndarray, Promise]] = []
        self.log: list[tuple[np.ndarray, Promise]] = []

    def honour(self, x: np.ndarray, promise: Promise | None) -> None:
        """The answer to x keeps every promise that was given before it."""
        for centre, earlier in self.given:
            if inside(x, centre, earlier.radius):
                assert promise is not None
                assert promise.prediction == earlier.prediction

    def take(self, x: np.ndarray, labels: np.ndarray, radii: np.ndarray) -> None:
        before = len(self.regions)
        promises = self.regions.settle(x, raw(labels, radii))
        assert len(self.regions) == before
        self.regions.insert(x, promises)
        for row, promise in enumerate(promises):
            if promise.case is Case.ABSTAINED:
                assert labels[row] == -1
                assert promise.radius == 0.0
                continue
            self.honour(x[row], promise)
            if promise.is_record:
                assert promise.prediction == labels[row]
                assert promise.radius <= radii[row]
                self.log.append((x[row], promise))
            if promise.case is Case.INHERITED:
                parent, radius = self.regions.centres()[promise.record], self.regions.radius[promise.record]
                left = Fraction(float(radius)) - Fraction(promise.radius)
                assert promise.radius == 0.0 or left**2 >= squared(x[row], parent)
        assert len(self.regions) - before == sum(promise.is_record for promise in promises)
        replies = [(x[row], promise) for row, promise in enumerate(promises) if promise.case is not Case.ABSTAINED]
        self.given += replies
        for point, promise in replies:   # asked again, the same answer; a centre has the same radius too
            again = self.regions.covering(point[None])[0]
            assert again is not None
            assert again.prediction == promise.prediction
            assert promise.case is Case.INHERITED or again.radius == promise.radius

    @rule(data=st.data())
    def ask(self, data) -> None:
        x, labels, radii = data.draw(batches(self.dimension))
        self.take(x[:1], labels[:1], radii[:1])

    @rule(data=st.data())
    def ask_together(self, data) -> None:
        self.take(*data.draw(batches(self.dimension)))

    @rule(data=st.data(), label=st.integers(-1, 2), radius=size)
    def ask_at_the_edge(self, data, label: int, radius: float) -> None:
        if self.given:
            self.take(self.edge(data)[None], np.array([label]), np.array([radius]))

    def edge(self, data) -> np.ndarray:
        """A point next to the sphere around something that was promised."""
        centre, promise = data.draw(st.sampled_from(self.given))
        direction = np.array(data.draw(st.tuples(*[st.integers(-2, 2)] * self.dimension)), dtype=np.float64)
        direction /= max(float(np.linalg.norm(direction)), 1.0)
        step = min(promise.radius, 1e6) * data.draw(st.sampled_from([1 - 1e-7, 1 - 1e-12, 1.0, 1 + 1e-7, 0.5]))
        return (centre.astype(np.float64) + step * direction).astype(np.float32)

    @rule(data=st.data())
    def probe(self, data) -> None:
        if self.given:
            x = self.edge(data)
            self.honour(x, self.regions.covering(x[None])[0])

    @rule()
    def restart(self) -> None:
        asked = np.array([x for x, _ in self.given], dtype=np.float32).reshape(-1, self.dimension)
        before = self.regions.covering(asked)
        self.regions = CertifiedRegions((self.dimension,))
        for x, promise in self.log:
            self.regions.insert(x[None], [promise])
        self.regions.audit()
        assert self.regions.covering(asked) == before

    @invariant()
    def no_overlap(self) -> None:
        if hasattr(self, "regions"):
            check_disjoint(self.regions)
            assert [p.radius for _, p in self.log] == self.regions.radius.tolist()   # none was ever changed


TestRegions = Regions.TestCase
TestRegions.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)


# ---------------------------------------------------------------------- the search


def brute(centres: np.ndarray, reach: np.ndarray, x: np.ndarray, margin: float) -> set[int]:
    apart = np.linalg.norm(centres.astype(np.float64) - x, axis=1)
    return set(np.flatnonzero(apart <= reach + margin).tolist())


def planted(shape: tuple[int, ...], count: int, seed: int) -> tuple[BallSearch, np.ndarray, np.ndarray, np.ndarray]:
    """Balls whose edges pass 1e-7 before or behind the queries, among images that differ by noise or in brightness."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.0, 1.0, shape)
    spread = np.geomspace(1e-4, 0.3, count)[:, None]
    noise = np.where(np.arange(count)[:, None] % 2, rng.normal(size=(count, base.size)), rng.normal(size=(count, 1)))
    centres = (base.ravel() + spread * noise).astype(np.float32)
    queries = (base.ravel() + 1e-3 * rng.normal(size=(6, base.size))).astype(np.float32)
    chosen = queries[rng.integers(0, len(queries), count)]
    apart = np.sqrt(((centres.astype(np.float64) - chosen) ** 2).sum(axis=1))
    reach = apart * (1.0 + rng.choice([-1e-7, 1e-7], count))
    balls = BallSearch(shape)
    balls.append(as_points(centres.reshape(count, *shape), shape), reach)
    return balls, centres, reach, queries


def overlooked(balls: BallSearch, centres: np.ndarray, reach: np.ndarray, queries: np.ndarray) -> int:
    """Balls that the search misses."""
    missed = 0
    for margin in (0.0, 0.1):
        for x, (rows, _) in zip(queries, balls.near(queries, np.full(len(queries), margin)), strict=True):
            truth = brute(centres, reach, x, margin)
            missed += len(truth - set(rows.tolist()))
            assert set(rows.tolist()) <= brute(centres, (reach + margin) * (1 + 5 * SLACK), x, 0.0)
    return missed


SHAPES = [(1,), (3,), (784,), (3, 32, 32), (32, 32, 3), (1, 28, 28), (2, 3, 8, 8), (5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_search_overlooks_nothing(shape: tuple[int, ...]) -> None:
    balls, centres, reach, queries = planted(shape, 2000 if np.prod(shape) < 1000 else 700, 1)
    assert overlooked(balls, centres, reach, queries) == 0


def test_membership_is_exact_next_to_the_edge() -> None:
    shape = (3, 16, 16)
    _, centres, reach, queries = planted(shape, 500, 2)
    regions = CertifiedRegions(shape)
    regions.insert(centres.reshape(-1, *shape), [Promise(0, float(r), Case.NEW, i) for i, r in enumerate(reach)])
    for x in queries:
        covered = regions.covering(x.reshape(1, *shape))[0]
        assert (covered is not None) == bool(brute(centres, reach, x, 0.0))


@pytest.mark.parametrize("lie", ["tf32", "no slack", "code"])
def test_a_search_that_is_off_by_more_is_caught(monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    def coarse(a: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(a).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    balls, centres, reach, queries = planted((3, 32, 32), 700, 0)
    if lie == "tf32":   # 10 bits of mantissa, as GPUs multiply by default
        monkeypatch.setattr(search, "_inner", lambda a, b: coarse(a) @ coarse(b).T)
    elif lie == "no slack":
        monkeypatch.setattr(search, "_error", lambda norms, norm, k: 0.0 * norms)
    else:   # a projection that is not orthonormal
        encode = BallSearch._encode
        monkeypatch.setattr(BallSearch, "_encode", lambda self, x: np.float32(1.01) * encode(self, x))
        balls = BallSearch((3, 32, 32))
        balls.append(centres, reach)
    assert overlooked(balls, centres, reach, queries) > 0


@given(batches(), st.randoms())
def test_codes_are_no_further_apart_than_points(batch, random) -> None:
    x = batch[0]
    balls = BallSearch(x.shape[1:])
    codes = balls._encode(x).astype(np.float64)
    a, b = random.randrange(len(x)), random.randrange(len(x))
    apart = float(np.linalg.norm(codes[a] - codes[b]))
    rounding = 2.0**-23 * float(np.linalg.norm(codes[a]) + np.linalg.norm(codes[b]))
    assert apart <= float(squared(x[a], x[b])) ** 0.5 + rounding


def test_blocks_are_cut_along_every_axis() -> None:
    assert BallSearch((3, 32, 32))._codes.all.shape == (0, 2 * 48)
    assert BallSearch((784,))._codes.all.shape == (0, 2 * 64)
    assert BallSearch((5,))._codes.all.shape == (0, 2 * 5)
    smooth = np.ones((1, 3, 8, 8), dtype=np.float32)
    code = BallSearch((3, 8, 8))._encode(smooth)[0]
    assert code.tolist() == [2.0] * 48 + [0.0] * 48


def tree(squares: list[float]) -> float:
    """The sum, one addition of IEEE 754 at a time."""
    while len(squares) > 1:
        half = (len(squares) + 1) // 2
        squares = [a + b for a, b in zip(squares[:half], squares[half:] + [0.0], strict=False)]
    return squares[0]


def test_distances_are_the_same_bits_everywhere() -> None:
    rng = np.random.default_rng(0)
    for d in (1, 2, 3, 7, 64, 3072):
        x, y = rng.normal(size=(50, d)).astype(np.float32), rng.normal(size=d).astype(np.float32)
        whole = distances(x, y)
        for row, found in zip(x.tolist(), whole.tolist(), strict=True):
            assert found == math.sqrt(tree([(a - b) * (a - b) for a, b in zip(row, y.tolist(), strict=True)]))
        order = rng.permutation(50)
        np.testing.assert_array_equal(distances(x[order], y), whole[order])
        np.testing.assert_array_equal([distances(row[None], y)[0] for row in x], whole)
        np.testing.assert_array_equal([distances(y[None], row)[0] for row in x], whole)
        exact = np.sqrt(((x.astype(np.longdouble) - y) ** 2).sum(axis=1))
        assert np.max(np.abs(whole - exact) / exact) < 2e-15
    assert distances(points([1e-45, 0.0]), points(0.0, 0.0))[0] > 0.0   # the smallest float32 does not vanish


@pytest.mark.parametrize(
    "x, error, message",
    [
        (np.zeros((1, 2), dtype=np.int64), TypeError, "floating point, got dtype int64"),
        (np.zeros((1, 3), dtype=np.float32), ValueError, r"shape \(b, 2\), got \(1, 3\)"),
        (np.zeros(2, dtype=np.float32), ValueError, r"shape \(b, 2\), got \(2,\)"),
        (np.array([[0.1, 0.0]]), ValueError, "float32 holds exactly"),
        (np.array([[np.nan, 0.0]], dtype=np.float32), ValueError, "finite"),
        (np.array([[np.inf, 0.0]], dtype=np.float32), ValueError, "finite"),
        (np.array([[1e300, 0.0]]), ValueError, "float32 holds exactly"),
        (np.array([[2e15, 0.0]], dtype=np.float32), ValueError, "within 1e"),
    ],
)
def test_points_that_are_none_are_refused(x: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CertifiedRegions((2,)).covering(x)
    assert CertifiedRegions((2,)).covering(np.zeros((3, 2), dtype=np.float16)) == [None] * 3
    assert CertifiedRegions((2,)).covering(np.zeros((0, 2), dtype=np.float32)) == []


def test_what_does_not_fit_is_refused() -> None:
    regions, x = CertifiedRegions((1,)), points([0.0], [1.0])
    with pytest.raises(ValueError, match="x and certificates must have the same length, got 2 and 1"):
        regions.settle(x, raw(0, 1.0))
    with pytest.raises(ValueError, match="norm 1"):
        regions.settle(x[:1], raw(0, 1.0, norm=1.0))
    with pytest.raises(ValueError, match="conditional"):
        regions.frozen(x[:1], raw(0, 1.0))
    with pytest.raises(ValueError, match="x and promises must have the same length"):
        regions.insert(x, [Promise(0, 1.0, Case.NEW, 0)])
    early = regions.settle(x[1:], raw(1, 0.5))
    store(regions, x[:1], 0, 1.0)
    with pytest.raises(ValueError, match="settle them again"):
        regions.insert(x[1:], early)
    for shape in ((), (0,), (2**23,)):
        with pytest.raises(ValueError, match="shape"):
            CertifiedRegions(shape)
    with pytest.raises(ValueError, match="read-only"):
        regions.radius[0] = 2.0


# ---------------------------------------------------------------------- audit and clearance


@pytest.mark.parametrize(
    "radii, gap, bad",
    [((1.0, 1.0), 2.1, False), ((1.0, 1.0), 2.0, True), ((1.0, 1.0), 1.5, True), ((0.0, 1.0), 1.0, True),
     ((0.0, 1.0), 1.0 + 1e-6, False), ((0.0, 0.0), 0.0, True), ((0.0, 0.0), 1e-30, False), ((3.0, 0.0), 1.0, True)],
)   # fmt: skip
def test_the_audit_finds_balls_that_overlap(radii: tuple[float, float], gap: float, bad: bool) -> None:
    for labels in ((0, 1), (0, 0)):
        regions = CertifiedRegions((2,))
        regions.insert(points([50, 0]), [Promise(5, 1.0, Case.NEW, 0)])
        for record, (label, radius) in enumerate(zip(labels, radii, strict=True), start=1):
            x = points([0.0, 0.0] if record == 1 else [0.0, gap])
            regions.insert(x, [Promise(label, radius, Case.NEW, record)])
        if bad and labels == (0, 1):
            with pytest.raises(ValueError, match="records 1 and 2"):
                regions.audit()
        else:
            regions.audit()


def test_the_audit_finds_one_bad_pair_among_many() -> None:
    rng = np.random.default_rng(4)
    regions = CertifiedRegions((3, 8, 8))
    x = rng.uniform(size=(600, 3, 8, 8)).astype(np.float32)
    promises = store(regions, x, rng.integers(0, 10, 600), rng.uniform(0.0, 5.0, 600))
    assert sum(promise.case is Case.TRIMMED for promise in promises) > 100
    regions.audit()
    nearest = int(np.argmin(distances(x.reshape(600, -1), x[17].ravel()) + 9.0 * (np.arange(600) == 17)))
    grown = np.array(regions.radius)
    grown[17] += float(distances(x[[nearest]].reshape(1, -1), x[17].ravel())[0])
    planted = CertifiedRegions((3, 8, 8))
    planted.insert(x, [Promise(int(c), float(r), Case.NEW, i)
                       for i, (c, r) in enumerate(zip(regions.prediction, grown, strict=True))])
    with pytest.raises(ValueError, match="overlap"):
        planted.audit()


def test_clearance_is_the_distance_to_the_nearest_other_class() -> None:
    rng = np.random.default_rng(5)
    x = rng.uniform(size=(300, 20)).astype(np.float32)
    regions = CertifiedRegions((20,))
    store(regions, x, rng.integers(0, 4, 300), rng.uniform(0.0, 1.0, 300))
    y, c = rng.uniform(size=(50, 20)).astype(np.float32), rng.integers(0, 4, 50)
    apart = np.sqrt(((y[:, None].astype(np.float64) - x[None]) ** 2).sum(axis=2))
    room = np.where(regions.prediction[None] == c[:, None], np.inf, apart - regions.radius[None]).min(axis=1)
    for limit in (np.inf, 1.0, 0.1):
        found = regions.clearance(y, c, limit)
        np.testing.assert_allclose(found, np.clip(room, 0.0, limit), atol=1e-8)
        assert np.all(found <= np.clip(room, 0.0, limit))
    assert CertifiedRegions((20,)).clearance(y, c, 2.0).tolist() == [2.0] * 50


# ---------------------------------------------------------------------- a memory that stays as it is


def half_planes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed classifier of three strips of the plane, with its exact radius."""
    edges = np.array([-1.0, 1.0])
    return np.searchsorted(edges, x[:, 0]), np.abs(x[:, :1].astype(np.float64) - edges).min(axis=1)


def frozen_world(seed: int) -> CertifiedRegions:
    rng = np.random.default_rng(seed)
    regions = CertifiedRegions((2,))
    x = rng.uniform(-3.0, 3.0, (15, 2)).astype(np.float32)
    store(regions, x, rng.integers(0, 3, 15), rng.choice([0.0, 0.3, 0.8, 2.0], 15))
    return regions


def answers(regions: CertifiedRegions, x: np.ndarray) -> np.ndarray:
    """The classifier that is frozen: the regions, and the strips elsewhere."""
    own = half_planes(x)[0]
    return np.array([c if p is None else p.prediction for p, c in zip(regions.covering(x), own, strict=True)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frozen_regions_keep_their_certificates(seed: int) -> None:
    rng, regions = np.random.default_rng(100 + seed), frozen_world(seed)
    x = rng.uniform(-3.0, 3.0, (200, 2)).astype(np.float32)
    label, radius = half_planes(x)
    abstained = rng.random(200) < 0.2
    smoothed = certificates(np.where(abstained, np.nan, radius), prediction=label)
    promises = regions.frozen(x, smoothed)
    broken = 0
    for row, promise in enumerate(promises):
        if promise.case is Case.ABSTAINED:
            assert abstained[row]
            assert regions.covering(x[[row]]) == [None]
            continue
        assert answers(regions, x[[row]])[0] == promise.prediction
        angle = rng.uniform(0.0, 2 * np.pi, 60)
        circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        for reach in (1 - 1e-6, 0.7):
            y = (x[row] + promise.radius * reach * circle).astype(np.float32)
            assert set(answers(regions, y).tolist()) == {promise.prediction}
        y = (x[row] + (promise.radius * 1.02 + 1e-3) * circle).astype(np.float32)
        broken += set(answers(regions, y).tolist()) != {promise.prediction}
    assert len(regions) == len(frozen_world(seed))
    cases = {promise.case for promise in promises}
    assert {Case.NEW, Case.TRIMMED, Case.INHERITED, Case.ABSTAINED} <= cases
    assert broken > 0.5 * np.count_nonzero([p.case in (Case.NEW, Case.TRIMMED) for p in promises])   # they are tight


def test_a_frozen_ball_is_larger_where_both_agree_only() -> None:
    regions = CertifiedRegions((1,))
    store(regions, points([0.0]), 0, 1.0)
    store(regions, points([4.0]), 1, 1.0)
    x = points([0.5], [0.5], [0.5], [2.0], [2.0], [0.0])
    smoothed = certificates([2.0, 2.0, np.nan, 0.0, 9.0, 2.0], prediction=[0, 1, 0, 0, 1, 0])
    found = regions.frozen(x, smoothed)
    assert [promise.radius for promise in found] == pytest.approx([2.0, 0.5, 0.5, 0.0, 1.0, 2.0], rel=1e-7)
    assert [promise.record for promise in found] == [0, 0, 0, -1, -1, 0]
    assert [promise.prediction for promise in found] == [0, 0, 0, 0, 1, 0]


# ---------------------------------------------------------------------- alpha


def test_budgets_add_up() -> None:
    endless = EndlessBudget(0.01)
    levels = [endless.level(t) for t in range(1, 2001)]
    assert levels[:2] == pytest.approx([0.06 / np.pi**2, 0.015 / np.pi**2], rel=1e-11)
    assert all(after < before for before, after in pairwise(levels))
    assert sum(levels) < 0.01
    assert endless.spent(2000) == pytest.approx(sum(levels), rel=1e-10)
    assert endless.spent(2000) >= sum(levels)
    assert endless.level(3, 5) == pytest.approx(np.mean(levels[2:7]), rel=1e-11)
    assert 0.0 < endless.level(10**9) < 1e-19
    shared = SharedBudget(0.01, 100)
    assert shared.level(1) == shared.level(41, 60) == pytest.approx(1e-4, rel=1e-11)
    assert shared.spent(40) == pytest.approx(0.004)
    with pytest.raises(ValueError, match="attempts 41 to 101 exceed the budget of 100"):
        shared.level(41, 61)
    for budget in (endless, shared):
        with pytest.raises(ValueError, match="counted from 1"):
            budget.level(0)
        with pytest.raises(ValueError, match="counted from 1"):
            budget.level(1, 0)
    for bad in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            EndlessBudget(bad)
    with pytest.raises(ValueError, match="counted from 1"):
        SharedBudget(0.01, 0)
    with pytest.raises(TypeError, match="attempts must be integers"):
        SharedBudget(0.01, 2.5)   # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [EndlessBudget(0.05), SharedBudget(0.05, 100)])
def test_no_lie_in_a_whole_stream(budget: EndlessBudget | SharedBudget) -> None:
    """Somebody asks about the same input until it is certified; its class is a tie, so every certificate is false."""
    n, attempts, streams = 1000, 100, 4000
    votes = np.random.default_rng(6).binomial(n, 0.5, (streams, attempts))

    def lies(levels: list[float]) -> int:
        bounds = [clopper_pearson_lower(np.arange(n + 1), n, level) > 0.5 for level in levels]
        needed = np.array([np.argmax(bound) for bound in bounds])   # each bound grows with its votes
        return int(np.any(votes >= needed, axis=1).sum())

    fair = lies([budget.level(t) for t in range(1, attempts + 1)])
    assert fair <= allowed(streams, budget.spent(attempts))
    # a stream that counts records, not attempts, tries the first level until it succeeds
    assert lies([EndlessBudget(0.05).level(1)] * attempts) > allowed(streams, 0.05)
    assert binom.sf(allowed(streams, 0.05), streams, 0.9) > 0.999


def test_certificates_of_a_network_settle() -> None:
    """The whole way, from votes to balls: what the memory promises near a plane is the class on that side."""
    import torch

    f = Linear([1.0, 0.0])
    x = points([0.3, 0.0], [-0.2, 0.1], [0.05, 0.0])
    found = certify(f, torch.from_numpy(x), Gaussian(0.5), num_classes=2, n=2000, seed=3)
    regions = CertifiedRegions((2,))
    promises = regions.settle(x, found)
    regions.insert(x, promises)
    for promise, truth, distance in zip(promises, (0, 1, 0), (0.3, 0.2, 0.05), strict=True):
        if promise.case is not Case.ABSTAINED:
            assert promise.prediction == truth
            assert promise.radius <= distance
    assert promises[0].radius > 0.2


@pytest.mark.parametrize("lie", ["nothing is trimmed", "inherited in full", "the last ball answers", "no points"])
def test_a_memory_that_breaks_its_word_is_caught(monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    cover = CertifiedRegions._cover

    def in_full(self, rows, apart):
        found = cover(self, rows, apart)
        return found and replace(found, radius=float(self.radius[found.record]))

    def anything(self, rows, apart):   # without looking whether x lies in it
        return cover(self, rows[-1:], 0.0 * apart[-1:])

    def balls_only(self, rows, apart):   # a radius of 0 is not enforced
        return cover(self, rows[self.radius[rows] > 0.0], apart[self.radius[rows] > 0.0])

    if lie == "nothing is trimmed":
        monkeypatch.setattr(CertifiedRegions, "_room", lambda self, rows, apart, label, limit: limit)
    else:
        lies = {"inherited in full": in_full, "the last ball answers": anything, "no points": balls_only}
        monkeypatch.setattr(CertifiedRegions, "_cover", lies[lie])
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(
            Regions, settings=settings(max_examples=60, stateful_step_count=20, phases=[Phase.generate], database=None)
        )
