"""count_votes: n draws, one key each, votes that mean something, and networks that are refused."""

import math

import numpy as np
import pytest
import torch
from closed_forms import Function, Linear
from scipy.special import ndtr
from scipy.stats import binom
from torch import nn

from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.noise import Gaussian, Stage
from art_rs_plugins.smoothing.sampling import (
    check_count,
    check_network,
    chunk_size,
    count_votes,
    default_block,
    evaluating,
    strict_votes,
)
from art_rs_plugins.theory.rules import OneSided

F = Linear([1.0, -2.0, 0.5])
X = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
NAN, INF = float("nan"), float("inf")


def fits(counts: np.ndarray, n: int, distance: np.ndarray, sigma: float) -> bool:
    """Whether votes for class 0 agree with Phi(distance / sigma), at a false-alarm rate of 1e-6 for each input."""
    p = ndtr(distance / sigma)
    return bool(np.all((binom.ppf(5e-7, n, p) <= counts) & (counts <= binom.isf(5e-7, n, p))))


def votes(x: torch.Tensor = X, f=F, n: int = 200, sigma=0.7, seed: int | None = 3, **kwargs) -> torch.Tensor:
    return count_votes(f, x, Gaussian(sigma), n, num_classes=2, seed=seed, **kwargs)


@pytest.mark.parametrize(
    "row, winner",
    [
        ([1.0, 2.0, 0.0], 1), ([-1.0, -2.0, -3.0], 0), ([0.0, 0.0, 1e-45], 2), ([3e38, 0.0, -3e38], 0),
        ([1.0, 1.0, 0.0], None), ([0.0, 0.0, 0.0], None), ([0.0, -0.0, -1.0], None), ([NAN, NAN, NAN], None),
        ([NAN, 5.0, 0.0], None), ([5.0, 0.0, NAN], None), ([INF, 0.0, 0.0], None), ([5.0, 0.0, -INF], None),
        ([INF, INF, 0.0], None), ([-INF, -INF, -INF], None),
    ],
)   # fmt: skip
def test_a_vote_needs_finite_logits_and_one_strict_maximum(row: list[float], winner: int | None) -> None:
    for dtype in (torch.float64, torch.float32):
        chosen, valid = strict_votes(torch.tensor([row, [9.0, 1.0, 2.0]], dtype=dtype))
        assert valid.tolist() == [winner is not None, True]
        if winner is not None:
            assert chosen[0] == winner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_of_low_precision_vote_for_nobody(dtype: torch.dtype) -> None:
    close = torch.tensor([[1.0, 1.0001], [1.0, 2.0]])
    assert strict_votes(close)[1].tolist() == [True, True]
    assert strict_votes(close.to(dtype))[1].tolist() == [False, True]


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 7.5])
def test_useless_logits_abstain_where_argmax_would_certify(value: float) -> None:
    f = Function(lambda z: torch.full((len(z), 2), value))
    table = votes(f=f, n=1000)
    assert table.tolist() == [[0, 0]] * 6
    result = certify(f, X, Gaussian(0.7), num_classes=2, n=1000, seed=3)
    assert result.abstained.all()
    assert result.radius.tolist() == [0.0] * 6
    assert result.runner_up_count.tolist() == [1000] * 6
    naive = np.bincount(f(X.repeat(100, 1)).argmax(1).numpy(), minlength=2)[None]
    peer = OneSided(0.001).decide(naive, naive, 600)
    assert peer.prediction[0] == 0
    assert not peer.abstained[0]


def test_partly_invalid_votes_count_against_the_class() -> None:
    # class 0 everywhere, but NaN where the first coordinate of the noise exceeds one sigma
    f = Function(lambda z: torch.stack([torch.where(z[:, 0] > 1, NAN, 1.0), torch.zeros(len(z))], dim=1))
    n, x = 20_000, torch.zeros(1, 3)
    table = count_votes(f, x, Gaussian(1.0), n, num_classes=2, seed=1)
    assert table[0, 1] == 0
    assert binom.ppf(5e-7, n, ndtr(1.0)) <= int(table[0, 0]) <= binom.isf(5e-7, n, ndtr(1.0))
    result = certify(f, x, Gaussian(1.0), num_classes=2, n=n, seed=1)
    assert result.runner_up_count[0] == n - result.count[0]
    assert 0.9 < result.radius[0] < 1.0   # the distance to the half-space of NaN


