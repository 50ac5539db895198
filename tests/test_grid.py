"""Noise on the grid of 8-bit inputs: exact cell masses, and nothing of x but its integers reaches the network."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import chi2

from art_rs_plugins.smoothing import grid
from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import OneSided

KEY = Key(1234, 5, Stage.ESTIMATION, 6)


def copies_of(noise: GridGaussian, x: torch.Tensor, sigma: float, rows: int, key: Key) -> torch.Tensor:
    """Noisy copies (rows, ...) of one input."""
    return noise.draw(x[None], np.array([sigma]), rows, [key])

N = 4_000_000
CPU = torch.device("cpu")


def exact_thresholds(sigma: float) -> list[mpmath.mpf]:
    """P(noise < j) for j = 1 - top, ..., top, at 40 digits."""
    top = grid._cells(sigma).top
    with mpmath.workdps(40):
        return [mpmath.ncdf((j - mpmath.mpf(0.5)) / (255 * mpmath.mpf(sigma))) for j in range(1 - top, top + 1)]


def total_variation(thresholds: np.ndarray, bits: int, exact: list[mpmath.mpf]) -> float:
    """Distance between the law of `thresholds` / 2**bits and the exact one."""
    with mpmath.workdps(40):
        ours = [mpmath.mpf(0), *(mpmath.mpf(int(t)) / 2**bits for t in thresholds), mpmath.mpf(1)]
        truth = [mpmath.mpf(0), *exact, mpmath.mpf(1)]
        masses = zip(np.diff(ours), np.diff(truth), strict=True)
        return float(sum(abs(a - b) for a, b in masses) / 2)


def p_value(noise: np.ndarray, sigma: float, *, shift: float = 0.0) -> float:
    """Chi-square test of integers against the rounded N(shift, (255 sigma)**2), cells of at least 20 expected."""
    edges = np.arange(-3000, 3001) - 0.5
    masses = len(noise) * np.diff(ndtr((edges - shift) / (255 * sigma)))
    cuts = [0]
    for i in range(len(masses)):
        if masses[cuts[-1] : i + 1].sum() >= 20:
            cuts.append(i + 1)
    expected = np.add.reduceat(masses, cuts[:-1])
    seen = np.add.reduceat(np.bincount(noise.astype(np.int64) + 3000, minlength=len(masses))[: len(masses)], cuts[:-1])
    return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), len(expected) - 1))


@pytest.mark.parametrize("sigma", [1e-3, 0.12, 0.5, 1.0])
def test_cell_masses_are_those_of_the_normal_law_at_40_digits(sigma: float) -> None:
    cells, exact = grid._cells(sigma), exact_thresholds(sigma)
    assert len(cells.thresholds) == len(exact) == 2 * cells.top
    assert np.all(np.diff(cells.thresholds) >= 0)
    with mpmath.workdps(40):
        worst = max(abs(mpmath.mpf(int(t)) / 2**62 - p) for t, p in zip(cells.thresholds, exact, strict=True))
        assert worst <= mpmath.mpf(2) ** -63 + mpmath.mpf("1e-38")   # 40 digits
    distance = total_variation(cells.thresholds, 62, exact)
    assert distance <= GridGaussian(sigma).alpha_slack(1, 1) / 2


def test_why_thresholds_need_more_than_32_bits_or_float64() -> None:
    sigma, n, numel = 0.5, 100_000, 3072
    exact = exact_thresholds(sigma)
    slack = GridGaussian(sigma).alpha_slack(n, numel)
    assert slack == pytest.approx(1.4e-7, rel=0.05)
    assert total_variation(grid._cells(sigma).thresholds, 62, exact) * n * numel < slack / 4
    coarse = np.round(grid._cells(sigma).thresholds / 2**30)
    assert total_variation(coarse, 32, exact) * n * numel > 10
    top = grid._cells(sigma).top
    careless = [int(float(p) * 2**62) for p in ndtr((np.arange(1 - top, top + 1) - 0.5) / (255 * sigma))]
    assert total_variation(np.array(careless), 62, exact) > 30 * total_variation(
        grid._cells(sigma).thresholds, 62, exact
    )


def test_level_pays_for_the_distance() -> None:
    noise = GridGaussian([0.25, 0.5])
    assert noise.level(0.001, 100_000, 3072) == 0.001 - GridGaussian(0.5).alpha_slack(100_000, 3072)
    assert noise.alpha_slack(100_000, 3072) == 100_000 * 3072 * 2041 * 2.0**-62
    with pytest.raises(ValueError, match=r"alpha = 1e-08 is used up by the finite bits of n = 100000 draws of 3072"):
        noise.level(1e-8, 100_000, 3072)


@pytest.mark.parametrize("sigma", [0.01, 0.25, 0.5])
def test_law_by_chi_square_and_wrong_laws_are_caught(sigma: float) -> None:
    noise = grid._draw_by_lookup(sigma, N, KEY)
    assert p_value(noise, sigma) > 1e-6
    for wrong in (0.99, 1.01):
        assert p_value(noise, wrong * sigma) < 1e-6
    assert p_value(noise, sigma, shift=0.02 * 255 * sigma) < 1e-6
    # each of the four places in a word of the generator
    for place in range(4):
        assert p_value(noise[place::4], sigma) > 1e-6


def test_law_of_the_search_on_devices() -> None:
    noise = grid._draw_by_search(0.5, N, KEY, CPU).numpy()
    assert p_value(noise, 0.5) > 1e-6
    for wrong in (0.99, 1.01):
        assert p_value(noise, 0.5 * wrong) < 1e-6


def test_copies_are_the_same_from_either_kind_of_draw(monkeypatch) -> None:
    monkeypatch.setattr(grid, "_draw_by_lookup", lambda *wanted: grid._draw_by_search(*wanted, CPU).numpy())
    copies = copies_of(GridGaussian(0.5), torch.full((3, 5), 0.2), 0.5, 7, KEY)   # draws of int32, not int16
    sums = grid._draw_by_search(0.5, 105, KEY, CPU).view(7, 3, 5) + 51
    assert np.array_equal(copies.numpy(), sums.numpy().astype(np.float32) / np.float32(255))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    assert p_value(grid._draw_by_search(0.5, N, KEY, torch.device("cuda")).cpu().numpy(), 0.5) > 1e-6
    x = torch.arange(256).float() / 255
    copies = copies_of(GridGaussian(0.5), x.cuda(), 0.5, 100, KEY)
    assert copies.device.type == "cuda"
    assert torch.isin(copies.cpu(), torch.from_numpy(grid._cells(0.5).values)).all()


def test_neighbours_are_uncorrelated() -> None:
    z = grid._draw_by_lookup(0.5, N, KEY) / (255 * 0.5)
    for lag in (1, 2, 3, 4, N // 2):
        a, b = z[:-lag], z[lag:]
        for left, right in ((a, b), (a**2 - 1, b**2 - 1), (a, b**2 - 1)):
            scale = math.sqrt(np.mean(left**2) * np.mean(right**2) / len(a))
            assert abs(np.mean(left * right)) < 5 * scale


class Scripted:
    """Stands in for Philox: the leading 16 bits of given draws first, then 46 bits for those that are still open."""

    draws = np.zeros(0, dtype=np.int64)
    sigma = 0.5

    def __init__(self, *, key: np.ndarray, counter: np.ndarray) -> None:
        self.calls = 0

    def random_raw(self, n: int) -> np.ndarray:
        self.calls += 1
        heads = (self.draws >> 46).astype(np.uint16)
        if self.calls == 1:
            return np.concatenate([heads, np.zeros(-len(heads) % 4, np.uint16)]).view(np.uint64)
        open_ = grid._cells(self.sigma).lookup[heads] == grid._AMBIGUOUS
        assert n == open_.sum()
        junk = np.uint64(0x3FFFF)   # 18 bits that are not used
        return (self.draws[open_] & (2**46 - 1)).astype(np.uint64) << np.uint64(18) | junk


@pytest.mark.parametrize("sigma", [1e-3, 0.12, 0.5, 25.0])
def test_lookup_and_refinement_are_the_search_through_all_62_bits(monkeypatch, sigma: float) -> None:
    cells = grid._cells(sigma)
    heads = np.arange(2**16, dtype=np.int64) << 46
    near = np.concatenate([cells.thresholds + step for step in (-1, 0, 1)])
    draws = np.concatenate([heads, heads + (2**46 - 1), near[(near >= 0) & (near < 2**62)]])
    monkeypatch.setattr(grid.np.random, "Philox", Scripted)
    monkeypatch.setattr(Scripted, "draws", draws)
    monkeypatch.setattr(Scripted, "sigma", sigma)
    noise = grid._draw_by_lookup(sigma, len(draws), KEY)
    assert np.array_equal(noise, np.searchsorted(cells.thresholds, draws, side="right") - cells.top)
    assert noise.min() >= -cells.top
    assert noise.max() <= cells.top

    def scripted(self: torch.Tensor, low: int, high: int, *, generator: torch.Generator) -> torch.Tensor:
        assert (low, high) == (0, 2**62)
        return self.copy_(torch.from_numpy(draws))

    monkeypatch.setattr(torch.Tensor, "random_", scripted)
    assert np.array_equal(grid._draw_by_search(sigma, len(draws), KEY, CPU).numpy(), noise)


def test_table_is_correctly_rounded() -> None:
    for sigma in (1e-3, 0.5, 25.0):
        cells = grid._cells(sigma)
        for i, value in zip(range(-cells.clip, 256 + cells.clip), cells.values, strict=True):
            if i % 7 == 0 or i < 300:
                assert abs(Fraction(float(value)) - Fraction(i, 255)) <= Fraction(float(np.spacing(abs(value)))) / 2
    assert np.array_equal(grid._cells(0.5).values[765:1021], np.arange(256, dtype=np.float32) / np.float32(255))


def images_of_sums(largest: int) -> tuple[int, int, int]:
    """Sums k + j, those with more than one image under addition in float32, and the most images of any."""
    seen: dict[int, set[float]] = {}
    k = (np.arange(256) / 255).astype(np.float32)
    for j in range(-largest, largest + 1):
        for level, value in enumerate((k + np.float32(j / 255)).tolist()):
            seen.setdefault(level + j, set()).add(value)
    return len(seen), sum(len(images) > 1 for images in seen.values()), max(map(len, seen.values()))


def test_integers_are_added_before_they_are_converted() -> None:
    assert images_of_sums(600) == (1456, 1195, 9)   # what addition in floats would show the network
    x = torch.arange(256).float() / 255
    copies = copies_of(GridGaussian(0.5), x, 0.5, 4000, KEY)
    noise = torch.from_numpy(grid._draw_by_lookup(0.5, copies.numel(), KEY)).view(copies.shape).long()
    sums = (noise + torch.arange(256)).clamp(-765, 255 + 765)
    images = torch.unique(torch.stack([sums.double(), copies.double()]).flatten(1), dim=1)
    assert len(torch.unique(sums)) == images.shape[1]   # one image for each sum
    assert np.array_equal(copies.numpy(), sums.numpy().astype(np.float32) / np.float32(255))


def test_only_the_integers_of_x_reach_the_network() -> None:
    k = torch.arange(256).float()
    noise = GridGaussian(0.5)
    expected = copies_of(noise, k / 255, 0.5, 3, KEY)
    for x in (k * torch.tensor(1 / 255), (k / 255).nextafter(torch.tensor(2.0)), k.double() / 255, k / 255 - 3e-7):
        noise.check(x)
        assert torch.equal(copies_of(noise, x, 0.5, 3, KEY), expected)
    refused = torch.where(k == 0, -0.3, torch.where(k == 255, 1.7, (k + 0.4) / 255))
    assert torch.equal(copies_of(noise, refused, 0.5, 3, KEY), expected)   # though `check` would refuse


def leaky(v: torch.Tensor) -> torch.Tensor:
    """Class 0 where (v - 0.8) + 0.8 == v in float32, which rounding makes true of 0.8 + noise."""
    v = v.flatten()
    centre = torch.tensor(0.8)
    hit = ((v - centre) + centre == v).float()
    return torch.stack([hit, 1 - hit], dim=1)


def test_counterexample_of_float_addition_is_not_certified_beyond_its_true_radius() -> None:
    sigma, n = 1 / 3, 100_000
    x = torch.tensor([[204 / 255], [0.0]])
    false = certify(leaky, x, Gaussian(sigma), num_classes=2, n=n, seed=7)
    assert false.count[0] == n
    assert false.radius[0] == pytest.approx(1.270, abs=1e-3)
    # yet 0.8 away, where a certificate of 1.27 promises class 0, class 1 is more probable
    assert false.prediction[1] == 1
    assert 1 - false.count[1] / n == pytest.approx(0.398, abs=0.01)
    noise = GridGaussian(sigma)
    exact = certify(leaky, x, noise, num_classes=2, n=n, seed=7)
    assert exact.kind == "exact"
    # the exact probabilities of class 0 on the grid, from the cells alone, and the votes agree with them
    cells = grid._cells(sigma)
    masses = np.diff([0, *cells.thresholds.astype(float) / 2**62, 1])
    votes = leaky(torch.from_numpy(cells.values)).argmax(1).numpy() == 0
    for row, level in enumerate((204, 0)):
        seen = np.clip(np.arange(-cells.top, cells.top + 1) + level, -cells.clip, 255 + cells.clip) + cells.clip
        p = masses[votes[seen]].sum()
        share = exact.count[row] / n if exact.prediction[row] == 0 else 1 - exact.count[row] / n
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)
        assert p == pytest.approx((0.932, 0.222)[row], abs=1e-3)
    assert 0 < exact.radius[0] < 0.8
    assert exact.prediction[0] == 0


def test_certificates_pay_for_the_bits() -> None:
    def constant(v: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(v), 2)

    certificate = certify(
        constant, torch.zeros(1, 1), GridGaussian(0.5), num_classes=2, n=1000, seed=0, rule=OneSided(1e-12)
    )
    left = GridGaussian(0.5).level(1e-12, 1000, 1)
    assert left < 0.9999 * 1e-12
    assert certificate.alpha.tolist() == [1e-12]
    assert certificate.p_lower[0] == pytest.approx(left ** (1 / 1000), rel=1e-9)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (0.5, r"1 of its 3 numbers do not; the first is 0\.5 = 127\.5 / 255.*round inputs to 8 bits"),
        (float(np.float32(1 / 255 + 5e-7)), "must lie on the grid k / 255"),
        (-1 / 255, r"must lie in \[0, 1\].* got values from -0\.00392157 to 0\.2"),
        (255.0, r"must lie in \[0, 1\].* divide 8-bit inputs by 255"),
        (float("nan"), "must be finite"),
        (float("inf"), "must be finite"),
    ],
)
def test_inputs_off_the_grid_are_refused_with_the_reason(bad: float, reason: str) -> None:
    x = torch.tensor([[0.0, 0.2, bad]])
    with pytest.raises(ValueError, match=reason):
        GridGaussian(0.5).check(x)
    with pytest.raises(ValueError, match=reason):
        certify(leaky, x, GridGaussian(0.5), num_classes=2, n=10)


def test_grids_of_other_widths_and_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be floating point, k / 255 for 8-bit inputs, got torch\.uint8"):
        GridGaussian(0.5).check(torch.zeros(1, 3, dtype=torch.uint8))
    for dtype in (torch.float16, torch.bfloat16):   # their k / 255 is not close enough to name k
        with pytest.raises(ValueError, match="on the grid"):
            GridGaussian(0.5).check((torch.arange(256) / 255).to(dtype))


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 25.0])
def test_clip_ends(monkeypatch, sigma: float) -> None:
    cells = grid._cells(sigma)
    assert cells.clip >= min(6 * 255 * sigma, 32_000)
    assert cells.top == 255 + cells.clip
    monkeypatch.setattr(grid, "_draw_by_lookup", lambda _, size, key: np.full(size, key.seed * cells.top, np.int16))
    x = torch.tensor([0.0, 1.0])
    for sign, end in ((1, 255 + cells.clip), (-1, -cells.clip)):
        for inputs in (x, x[0]):   # one number each must not narrow the integers
            copies = copies_of(GridGaussian(sigma), inputs, sigma, 2, Key(sign, 0, Stage.ESTIMATION, 0))
            assert copies.unique().tolist() == [np.float32(end) / np.float32(255)]


def test_each_input_has_its_sigma_and_its_key() -> None:
    noise = GridGaussian([0.1, 0.5])
    assert noise.for_inputs(2).tolist() == [0.1, 0.5]
    with pytest.raises(ValueError, match="sigma has length 2, but there are 3 inputs"):
        noise.for_inputs(3)
    with pytest.raises(ValueError, match="sigma must be finite and > 0"):
        GridGaussian([0.5, 0.0])
    x = torch.full((2, 3, 4, 5), 0.2)
    keys = [KEY, Key(1234, 6, Stage.ESTIMATION, 6)]
    copies = noise.draw(x, noise.for_inputs(2), 7, keys)
    assert copies.shape == (14, 3, 4, 5)
    assert copies.dtype == torch.float32
    for row, (scale, key) in enumerate(zip((0.1, 0.5), keys, strict=True)):
        assert torch.equal(copies[7 * row : 7 * row + 7], copies_of(noise, x[row], scale, 7, key))
    spread = noise.draw(torch.full((2, 10_000), 0.2), noise.for_inputs(2), 10, keys).view(2, -1).std(1)
    assert spread.tolist() == pytest.approx([0.1, 0.5], rel=0.02)


def test_channels_last_inputs_give_channels_last_copies_of_the_same_law() -> None:
    x = (torch.arange(2 * 3 * 4 * 5).float().view(2, 3, 4, 5) / 255).contiguous(memory_format=torch.channels_last)
    keys = [KEY, Key(1234, 6, Stage.ESTIMATION, 6)]
    sigma = np.array([1e-5, 1e-5])   # no noise: the cell of 0 has all of the mass
    copies = GridGaussian(1e-5).draw(x, sigma, 7, keys)
    assert copies.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copies, x.repeat_interleave(7, 0))


def test_radius_and_probability_are_those_of_the_gaussian() -> None:
    noise = GridGaussian([0.5, 2.0])
    assert noise.norm == 2.0
    assert np.array_equal(noise.radius([0.1, 0.2], [0.1, 0.1]), gaussian_radius([0.1, 0.2], [0.1, 0.1], [0.5, 2.0]))
    assert noise.probability(0.5).tolist() == Gaussian([0.5, 2.0]).probability(0.5).tolist()


@pytest.mark.parametrize(
    "draw", [grid._draw_by_lookup, lambda *wanted: grid._draw_by_search(*wanted, CPU).numpy()], ids=["lookup", "search"]
)
def test_same_key_same_bits_and_other_keys_others(draw) -> None:
    n, words = 100_003, (KEY.seed, KEY.index, KEY.stage, KEY.chunk)
    first = draw(0.5, n, KEY)
    assert np.array_equal(first, draw(0.5, n, KEY))
    for i, word in enumerate((1235, 6, Stage.SELECTION, 7)):
        other = draw(0.5, n, Key(*words[:i], word, *words[i + 1 :]))
        assert np.mean(first == other) < 0.005   # 0.0022 by chance
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / math.sqrt(n)


def test_distinct_keys_are_disjoint_parts_of_the_stream(monkeypatch) -> None:
    seen = []
    philox = np.random.Philox

    def record(*, key: np.ndarray, counter: np.ndarray) -> np.random.Philox:
        seen.append((*key.tolist(), *counter.tolist()))
        return philox(key=key, counter=counter)

    monkeypatch.setattr(grid.np.random, "Philox", record)
    grid._draw_by_lookup(0.5, 10, Key(2**63 - 1, 2, Stage.PREDICTION, 3))
    # the seed is the key; Philox counts up in its first word, so that other words meet after 2**64 blocks of draws
    assert seen == [(2**63 - 1, 0, 0, 3, 2, int(Stage.PREDICTION))]


def test_global_seeds_are_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = grid._draw_by_search(0.5, 10, KEY, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(first, grid._draw_by_search(0.5, 10, KEY, CPU))
