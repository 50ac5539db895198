"""The training loop: the noise that certification adds, reproducible, and honest about what went wrong."""

import logging

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor, nn

from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.smoothing.training import Epoch, cross_entropy, fit, shuffled

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 2, size=240)
X = (RNG.normal(size=(240, 2)) * 0.1 + np.where(Y[:, None] == 1, 1.0, -1.0)).astype(np.float32)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


def train(f: nn.Module, *, epochs: int = 1, lr: float = 0.1, sigma: float = 0.5, **settings) -> list[Epoch]:
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(f.parameters(), lr=lr)
    batches = settings.pop("batches", None) or shuffled(X, Y, batch_size=60, seed=1)
    settings.setdefault("seed", 5)
    return fit(f, batches, noise=Gaussian(sigma), optimizer=optimizer, epochs=epochs, **settings)


class Record(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 2)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.layer(x)


@pytest.mark.parametrize("sigma, draws", [(0.12, 1), (0.5, 1), (1.0, 3)])
def test_noise_at_the_network_is_that_of_certification(sigma: float, draws: int) -> None:
    f, x = Record(), np.full((500, 20), 0.25, np.float32)
    batch = torch.from_numpy(x), torch.zeros(500, dtype=torch.int64)
    train(f, sigma=sigma, draws=draws, epochs=2, batches=lambda epoch: [batch])
    assert [len(seen) for seen in f.seen] == [500 * draws] * 2
    added = [(seen - 0.25).double().numpy().ravel() for seen in f.seen]
    for noise in added:
        assert kstest(noise, norm(scale=sigma).cdf).pvalue > 1e-6
        for wrong in (2 / 3, 3 / 2):
            assert kstest(noise, norm(scale=sigma * wrong).cdf).pvalue < 1e-6
    assert abs(np.corrcoef(*added)[0, 1]) < 5 / np.sqrt(len(added[0]))   # each epoch has noise of its own
    assert abs(np.corrcoef(added[0][:5000], added[0][5000:10_000])[0, 1]) < 5 / np.sqrt(5000)


def test_learns_under_noise_what_can_then_be_certified() -> None:
    f = network()
    history = train(f, epochs=12)
    assert history[-1].loss < 0.5 * history[0].loss
    assert history[-1].noisy_accuracy > 0.97
    assert [h.epoch for h in history] == list(range(12))
    assert {h.inputs for h in history} == {240}
    result = certify(f.eval(), torch.from_numpy(X[:40]), Gaussian(0.5), num_classes=2, n=1000, seed=0)
    assert np.mean(result.prediction == Y[:40]) == 1.0
    assert result.radius.min() > 0.5


def test_history_reports_the_loss_and_accuracy_of_its_batches() -> None:
    f = network()
    before = [p.clone() for p in f.parameters()]
    (epoch,) = train(f, lr=0.0, draws=4, sigma=1e-6)
    with torch.no_grad():
        logits = f(torch.from_numpy(X))
    assert epoch.loss == pytest.approx(float(nn.functional.cross_entropy(logits, torch.from_numpy(Y))), rel=1e-4)
    assert epoch.noisy_accuracy == pytest.approx(float((logits.argmax(1).numpy() == Y).mean()))
    assert all(torch.equal(a, b) for a, b in zip(before, f.parameters(), strict=True))


def test_seed_and_order_decide_every_bit() -> None:
    def weights(**settings) -> Tensor:
        f = network()
        train(f, epochs=2, **settings)
        return torch.cat([p.detach().flatten() for p in f.parameters()])

    base = weights()
    torch.manual_seed(123)   # the global seed has no part in it
    assert torch.equal(base, weights())
    assert not torch.equal(base, weights(seed=6))
    assert not torch.equal(base, weights(batches=shuffled(X, Y, batch_size=60, seed=2)))
    assert not torch.equal(weights(seed=None), weights(seed=None))