@pytest.mark.parametrize(
    "n, block", [(1, 1), (1, 50), (7, 3), (100, 10), (101, 10), (99, 10), (64, 64), (63, 64), (200, None)]
)
def test_counts_exactly_n_draws(n: int, block: int | None) -> None:
    assert votes(n=n, block=block).sum(1).tolist() == [n] * 6
    rows = []
    count_votes(Function(lambda z: rows.append(len(z)) or F(z)), X[:1], Gaussian(0.7), n, num_classes=2, block=block)
    limit = block or default_block((3,))
    chunk = min(chunk_size(limit), n)
    slots = limit // chunk
    assert rows[:3] == [4, 4, 4]   # the probes
    # every pass has one shape, and only the last one has empty slots
    passes = math.ceil(math.ceil(n / chunk) / slots)
    assert rows[3:] == [slots * chunk] * passes


def test_surplus_rows_of_the_last_pass_do_not_vote() -> None:
    # the third of three passes of ten rows keeps one row; a network that knows its row numbers shows which
    calls = []

    def f(z: torch.Tensor) -> torch.Tensor:
        calls.append(len(z))
        late = (torch.arange(len(z)) >= 1) if len(calls) == 6 else torch.zeros(len(z), dtype=bool)
        return torch.stack([torch.where(late, 0.0, 1.0), torch.where(late, 1.0, 0.0)], dim=1)

    assert count_votes(f, X[:1], Gaussian(0.7), 21, num_classes=2, block=10).tolist() == [[21, 0]]


def test_votes_follow_the_closed_form() -> None:
    n = 20_000
    counts = votes(n=n)[:, 0].numpy()
    assert fits(counts, n, F.distance(X), 0.7)
    assert not fits(counts, n, F.distance(X), 0.7 * 1.1)   # the same check sees a scale that is 10 % off
    assert not fits(counts, n, F.distance(X), 0.7 / 1.1)


def test_same_bits_however_the_inputs_are_batched_ordered_or_picked() -> None:
    whole = votes()
    assert torch.equal(whole, votes())
    assert not torch.equal(whole, votes(seed=4))
    for size in (1, 2, 4):
        parts = [votes(X[i : i + size], indices=np.arange(6)[i : i + size]) for i in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), whole)
    order = np.array([4, 0, 5, 2])
    assert torch.equal(votes(X[order], indices=order), whole[order])
    # an index names its noise: another index, other draws
    assert not torch.equal(votes(X[:1], indices=[1]), whole[:1])


def test_inputs_and_stages_have_noise_of_their_own() -> None:
    same = torch.zeros(50, 3)
    table = votes(same, n=100)[:, 0]
    assert len(set(table.tolist())) > 10
    stages = [votes(same, n=100, stage=stage)[:, 0] for stage in Stage]
    for i, a in enumerate(stages):
        for b in stages[:i]:
            assert not torch.equal(a, b)
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(50)


def test_fresh_entropy_without_a_seed() -> None:
    assert not torch.equal(votes(seed=None), votes(seed=None))


def test_sigma_for_each_input() -> None:
    sigma = [0.1, 0.3, 0.7, 1.0, 3.0, 9.0]
    table = votes(sigma=sigma)
    for i, s in enumerate(sigma):
        assert torch.equal(votes(X[i : i + 1], sigma=s, indices=[i])[0], table[i])
    with pytest.raises(ValueError, match="sigma has length 6, but there are 2 inputs"):
        votes(X[:2], sigma=sigma)


@pytest.mark.parametrize("shape", [(5,), (3, 8, 8), (2, 3, 4, 5)])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(3, *shape)).astype(np.float32) * 0.2)
    f = Linear(rng.normal(size=int(np.prod(shape))))
    n = 5000
    counts = count_votes(f, x, Gaussian(0.5), n, num_classes=2, seed=2)[:, 0].numpy()
    assert fits(counts, n, f.distance(x), 0.5)


def test_channels_last_inputs_are_fed_in_their_layout_and_vote_the_same_law() -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(3, 3, 8, 8)).astype(np.float32) * 0.2)
    linear, layouts = Linear(rng.normal(size=3 * 64)), set()

    def f(z: torch.Tensor) -> torch.Tensor:
        layouts.add(z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous())
        return linear(z)

    last = x.contiguous(memory_format=torch.channels_last)
    n = 5000
    counts = count_votes(f, last, Gaussian(0.5), n, num_classes=2, seed=2)[:, 0].numpy()
    assert layouts >= {True}
    assert fits(counts, n, linear.distance(x), 0.5)
    one = count_votes(f, last[1:2], Gaussian(0.5), n, num_classes=2, seed=2, indices=[1])
    assert int(one[0, 0]) == counts[1]


