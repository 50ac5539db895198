"""A sigma for each training example: keyed by index, moved the right way, and never part of the network."""

import math

import numpy as np
import pytest
import torch
from closed_forms import Function, Linear
from torch import nn

from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage
from art_rs_plugins.smoothing.sigma import GradientAscent
from art_rs_plugins.smoothing.sigma_table import SigmaTable, ThreePoint
from art_rs_plugins.smoothing.training import NoiseSchedule, fit, shuffled

F = Linear([1.0])
KEY = Key(5, 0, Stage.SEARCH, 0)
N = 24
Y = np.arange(N) % 2
X = np.where(Y == 0, 1.0, -1.0).astype(np.float32)[:, None]   # F answers 0 on the right, 1 on the left
WRONG = np.isin(np.arange(N), [3, 8, 20])
LABELS = np.where(WRONG, 1 - Y, Y)


def step(table: SigmaTable, rows: np.ndarray, epoch: int = 0, f: nn.Module = F, x: np.ndarray = X) -> Gaussian:
    inputs, labels = torch.from_numpy(x[rows]), torch.from_numpy(LABELS[rows])
    return table.for_batch(f, inputs, labels, index=torch.from_numpy(rows), epoch=epoch, key=KEY)


def test_all_start_at_one_sigma_and_stay_there_until_their_epoch() -> None:
    table = SigmaTable(N, 0.5, start=3, every=2)
    assert isinstance(table, NoiseSchedule)
    never = Function(lambda z: pytest.fail("asked before its epoch"))
    rows = np.array([4, 1])
    for epoch in (0, 1, 2, 4, 6):
        noise = step(table, rows, epoch, f=never)
        assert noise.for_inputs(2) == pytest.approx([0.5, 0.5], rel=1e-15)
    for epoch in (3, 5):
        before = table.sigma
        step(table, rows, epoch)
        assert np.flatnonzero(table.sigma != before).tolist() == [1, 4]


def test_a_refresh_moves_by_the_average_and_the_noise_is_that_of_the_table() -> None:
    table = SigmaTable(N, 0.5, rate=0.1)
    rows = np.array([7, 3, 0])   # 3 has a wrong label
    noise = step(table, rows)
    moves = np.log(noise.for_inputs(3) / 0.5) / math.log(1.25)
    assert moves == pytest.approx([0.1, -0.1, 0.1])
    assert np.array_equal(noise.for_inputs(3), table.sigma[rows])
    narrow = SigmaTable(N, 0.5, rate=1.0, bounds=(0.48, 0.52))
    assert step(narrow, rows).for_inputs(3) == pytest.approx([0.52, 0.48, 0.52])


def test_sigmas_follow_their_examples_through_shuffling_and_augmentation_to_the_clips() -> None:
    table, by_place, rng = SigmaTable(N, 0.5), SigmaTable(N, 0.5), np.random.default_rng(0)
    for epoch in range(40):
        x = X + rng.normal(size=X.shape).astype(np.float32) * 0.05   # augmented anew
        for rows in np.array_split(rng.permutation(N), 5):
            step(table, rows, epoch, x=x)
            inputs, labels = torch.from_numpy(x[rows]), torch.from_numpy(LABELS[rows])
            by_place.for_batch(F, inputs, labels, index=torch.arange(len(rows)), epoch=epoch, key=KEY)
        assert ((table.sigma >= 0.25) & (table.sigma <= 1.0)).all()
    assert table.sigma[WRONG] == pytest.approx(0.25)
    assert table.sigma[~WRONG].min() > 0.8
    assert by_place.sigma.min() > 0.3   # control: a place in the batch belongs to nobody


def test_a_table_does_not_depend_on_order_or_batches() -> None:
    def after(batches: list[np.ndarray], seed: int = 5) -> np.ndarray:
        near = SigmaTable(N, 0.5)
        for epoch in range(4):
            for rows in batches:
                x, y = torch.from_numpy(X[rows] * 0.2), torch.from_numpy(LABELS[rows])
                key = Key(seed, epoch, Stage.SEARCH, int(rows[0]))
                near.for_batch(F, x, y, index=torch.from_numpy(rows), epoch=epoch, key=key)
        return near.sigma

    whole = after([np.arange(N)])
    assert len(np.unique(whole)) > 2
    assert np.array_equal(whole, after([np.arange(N)[::-1].copy()]))
    assert np.array_equal(whole, after(list(np.arange(N)[:, None])))
    assert not np.array_equal(whole, after([np.arange(N)], seed=6))


@pytest.mark.parametrize("sigma, expected", [(0.3, 0.24), (0.05, 0.0625), (1.0, 0.8)])
def test_three_points_find_the_side_where_the_radius_of_the_class_is_larger(sigma: float, expected: float) -> None:
    # class 0 on (-0.3, 0.3): sigma z(2 Phi(0.3 / sigma) - 1) falls with sigma, but for what the clamp cuts off
    slab = Function(lambda z: 60 * torch.cat([0.3 - z.abs(), z.abs() - 0.3], dim=1))
    x, y = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)
    moved = ThreePoint(draws=2000).propose(slab, x, y, np.full(4, sigma), seed=0, index=[0, 1, 2, 3], epoch=0)
    assert moved == pytest.approx(expected)


