"""A sigma for each input: known optima, published goldens, draws of its own, and nothing of the caller's changed."""

import inspect
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from closed_forms import Function, Linear, Strips, allowed
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import betaincinv, ndtr, ndtri
from scipy.stats import beta
from support import digits_network
from torch import nn

from art_rs_plugins.smoothing import noise
from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.noise import Gaussian, Stage
from art_rs_plugins.smoothing.sampling import count_votes
from art_rs_plugins.smoothing.sigma import (
    CertifiableRadius,
    GradientAscent,
    GridAscent,
    MultiStartSearch,
    TopTwoRadius,
)
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import OneSided

RULES = [
    GradientAscent(iterations=30, step=0.02, draws=8),
    GridAscent(votes=100, iterations=5, draws=16, fresh=200),
    MultiStartSearch(draws=100),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


class Cells(nn.Module):
    """Class 0 on some intervals of a line, with probit soft outputs of this slope across each of their ends."""

    def __init__(self, intervals: list[tuple[float, float]], slope: float = 20.0) -> None:
        super().__init__()
        self.intervals = intervals
        self.slope = nn.Parameter(torch.tensor(slope))
        self.eval()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        inside = torch.stack([torch.minimum(z[:, 0] - low, high - z[:, 0]) for low, high in self.intervals])
        margin = self.slope * inside.amax(dim=0)
        return torch.stack([torch.special.log_ndtr(margin), torch.special.log_ndtr(-margin)], dim=1)

    def p(self, sigma):
        return sum(ndtr(high / sigma) - ndtr(low / sigma) for low, high in self.intervals)

    def radius(self, sigma):
        return sigma * ndtri(self.p(sigma))

    def certifiable(self, sigma, n: int = 100_000):
        """Radius of the expected number of votes, which need not be whole."""
        count = n * self.p(sigma)
        return sigma * ndtri(betaincinv(count, n - count + 1, 0.001))


SLAB = Cells([(-0.3, 0.3)])
SPLIT = Cells([(-2.0, 0.3), (0.35, 2.0)])
SPLIT_BEST = 1.519314
ISLANDS = Cells([(-60.0, -3.0), (-1.0, 1.0), (3.0, 60.0)])


def choose(rule, f: nn.Module, b: int, sigma: float, **settings) -> np.ndarray:
    """Sigma of b inputs at 0, which differ by their noise alone."""
    return rule.choose(f, torch.zeros(b, 1), num_classes=2, sigma=sigma, **{"seed": 1} | settings)


def reaches(quality: np.ndarray, share: float = 0.95) -> bool:
    """Whether at least this share of runs could reach 1, at a false-alarm rate of 1e-6."""
    return int((quality < 1.0).sum()) <= allowed(len(quality), 1.0 - share)


# objectives


def test_certifiable_radius_is_that_of_n_votes_like_those_seen() -> None:
    votes = np.array([[50, 49, 0], [99, 1, 0], [100, 0, 0], [0, 100, 0]])
    who, sigma = np.zeros(4, np.int64), np.array([0.5, 0.25, 2.0, 1.0])
    p = np.array([50.5, 99.5, 100.5, 0.5]) / 101
    for n in (100, 1000, 100_000):
        count = np.round(n * p)
        expected = sigma * ndtri(np.where(count > 0, beta.ppf(0.001, count, n - count + 1), 0.0))
        assert CertifiableRadius(n).of_votes(votes, 100, who, sigma) == pytest.approx(expected, rel=1e-6)
    many = CertifiableRadius(10**9).of_votes(votes, 100, who, sigma)
    assert many == pytest.approx(sigma * ndtri(p), abs=2e-3)
    # the largest there is: 3.81 sigma at n = 1e5, 3.20 at 1e4, 2.46 at 1e3
    for n, cap in ((100_000, 3.81), (10_000, 3.20), (1000, 2.46)):
        value = CertifiableRadius(n).of_votes(np.array([[10**7, 0]]), 10**7, who[:1], np.array([1.0]))
        assert value == pytest.approx(ndtri(0.001 ** (1 / n)), rel=1e-9)
        assert value == pytest.approx(cap, abs=0.005)


def test_invalid_votes_count_for_the_rival() -> None:
    votes, who, sigma = np.array([[60, 20], [60, 40]]), np.zeros(2, np.int64), np.ones(2)
    for objective in (CertifiableRadius(), TopTwoRadius()):   # 20 of the first 100 were invalid
        first, second = objective.of_votes(votes, 100, who, sigma)
        assert first == pytest.approx(second)
    mostly = TopTwoRadius().of_votes(np.array([[30, 0]]), 100, who[:1], sigma[:1])
    assert mostly[0] < 0


def test_top_two_radius_follows_whichever_classes_lead() -> None:
    votes = np.array([[10, 60, 30], [60, 30, 10]])
    value = TopTwoRadius().of_votes(votes, 100, np.zeros(2, np.int64), np.array([0.5, 0.5]))
    assert value == pytest.approx(0.25 * (ndtri(60.5 / 101) - ndtri(30.5 / 101)))


@given(
    st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3), st.floats(0.05, 3.0), st.integers(0, 2),
    st.sampled_from([CertifiableRadius(), CertifiableRadius(n=1000), TopTwoRadius(), TopTwoRadius(clamp=0.001)]),
)   # fmt: skip
def test_soft_objectives_agree_with_a_second_implementation(weights, sigma, who, objective) -> None:
    mean = np.array(weights) / np.sum(weights)
    top = np.sort(mean)[::-1]
    if isinstance(objective, TopTwoRadius):
        z = ndtri(np.clip(top[:2], objective.clamp, 1 - objective.clamp))
        expected, loose = sigma / 2 * (z[0] - z[1]), top[:2]
    else:
        limit = min(0.999, 0.001 ** (1 / objective.n))
        expected, loose = sigma * ndtri(np.clip(mean[who], 0.001, limit)), mean[[who]]
    soft = torch.tensor(mean[None], requires_grad=True)
    scale = torch.tensor([sigma], dtype=torch.float64, requires_grad=True)
    value = objective.of_outputs(soft, torch.tensor([who]), scale)
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    by_mean, by_sigma = torch.autograd.grad(value.sum(), (soft, scale))
    assert by_sigma.item() == pytest.approx(expected / sigma, rel=1e-6, abs=1e-9)   # linear in sigma
    assert int((by_mean != 0).sum()) <= len(loose)