class MeanFree(nn.Module):
    """Subtracts the mean of its batch."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.eval()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.scale * F(z - z.mean(dim=0))


@pytest.mark.parametrize(
    "f",
    [
        MeanFree(), MeanFree(1e-5), Function(lambda z: F(z).cumsum(0)),
        Function(lambda z: F(z).flip(0).cumsum(0).flip(0)),
        Function(lambda z: F(z) + F(z).roll(1, 0)), Function(lambda z: F(z) * torch.arange(1, len(z) + 1)[:, None]),
        nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)).eval(),
    ],
)   # fmt: skip
def test_networks_that_see_their_batch_are_refused(f: nn.Module) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"changed by .* with the other rows of its batch"):
        votes(f=f)


def test_random_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="f is random: it gives another output when it is asked again"):
        votes(f=Function(lambda z: nn.functional.dropout(F(z), 0.5)))


def test_ordinary_networks_are_not_refused() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 10))
    conv = nn.Sequential(*layers)
    check_network(conv.eval(), torch.randn(2, 3, 8, 8), 10)
    check_network(conv.to(torch.bfloat16).eval(), torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), 10)
    # on the boundary, where the logits are rounding errors of large terms
    wide = Linear(torch.randn(3072))
    x = torch.randn(1, 3072)
    x -= wide.distance(x)[0] * wide.w.detach() / wide.w.detach().norm()
    check_network(wide, x.detach(), 2)


def test_an_output_that_the_next_call_overwrites_is_no_dependence() -> None:
    buffer = torch.empty(4, 2)   # as compiled networks keep one
    check_network(Function(lambda z: buffer.copy_(F(z))), X, 2)
    with pytest.raises(ValueError, match="other rows of its batch"):
        check_network(Function(lambda z: buffer.copy_(F(z) - F(z).mean(0))), X, 2)


def test_training_mode_is_refused_wherever_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="training mode"):
        votes(f=net)
    net.eval()
    net[1].train()
    with pytest.raises(ValueError, match="training mode"):
        votes(f=net)
    net.eval()
    assert votes(f=net).sum() == 6 * 200


def test_what_does_not_fit_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(m, 3\) for m inputs, got \(4, 2\)"):
        count_votes(F, X, Gaussian(0.5), 10, num_classes=3)
    with pytest.raises(ValueError, match="f is on meta, but x is on cpu"):
        votes(f=nn.Linear(3, 2, device="meta").eval())
    for n in (0, -5):
        with pytest.raises(ValueError, match="n must be at least 1"):
            votes(n=n)
        with pytest.raises(ValueError, match="block must be at least 1"):
            votes(block=n)
    for n in (10.0, True, "10", None):
        with pytest.raises(TypeError, match="n must be an integer"):
            votes(n=n)
    with pytest.raises(TypeError, match="x must be floating point"):
        votes(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least one input"):
        votes(X[:0])
    for indices, error, message in (
        ([0, 1, 2, 3, 4, 4], ValueError, "distinct"), ([0, 1, 2, 3, 4, -5], ValueError, ">= 0"),
        ([0, 1], ValueError, r"shape \(6,\)"), (np.arange(6.0), TypeError, "integers"),
        (np.ones(6, bool), TypeError, "integers"),
    ):   # fmt: skip
        with pytest.raises(error, match=f"indices must be.*{message}"):
            votes(indices=indices)
    for name in ("n", "n0"):
        for bad, error in ((0, ValueError), (1.5, TypeError)):
            with pytest.raises(error, match=f"^{name} must be"):
                certify(F, X, Gaussian(0.5), num_classes=2, **{"n": 10, name: bad})


def test_check_count_returns_python_integers() -> None:
    assert type(check_count(np.int32(3), "n")) is int
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        check_count(1, "draws", least=2)


def test_default_block_keeps_memory_flat() -> None:
    assert default_block(()) == default_block((2,)) <= 1000   # larger batches leave the cache
    assert default_block((3, 32, 32)) == 100
    assert default_block((3, 224, 224)) == 16


def test_inputs_are_left_alone_by_networks_that_write_into_theirs() -> None:
    x = X.clone()
    table = votes(x, f=Function(lambda z: F(z.mul_(1.0))))
    assert torch.equal(x, X)
    assert torch.equal(table, votes())
    assert not torch.is_inference_mode_enabled()


def test_evaluating_restores_mixed_modes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    net.train()
    net[1].eval()
    with evaluating(net) as inner:
        assert inner is net
        assert not any(part.training for part in net.modules())
    assert [part.training for part in net.modules()] == [True, True, False, True]

    def broken() -> None:
        with evaluating(net):
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert [part.training for part in net.modules()] == [True, True, False, True]