def test_shuffled_yields_each_input_once_in_an_order_of_the_epoch() -> None:
    x = np.arange(10, dtype=np.float32)[:, None]
    y = np.arange(10)
    batches = shuffled(x, y, batch_size=4, seed=3)
    first = [(a[:, 0].tolist(), b.tolist()) for a, b in batches(0)]
    assert [len(b) for _, b in first] == [4, 4, 2]
    assert all(a == b for a, b in first)
    assert sorted(label for _, b in first for label in b) == list(range(10))
    assert first == [(a[:, 0].tolist(), b.tolist()) for a, b in batches(0)]
    assert first != [(a[:, 0].tolist(), b.tolist()) for a, b in batches(1)]
    assert [len(b) for _, b in shuffled(x, y, batch_size=4, seed=3, drop_last=True)(0)] == [4, 4]
    assert [len(b) for _, b in shuffled(x, y, batch_size=5, seed=3, drop_last=True)(0)] == [5, 5]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        shuffled(x, y, batch_size=0, seed=3)


def test_mode_of_every_part_returns_even_after_an_error() -> None:
    f = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    f.train()
    f[1].eval()
    modes = []
    train(f, callback=lambda epoch: modes.append(f[1].training))
    assert modes == [True]
    assert [part.training for part in f.modules()] == [True, True, False, True]
    f.eval()
    train(f)
    assert not any(part.training for part in f.modules())
    with pytest.raises(ValueError, match="loss became nan"):
        train(f, loss=lambda logits, labels: logits.sum() * float("nan"))
    assert not any(part.training for part in f.modules())


def test_eval_mode_keeps_batch_statistics() -> None:
    f = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    mean, weight = f[1].running_mean.clone(), f[0].weight.detach().clone()
    train(f, train_mode=False)
    assert torch.equal(f[1].running_mean, mean)
    assert not torch.equal(f[0].weight, weight)
    train(f)
    assert not torch.equal(f[1].running_mean, mean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_network(value: float) -> None:
    f, calls = network(), []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(logits, labels) * (value if len(calls) == 3 else 1.0)

    with pytest.raises(ValueError, match=f"loss became {value} in epoch 0"):
        train(f, loss=loss)
    assert len(calls) == 3
    assert all(torch.isfinite(p).all() for p in f.parameters())


def test_callback_and_scheduler_come_once_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    f, seen = network(), []
    optimizer = torch.optim.SGD(f.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    with caplog.at_level(logging.INFO):
        history = train(f, epochs=3, optimizer=optimizer, scheduler=scheduler, callback=seen.append)
    assert seen == history
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert caplog.text.count("accuracy under noise") == 3


def test_soft_labels_train_as_their_classes_do() -> None:
    soft = np.eye(2, dtype=np.float32)[Y]
    hard_net, soft_net = network(), network()
    (hard,) = train(hard_net, draws=2)
    (other,) = train(soft_net, draws=2, batches=shuffled(X, soft, batch_size=60, seed=1))
    assert other.loss == pytest.approx(hard.loss, rel=1e-5)
    assert other.noisy_accuracy == hard.noisy_accuracy
    for a, b in zip(hard_net.parameters(), soft_net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_cross_entropy_is_the_mean_over_copies_and_inputs() -> None:
    logits, labels = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2, 2])
    expected = np.mean([-float(logits[m, b].log_softmax(0)[labels[b]]) for m in range(3) for b in range(4)])
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-6)
    soft = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    expected = np.mean([-float(logits[m, b].log_softmax(0) @ soft[b]) for m in range(3) for b in range(4)])
    assert float(cross_entropy(logits, soft)) == pytest.approx(expected, rel=1e-6)


def test_bad_settings_are_named() -> None:
    for name in ("epochs", "draws"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            train(network(), **{name: 0})
    with pytest.raises(ValueError, match="batches yielded nothing"):
        train(network(), batches=lambda epoch: [])
    with pytest.raises(ValueError, match="batches yielded nothing"):
        train(network(), batches=shuffled(X, Y, batch_size=1000, seed=1, drop_last=True))


def test_a_sigma_for_each_input_is_refused():
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="noise must have one sigma"):
        fit(network, lambda _: [], noise=Gaussian([0.1, 0.2]), optimizer=optimizer, epochs=1)