# the published ascent


def test_slope_of_the_probit_base_is_its_closed_form() -> None:
    # R(s) = s m b / sqrt(1 + b^2 s^2), so R'(s) = m b (1 + b^2 s^2)^(-3/2); b = 2, m = s = 1/2
    f = Function(lambda z: torch.cat([torch.special.log_ndtr(2 * z), torch.special.log_ndtr(-2 * z)], dim=1))
    rule = GradientAscent(iterations=1, step=1.0, draws=20_000)
    x = torch.full((64, 1), 0.5)
    slope = rule.choose(f, x, num_classes=2, sigma=0.5, seed=0) - 0.5
    error = slope.std() / 8
    assert error < 2e-3
    assert abs(slope.mean() - 0.353553) < 4 * error
    assert abs(slope.mean() - 0.353553 * 1.03) > 4 * error   # and would see 3 %


def test_saturated_ascent_drifts_by_a_constant_whatever_the_radius() -> None:
    certain = Function(lambda z: torch.cat([z * 0 + 20, z * 0 - 20], dim=1))
    assert choose(GradientAscent(), certain, 2, 0.25, block=16) == pytest.approx(0.43484, abs=1e-5)
    bounded = GradientAscent(iterations=5, step=0.01, bounds=(0.1, 0.3))
    assert choose(bounded, certain, 2, 0.25).tolist() == [0.3, 0.3]


def test_a_single_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="draws must be at least 2: a single one names its own winner"):
        GradientAscent(draws=1)


# quality, against optima that are known


