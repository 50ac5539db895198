"""Noise: the right law at the right scale, named by its key alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest, norm

from art_rs_plugins.smoothing import noise as noise_module
from art_rs_plugins.smoothing.noise import (
    Gaussian,
    Key,
    Stage,
    check_seed,
    derive_seed,
    fresh_seed,
    standard_normal,
    standard_normals,
)

KEY = Key(1234, 5, Stage.ESTIMATION, 6)
N = 400_000


def draws(key: Key = KEY, n: int = N) -> np.ndarray:
    return standard_normal((n,), key).double().numpy()


def test_law_by_kolmogorov_smirnov_and_wrong_scales_are_caught() -> None:
    z = draws()
    assert kstest(z, norm.cdf).pvalue > 1e-6
    # both halves of Box-Muller on their own
    assert kstest(z[: N // 2], norm.cdf).pvalue > 1e-6
    assert kstest(z[N // 2 :], norm.cdf).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2, 0.97, 1.03):
        assert kstest(z * wrong, norm.cdf).pvalue < 1e-6
    assert kstest(z + 0.01, norm.cdf).pvalue < 1e-6


@pytest.mark.parametrize("sigma", [0.12, 1.0, 3.0])
def test_perturb_adds_sigma_times_the_law(sigma: float) -> None:
    x = torch.full((2, N // 2), 0.3)
    added = (Gaussian(sigma).perturb(x, standard_normal(tuple(x.shape), KEY)) - x).double().numpy().ravel()
    assert kstest(added, norm(scale=sigma).cdf).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert kstest(added, norm(scale=sigma * wrong).cdf).pvalue < 1e-6


def test_moments() -> None:
    z = draws()
    for power, mean, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(np.mean(z**power) - mean) < 5 * math.sqrt(spread / N), power


@pytest.mark.slow
def test_tail_counts() -> None:
    total, beyond = 0, {3.0: 0, 4.0: 0, 4.5: 0, 5.0: 0}
    for chunk in range(20):
        z = np.abs(draws(Key(99, 0, Stage.ESTIMATION, chunk), 2_000_000))
        total += len(z)
        for edge in beyond:
            beyond[edge] += int((z > edge).sum())
    for edge, count in beyond.items():
        p = 2 * norm.sf(edge)
        assert binom.ppf(5e-7, total, p) <= count <= binom.isf(5e-7, total, p), edge


def test_neighbours_and_the_two_halves_are_independent() -> None:
    z = draws()
    half = N // 2
    for a, b in ((z[:half], z[half:]), (z[:-1], z[1:]), (z[:-2], z[2:]), (z[: half - 1], z[half + 1 :])):
        for left, right in ((a, b), (a**2 - 1, b**2 - 1), (a, b**2 - 1)):
            scale = math.sqrt(np.mean(left**2) * np.mean(right**2) / len(a))
            assert abs(np.mean(left * right)) < 5 * scale


class FixedBits:
    """Stands in for Philox and returns one word for ever."""

    word = 0

    def __init__(self, *, key: np.ndarray, counter: np.ndarray) -> None:
        pass

    def random_raw(self, n: int) -> np.ndarray:
        return np.full(n, self.word, dtype=np.uint64)


@pytest.mark.parametrize("low, high", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFFFF), (1, 0x80000000)])
def test_extreme_bits_are_finite_and_reach_beyond_the_tail_of_pytorch(monkeypatch, low: int, high: int) -> None:
    monkeypatch.setattr(noise_module.np.random, "Philox", FixedBits)
    monkeypatch.setattr(FixedBits, "word", low | high << 32)
    z = standard_normal((64,), KEY)
    assert torch.isfinite(z).all()
    if low == 0:
        assert float(z.max()) == pytest.approx(math.sqrt(2 * 32 * math.log(2)), rel=1e-6)   # 6.66 > 5.768
    if low & 0x7FFFFFFF == 0x7FFFFFFF:
        assert float(z.abs().max()) == 0.0   # the uniform rounds to one


def test_stream_is_philox_and_box_muller() -> None:
    # known answer of Philox 4x64-10 for key 0 and counter 0 (Random123); NumPy advances the counter before it draws
    last = np.full(4, 2**64 - 1, np.uint64)
    words = np.random.Philox(key=np.zeros(2, np.uint64), counter=last).random_raw(4)
    assert [f"{int(w):016x}" for w in words] == [
        "16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b",
    ]   # fmt: skip
    n = 1001
    raw = np.random.Philox(
        key=np.array([KEY.seed, 0], np.uint64), counter=np.array([0, KEY.chunk, KEY.index, int(KEY.stage)], np.uint64)
    ).random_raw((n + 1) // 2)
    u = ((raw.view(np.uint32) & 0x7FFFFFFF).astype(np.float64) + 0.5) / 2**31
    radius, angle = np.sqrt(-2 * np.log(u[: (n + 1) // 2])), 2 * np.pi * u[(n + 1) // 2 :]
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
    assert np.abs(draws(n=n) - expected).max() < 2e-3   # float32 keeps 24 of the 31 bits, which shows near u = 1
    assert np.median(np.abs(draws(n=n) - expected)) < 3e-7


words = st.integers(0, 2**63 - 1)
keys = st.builds(Key, words, words, st.sampled_from(Stage), words)


@given(keys, keys)
def test_distinct_keys_are_disjoint_parts_of_the_stream(a: Key, b: Key) -> None:
    seen = []

    class Recorder(FixedBits):
        def __init__(self, *, key: np.ndarray, counter: np.ndarray) -> None:
            seen.append((tuple(map(int, key)), tuple(map(int, counter))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_module.np.random, "Philox", Recorder)
        for key in (a, b):
            standard_normal((2,), key)
    # Philox counts up in its first word: parts that differ elsewhere meet after 2 ** 64 blocks of four numbers
    assert all(counter[0] == 0 for _, counter in seen)
    assert ((seen[0][0], seen[0][1][1:]) == (seen[1][0], seen[1][1][1:])) == (a == b)


@pytest.mark.parametrize(
    "other",
    [
        Key(1235, 5, Stage.ESTIMATION, 6), Key(1234 + 2**32, 5, Stage.ESTIMATION, 6), Key(1234, 6, Stage.ESTIMATION, 6),
        Key(1234, 5 + 2**32, Stage.ESTIMATION, 6), Key(1234, 5, Stage.SELECTION, 6), Key(1234, 5, Stage.ESTIMATION, 7),
        Key(1234, 6, Stage.ESTIMATION, 5), Key(1234 + 2**62, 5, Stage.ESTIMATION, 6),
    ],
)   # fmt: skip
def test_distinct_keys_give_uncorrelated_draws(other: Key) -> None:
    a, b = draws(), draws(other)
    assert np.mean(a == b) < 1e-3
    for left, right in ((a, b), (a**2 - 1, b**2 - 1), (a[1:], b[:-1]), (a[:-1], b[1:])):
        scale = math.sqrt(np.mean(left**2) * np.mean(right**2) / len(left))
        assert abs(np.mean(left * right)) < 5 * scale


def test_why_the_generator_of_pytorch_is_not_used_on_cpus() -> None:
    a, b = (torch.randn(100, generator=torch.Generator().manual_seed(5 + high)) for high in (0, 2**32))
    assert torch.equal(a, b)
    assert not torch.equal(*(standard_normal((100,), Key(5 + high, 0, Stage.ESTIMATION, 0)) for high in (0, 2**32)))


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 5), (7, 3, 11, 13), (100_003,), (0,), ()])
def test_same_key_same_bits_in_any_shape_and_number_of_threads(shape: tuple[int, ...]) -> None:
    first = standard_normal(shape, KEY)
    assert first.shape == shape
    assert first.dtype == torch.float32
    assert torch.equal(first.flatten(), standard_normal((math.prod(shape),), KEY))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(first, standard_normal(shape, KEY))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (50, 3, 8, 8), (100_003,)])
def test_a_key_gives_the_same_bits_beside_others(shape: tuple[int, ...]) -> None:
    names = [Key(KEY.seed, index, Stage.ESTIMATION, 4) for index in range(3)]
    alone = torch.stack([standard_normal(shape, key) for key in names])
    assert torch.equal(standard_normals(shape, names), alone)
    assert torch.equal(standard_normals(shape, names[::-1]), alone.flip(0))
    assert not torch.equal(alone[0], alone[1])


def test_global_seeds_are_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)   # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()   # noqa: NPY002
    first = standard_normal((10,), KEY)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])   # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(first, standard_normal((10,), KEY))


def test_check_seed() -> None:
    for good in (0, 2**63 - 1, np.int64(7), np.uint64(7)):
        assert check_seed(good) == int(good)
        assert type(check_seed(good)) is int
    assert len({check_seed(None) for _ in range(100)}) == 100
    assert all(0 <= fresh_seed() < 2**63 for _ in range(100))
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\*\*63\)"):
            check_seed(bad)
    for bad in (1.0, "1", True, np.float64(1)):
        with pytest.raises(TypeError, match="seed must be an integer or None"):
            check_seed(bad)


@given(st.lists(words, min_size=1, max_size=5), st.lists(words, min_size=1, max_size=5))
def test_derived_seeds_differ_wherever_their_words_do(a: list[int], b: list[int]) -> None:
    assert 0 <= derive_seed(*a) < 2**63
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
    assert derive_seed(*a) != derive_seed(*a, 0)


def test_words_beyond_32_bits_do_not_run_into_their_neighbours() -> None:
    assert derive_seed(7 + 2**32, 1, 2) != derive_seed(7, 1, 1 + 2 * 2**32)
    assert derive_seed(7 + 2**32, 1, 2, 3) != derive_seed(7, 2**32 + 1, 2, 3)


def test_gaussian_checks_and_spreads_sigma() -> None:
    assert Gaussian(0.5).for_inputs(3).tolist() == [0.5, 0.5, 0.5]
    assert Gaussian([0.5, 0.25]).for_inputs(2).tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="sigma has length 2, but there are 3 inputs"):
        Gaussian([0.5, 0.25]).for_inputs(3)
    with pytest.raises(ValueError, match=r"sigma must be a number or have shape \(b,\)"):
        Gaussian([[0.5]])
    for bad in (0.0, -1.0, float("nan"), [0.5, float("inf")]):
        with pytest.raises(ValueError, match="sigma must be finite and > 0"):
            Gaussian(bad)


def test_perturb_gives_each_input_its_sigma_for_any_number_of_copies() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    sigma = torch.tensor([0.5, 2.0])[:, None]
    one, many = torch.randn(2, 3), torch.randn(4, 2, 3)
    assert torch.equal(Gaussian([0.5, 2.0]).perturb(x, one.clone()), x + sigma * one)
    assert torch.equal(Gaussian([0.5, 2.0]).perturb(x, many.clone()), x + sigma * many)


def test_radius_and_probability_use_each_sigma() -> None:
    radius = Gaussian([0.5, 2.0]).radius([0.1, 0.1], [0.1, 0.1])
    assert radius.tolist() == pytest.approx([0.5 * norm.isf(0.1), 2.0 * norm.isf(0.1)], rel=1e-11)
    assert Gaussian([0.5, 2.0]).probability(radius).tolist() == pytest.approx([0.9, 0.9], rel=1e-11)