def test_the_three_sigmas_of_an_example_share_its_draws() -> None:
    seen: list[torch.Tensor] = []
    f = Function(lambda z: seen.append(z.clone()) or F(z))
    rows, sigma = [4, 9], np.array([0.5, 0.2])
    x = torch.from_numpy(X[rows])
    ThreePoint(draws=300).propose(f, x, torch.zeros(2, dtype=torch.int64), sigma, seed=0, index=rows, epoch=0)
    drawn = torch.cat(seen).view(3, -1)   # one row for each candidate
    passes = len(seen) // 3
    assert len(seen) % 3 == 0
    assert passes == 2   # 600 numbers do not fit in one pass of 500
    for i in range(2):
        parts = [torch.cat([p.view(2, -1)[i] for p in seen[c * passes : (c + 1) * passes]]) for c in range(3)]
        standard = [(p - x[i]) / (sigma[i] * r) for p, r in zip(parts, (0.8, 1.0, 1.25), strict=True)]
        assert torch.allclose(standard[0], standard[1], atol=1e-5)
        assert torch.allclose(standard[2], standard[1], atol=1e-5)
        assert 0.8 < standard[1].std() < 1.2
    assert drawn.shape == (3, 600)


def test_outputs_that_are_not_finite_shrink_sigma() -> None:
    nan = Function(lambda z: torch.full((len(z), 2), float("nan")))
    assert step(SigmaTable(N, 0.5, rate=1.0), np.arange(3), f=nan).for_inputs(3) == pytest.approx([0.4] * 3)


def test_batch_statistics_are_frozen_and_company_does_not_matter() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        f = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
    f.train()
    f[2].eval()
    before = {name: value.clone() for name, value in f.state_dict().items()}
    whole = SigmaTable(N, 0.5)
    step(whole, np.arange(N), f=f)
    single = SigmaTable(N, 0.5)
    for i in range(N):
        step(single, np.array([i]), f=f)
    assert np.array_equal(whole.sigma, single.sigma)
    assert len(np.unique(whole.sigma)) > 1
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())
    assert [part.training for part in f] == [True, True, False, True, True]
    assert all(p.grad is None and p.requires_grad for p in f.parameters())


def test_gradient_ascent_serves_as_an_update() -> None:
    certain = Function(lambda z: torch.cat([z * 0 + 20, z * 0 - 20], dim=1))
    table = SigmaTable(N, 0.5, update=GradientAscent(iterations=10, step=0.01), rate=0.5)
    noise = step(table, np.arange(4), f=certain)   # a saturated network drifts by 2.0537 step in each iteration
    assert noise.for_inputs(4) == pytest.approx([math.sqrt(0.5 * 0.70537)] * 4, rel=1e-5)
    # other draws in another epoch
    first, second = (GradientAscent(iterations=1, step=1.0, draws=8).propose(
        F, torch.from_numpy(X[:2] * 0.2), torch.zeros(2), np.full(2, 0.5), seed=0, index=[0, 1], epoch=epoch
    ) for epoch in (0, 1))   # fmt: skip
    assert not np.array_equal(first, second)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(table: SigmaTable) -> tuple[nn.Module, SigmaTable]:
    f = network()
    optimizer = torch.optim.SGD(f.parameters(), lr=0.2)
    fit(f, shuffled(X, LABELS, batch_size=8, seed=1), noise=table, optimizer=optimizer, epochs=12, draws=4, seed=3)
    return f, table


def test_training_moves_the_table_within_its_clips_and_learns() -> None:
    f, table = trained(SigmaTable(N, 0.5, start=4))
    assert ((table.sigma >= 0.25) & (table.sigma <= 1.0)).all()
    assert table.sigma[~WRONG].min() > 0.5   # 8 refreshes, all upward
    assert table.sigma[WRONG].max() < 0.5    # a wrong label stays in the minority
    with torch.no_grad():
        assert (f.eval()(torch.from_numpy(X)).argmax(1).numpy() == Y).all()
    again = trained(SigmaTable(N, 0.5, start=4))[1]
    assert np.array_equal(table.log_sigma, again.log_sigma)


def test_a_checkpoint_continues_where_it_was() -> None:
    table = SigmaTable(N, 0.5)
    step(table, np.arange(N))
    state = table.state_dict()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "log_sigma": (torch.float64, (N,))
    }
    other = SigmaTable(N, 0.5)
    other.load_state_dict(state)
    assert np.array_equal(other.sigma, table.sigma)
    step(table, np.arange(N), epoch=1)
    assert not np.array_equal(other.sigma, table.sigma)   # the saved numbers are a copy
    step(other, np.arange(N), epoch=1)
    assert np.array_equal(other.sigma, table.sigma)
    with pytest.raises(ValueError, match="but the table holds 3 examples"):
        SigmaTable(3, 0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="must be finite"):
        other.load_state_dict({"log_sigma": torch.full((N,), float("nan"))})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SigmaTable(0, 0.5), "size must be at least 1"),
        (lambda: SigmaTable(5, 0.0), "sigma must be finite and > 0"),
        (lambda: SigmaTable(5, 0.5, rate=0.0), r"rate must lie in \(0, 1\]"),
        (lambda: SigmaTable(5, 0.5, every=0), "every must be at least 1"),
        (lambda: SigmaTable(5, 0.5, start=-1), "start must be at least 0"),
        (lambda: SigmaTable(5, 0.5, bounds=(0.6, 0.9)), "must contain sigma = 0.5"),
        (lambda: ThreePoint(draws=0), "draws must be at least 1"),
        (lambda: ThreePoint(ratio=1.0), "ratio must be finite and > 1"),
        (lambda: ThreePoint(clamp=0.7), "clamp must lie strictly between 0 and 1/2"),
        (lambda: step(SigmaTable(5, 0.5), np.array([2, 5])), r"index must lie in \[0, 5\)"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