def test_known_radii_of_the_bases() -> None:
    assert SPLIT.radius(np.array([0.25, 0.5])) == pytest.approx([0.4552, 0.9236], abs=5e-5)
    found = minimize_scalar(lambda s: -SPLIT.radius(s), bounds=(0.5, 2.0), method="bounded", options={"xatol": 1e-9})
    assert (found.x, -found.fun) == pytest.approx((0.980435, SPLIT_BEST), abs=2e-6)
    assert SPLIT.radius(np.array([0.8, 1.1, 1.25])) / SPLIT_BEST == pytest.approx([0.952, 0.987, 0.946], abs=6e-4)
    sigmas = np.array([0.02, 0.05, 0.0898, 0.10, 0.20])
    assert SLAB.certifiable(sigmas) == pytest.approx([0.0762, 0.1906, 0.27356, 0.2722, 0.2188], abs=6e-5)
    assert ISLANDS.radius(np.array([0.25, 1, 2, 3, 5])) == pytest.approx([0.958, 0.483, 0.083, 0.594, 2.724], abs=6e-4)


@pytest.mark.parametrize("slope", [20.0, 100.0])
def test_grid_ascent_finds_the_larger_of_two_maxima(slope: float) -> None:
    f = Cells(SPLIT.intervals, slope)
    quality = f.radius(choose(GridAscent(bounds=(0.05, 4.0)), f, 100, 0.25, block=5000)) / (0.93 * SPLIT_BEST)
    assert reaches(quality)
    assert np.median(quality) > 0.97 / 0.93


def test_the_published_ascent_does_not() -> None:
    sigma = choose(GradientAscent(), SPLIT, 60, 0.25, block=480)
    assert np.median(sigma) == pytest.approx(0.41, abs=0.01)
    assert np.median(SPLIT.radius(sigma)) == pytest.approx(0.73, abs=0.02)
    assert not reaches(SPLIT.radius(sigma) / (0.93 * SPLIT_BEST))


@dataclass(frozen=True)
class Exact:
    """What a search would maximise if it knew p_A and forgot that n is finite."""

    f: Cells

    def of_votes(self, votes, draws, prediction, sigma):
        return self.f.radius(sigma)

    def of_outputs(self, mean, prediction, sigma):
        return -sigma


def test_the_cap_keeps_a_search_from_sigmas_that_no_votes_could_show() -> None:
    for rule in (GridAscent(), MultiStartSearch(starts=(0.1, 0.4), draws=1000, bounds=(0.02, 2.0))):
        quality = SLAB.certifiable(choose(rule, SLAB, 60, 0.1, block=5000)) / (0.95 * 0.27356)
        assert reaches(quality)
        assert np.median(quality) > 0.98 / 0.95
        blind = choose(replace(rule, objective=Exact(SLAB)), SLAB, 20, 0.1)
        assert not reaches(SLAB.certifiable(blind) / (0.95 * 0.27356))


def test_fewer_votes_to_come_ask_for_a_larger_sigma() -> None:
    rules = [GridAscent(objective=CertifiableRadius(n), bounds=(0.02, 2.0)) for n in (100, 100_000)]
    few, many = (np.median(choose(rule, SLAB, 40, 0.1, block=5000)) for rule in rules)
    assert SLAB.certifiable(few, 100) > 1.05 * SLAB.certifiable(many, 100)
    assert SLAB.certifiable(many) > 1.05 * SLAB.certifiable(few)
    assert SLAB.certifiable(few, 100) > 0.97 * 0.1601   # the best there is for 100 votes


def test_several_starts_cross_a_valley_that_one_does_not() -> None:
    for objective in (CertifiableRadius(), TopTwoRadius()):
        rule = MultiStartSearch(starts=(0.25, 3.0), bounds=(0.05, 5.0), draws=1000, objective=objective)
        found = rule.search(ISLANDS, torch.zeros(30, 1), num_classes=2, sigma=0.25, seed=1, block=5000)
        assert np.mean(found.sigma > 4.99) > 0.9
        assert np.nanmax(found.value, axis=1).mean() == pytest.approx(2.724, abs=0.15)
        alone = replace(rule, starts=(0.25,)).search(ISLANDS, torch.zeros(30, 1), num_classes=2, sigma=0.25, seed=1)
        assert alone.sigma.max() < 1.0
        assert ISLANDS.radius(alone.sigma).max() < 1.0


def test_a_search_reports_what_it_tried() -> None:
    rule = MultiStartSearch(starts=(0.3, 2.0), bounds=(0.05, 5.0), draws=100)
    x = torch.zeros(7, 1)
    found = rule.search(SPLIT, x, num_classes=2, sigma=0.25, seed=1)
    assert np.array_equal(found.sigma, rule.choose(SPLIT, x, num_classes=2, sigma=0.25, seed=1))
    assert found.tried.shape == found.value.shape
    assert np.array_equal(np.isnan(found.tried), np.isnan(found.value))
    assert (found.tried[:, 0] == 0.25).all()
    counts = (~np.isnan(found.tried)).sum(axis=1)
    assert counts.max() <= 1 + 2 * rule.evaluations
    best = np.nanargmax(found.value, axis=1)
    assert np.array_equal(found.tried[np.arange(7), best], found.sigma)
    # each value is that of votes counted anew, with the same draws
    for row, column in ((0, 0), (3, 1), (6, int(best[6]))):
        at = found.tried[row, column]
        votes = count_votes(SPLIT, x[:1], Gaussian(at), 100, num_classes=2, seed=1, indices=[row], stage=Stage.SEARCH)
        anew = rule.objective.of_votes(votes.numpy(), 100, np.array([0]), np.array([at]))
        assert found.value[row, column] == anew[0]


@dataclass(frozen=True)
class Flat:
    """Every sigma is as good as any other."""

    def of_votes(self, votes, draws, prediction, sigma):
        return np.zeros(len(sigma))

    def of_outputs(self, mean, prediction, sigma):
        return 0.0 * sigma


def test_a_flat_objective_ends_the_search_at_the_smallest_sigma_tried() -> None:
    found = MultiStartSearch(draws=10, objective=Flat()).search(
        SPLIT, torch.zeros(3, 1), num_classes=2, sigma=0.25, seed=1
    )
    assert np.array_equal(found.sigma, np.nanmin(found.tried, axis=1))
    assert (~np.isnan(found.tried)).sum(axis=1).max() <= 61
    assert choose(GridAscent(votes=10, fresh=10, objective=Flat()), SPLIT, 3, 0.25).tolist() == [0.0625] * 3


@each_rule
def test_searches_on_a_linear_base_end_within_their_bounds(rule) -> None:
    rule = replace(rule, bounds=(0.1, 1.2))
    sigma = choose(rule, Linear([1.0], b=0.5), 50, 0.5)
    assert ((sigma >= 0.1) & (sigma <= 1.2)).all()
    for s in np.geomspace(0.05, 5.0, 9):   # whatever they chose: the radius is the distance
        tail = ndtr(-0.5 / s)
        assert gaussian_radius(tail, tail, s) == pytest.approx(0.5, abs=1e-9)


# certificates at a chosen sigma


def fresh_certificates(sigma: np.ndarray, x: torch.Tensor, f: nn.Module):
    return certify(f, x, Gaussian(sigma), num_classes=2, n=1000, n0=10, rule=OneSided(0.05), seed=1, block=20_000)


@pytest.mark.slow
def test_radii_at_chosen_sigmas_keep_alpha_and_a_choice_by_the_same_draws_does_not() -> None:
    f, b = Linear([1.0], b=0.5), 1500
    x = torch.zeros(b, 1)
    limit = allowed(b, 0.05)
    for rule in (GridAscent(votes=100, iterations=3, draws=16, fresh=500), MultiStartSearch(draws=100)):
        chosen = choose(rule, f, b, 0.5, block=20_000)
        assert (fresh_certificates(chosen, x, f).radius > 0.5).sum() <= limit
    # control: the best of 20 sigmas by the very draws that certify
    sigmas = np.geomspace(0.15, 1.5, 20)
    radii = np.stack([fresh_certificates(np.full(b, s), x, f).radius for s in sigmas])
    assert (radii[10] > 0.5).sum() <= limit
    assert (radii.max(axis=0) > 0.5).sum() > limit


@each_rule
def test_search_draws_meet_no_other_draws(rule, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[noise.Key] = []
    original = noise.philox
    monkeypatch.setattr(noise, "philox", lambda key: seen.append(key) or original(key))
    x = torch.zeros(3, 1)

    def keys(action) -> set[noise.Key]:
        seen.clear()
        action()
        return {key for key in seen if key.stage != Stage.BANK}   # the probes of check_network

    searched = keys(lambda: choose(rule, SPLIT, 3, 0.25, seed=5))
    certified = keys(lambda: certify(SPLIT, x, Gaussian(0.25), num_classes=2, n=1000, seed=5))
    assert {key.stage for key in searched} == {Stage.SEARCH}
    assert {key.stage for key in certified} == {Stage.SELECTION, Stage.ESTIMATION}
    assert not searched & certified


@each_rule
def test_certificates_at_a_pinned_sigma_ignore_the_seed_of_the_search(rule) -> None:
    x, pinned = torch.zeros(4, 1), choose(rule, SPLIT, 4, 0.25, seed=5)
    first = certify(SPLIT, x, Gaussian(pinned), num_classes=2, n=500, seed=5)
    assert not np.array_equal(choose(rule, SPLIT, 4, 0.25, seed=6), pinned)
    again = certify(SPLIT, x, Gaussian(pinned), num_classes=2, n=500, seed=5)
    assert np.array_equal(first.count, again.count)
    assert np.array_equal(first.radius, again.radius)


# what a rule may not see, and may not change


@each_rule
def test_labels_have_no_way_in(rule) -> None:
    names = set(inspect.signature(rule.choose).parameters)
    assert names == {"f", "x", "num_classes", "sigma", "seed", "indices", "block"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        choose(rule, SPLIT, 2, 0.25, y=torch.zeros(2))


@each_rule
def test_the_network_and_the_inputs_stay_as_they_were(rule) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        f = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    f[0].bias.requires_grad_(False)
    f[4].weight.grad = torch.full_like(f[4].weight, 7.0)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in f.state_dict().items()}, x.clone()
    flags = [(p.requires_grad, p.grad is None) for p in f.parameters()]
    with torch.no_grad():   # as callers do; the soft slopes are found all the same
        sigma = rule.choose(f, x, num_classes=10, sigma=0.25, seed=0)
        assert not torch.is_grad_enabled()
    assert sigma.dtype == np.float64
    assert np.array_equal(sigma, rule.choose(f, x, num_classes=10, sigma=0.25, seed=0))
    assert all(torch.equal(value, before[0][name]) for name, value in f.state_dict().items())
    assert [(p.requires_grad, p.grad is None) for p in f.parameters()] == flags
    assert (f[4].weight.grad == 7.0).all()
    assert not any(module.training for module in f.modules())
    assert torch.equal(x, before[1])
    assert not x.requires_grad
    f[1].train()
    with pytest.raises(ValueError, match="f is in training mode"):
        rule.choose(f, x, num_classes=10, sigma=0.25, seed=0)


@each_rule
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_without_finite_outputs_gets_a_sigma_within_reach(rule, value: float) -> None:
    always = choose(rule, Function(lambda z: torch.full((len(z), 2), value) * (1 + 0 * z)), 3, 0.25)
    assert np.isfinite(always).all()
    assert (always > 0).all()
    partly = Function(lambda z: torch.where(z > 0.5, value, SPLIT(z)))
    sigma = choose(rule, partly, 3, 0.25)
    assert ((sigma > 0) & (sigma < 5)).all()


@each_rule
def test_a_hard_network_can_be_searched(rule) -> None:
    f = Strips([-2.0, 2.0], [1, 0, 1], [1.0])
    sigma = choose(rule, f, 3, 0.5)
    assert (sigma > 0).all()


# independence of grouping


@each_rule
def test_same_bits_in_any_company_order_and_layout(rule) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 1)).astype(np.float32) * 0.2
    x = torch.from_numpy(rows)

    def run(picked) -> np.ndarray:
        return rule.choose(SPLIT, x[picked], num_classes=2, sigma=0.25, seed=3, indices=picked)

    whole = run(np.arange(9))
    assert np.unique(whole).size > 1
    assert np.array_equal(whole, run(np.arange(9)))
    assert np.array_equal(np.concatenate([run(np.array([i])) for i in range(9)]), whole)
    order = np.array([4, 0, 8, 2])
    assert np.array_equal(run(order), whole[order])


@each_rule
def test_a_convolutional_network_agrees_in_any_company(rule) -> None:
    # soft slopes move with the rounding of another place in the batch; hard votes do not
    f = digits_network().eval()
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(picked) -> np.ndarray:
        return rule.choose(f, x[picked], num_classes=10, sigma=0.25, seed=3, indices=picked)

    whole, single = run(np.arange(5)), np.concatenate([run(np.array([i])) for i in range(5)])
    if isinstance(rule, MultiStartSearch):
        assert np.array_equal(whole, single)
    assert whole == pytest.approx(single, rel=1e-5)


def test_seed_none_is_fresh_and_recorded_by_nobody() -> None:
    rule = RULES[1]
    assert not np.array_equal(choose(rule, SPLIT, 5, 0.25, seed=None), choose(rule, SPLIT, 5, 0.25, seed=None))


# cost


@each_rule
def test_cost_counts_forward_equivalents(rule) -> None:
    rows = {False: 0, True: 0}

    def f(z: torch.Tensor) -> torch.Tensor:
        rows[torch.is_grad_enabled()] += len(z)
        return SPLIT(z)

    rule.choose(f, torch.zeros(12, 1), num_classes=2, sigma=0.25, seed=0, block=100)   # every pass is full
    spent = rows[False] - 3 * 4 + 3 * rows[True]   # less the probes of check_network
    if isinstance(rule, MultiStartSearch):
        assert 0.5 * rule.cost * 12 < spent <= rule.cost * 12
    else:
        assert spent == rule.cost * 12


def test_costs_of_the_defaults() -> None:
    assert GradientAscent().cost == 21_600
    assert GridAscent().cost == 12_480
    assert MultiStartSearch().cost == 12_200


# arguments


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GradientAscent(iterations=0), "iterations must be at least 1, got 0"),
        (lambda: GradientAscent(step=-1.0), "step must be finite and > 0"),
        (lambda: GradientAscent(bounds=(0.5, 0.1)), r"bounds must be \(smallest, largest\) sigma, got \(0.5, 0.1\)"),
        (lambda: GridAscent(draws=7), "draws must be even"),
        (lambda: GridAscent(points=0), "points must be at least 1"),
        (lambda: GridAscent(rate=0.0), "rate must be finite and > 0"),
        (lambda: GridAscent(bounds=(0.0, 1.0)), "bounds must be finite and > 0"),
        (lambda: MultiStartSearch(starts=()), "starts must be finite and > 0"),
        (lambda: MultiStartSearch(starts=(0.1, -0.2)), "starts must be finite and > 0"),
        (lambda: MultiStartSearch(evaluations=0), "evaluations must be at least 1"),
        (lambda: CertifiableRadius(n=0), "n must be at least 1"),
        (lambda: CertifiableRadius(alpha=1.0), "alpha must lie strictly between 0 and 1"),
        (lambda: TopTwoRadius(clamp=0.5), "clamp must lie strictly between 0 and 1/2"),
        (lambda: choose(MultiStartSearch(), SPLIT, 2, 2.0), "must contain the training sigma, 2.0.*widen them"),
        (lambda: choose(GridAscent(), SPLIT, 2, -0.5), "sigma must be finite and > 0"),
        (lambda: choose(GradientAscent(), SPLIT, 2, float("nan")), "sigma must be finite and > 0"),
        (lambda: choose(GridAscent(), SPLIT, 2, 0.5, indices=[3, 3]), "indices must be distinct"),
        (lambda: choose(GridAscent(), SPLIT, 2, 0.5, seed=-1), "seed must lie in"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
