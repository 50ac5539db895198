"""The training loop: the noise that certification adds, reproducible, and honest about what went wrong."""

import logging
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest, norm
from torch import Tensor, nn

from art_rs_plugins.smoothing.adversary import SmoothAdv
from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.losses import ADRE, MACER, Consistency, cross_entropy
from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage
from art_rs_plugins.smoothing.training import Epoch, fit, shuffled

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
    settings.setdefault("noise", Gaussian(sigma))
    return fit(f, batches, optimizer=optimizer, epochs=epochs, **settings)


def weights(f: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in f.parameters()])


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
    batch = torch.from_numpy(x), torch.zeros(500, dtype=torch.int64), torch.arange(500)
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
    def trained(**settings) -> Tensor:
        f = network()
        train(f, epochs=2, **settings)
        return weights(f)

    base = trained()
    torch.manual_seed(123)   # the global seed has no part in it
    assert torch.equal(base, trained())
    assert not torch.equal(base, trained(seed=6))
    assert not torch.equal(base, trained(batches=shuffled(X, Y, batch_size=60, seed=2)))
    assert not torch.equal(trained(seed=None), trained(seed=None))


def test_shuffled_yields_each_input_once_in_an_order_of_the_epoch() -> None:
    x = np.arange(10, dtype=np.float32)[:, None]
    y = np.arange(10)
    batches = shuffled(x, y, batch_size=4, seed=3)
    first = [(a[:, 0].tolist(), b.tolist(), rows.tolist()) for a, b, rows in batches(0)]
    assert [len(b) for _, b, _ in first] == [4, 4, 2]
    assert all(a == b == rows for a, b, rows in first)
    assert sorted(row for _, _, rows in first for row in rows) == list(range(10))
    assert first == [(a[:, 0].tolist(), b.tolist(), rows.tolist()) for a, b, rows in batches(0)]
    assert first != [(a[:, 0].tolist(), b.tolist(), rows.tolist()) for a, b, rows in batches(1)]
    assert next(iter(batches(0)))[2].dtype == torch.int64
    assert [len(b) for _, b, _ in shuffled(x, y, batch_size=4, seed=3, drop_last=True)(0)] == [4, 4]
    assert [len(b) for _, b, _ in shuffled(x, y, batch_size=5, seed=3, drop_last=True)(0)] == [5, 5]
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


def test_bad_settings_are_named() -> None:
    for name in ("epochs", "draws", "copies_per_pass"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            train(network(), **{name: 0})
    with pytest.raises(ValueError, match="batches yielded nothing"):
        train(network(), batches=lambda epoch: [])
    with pytest.raises(ValueError, match="batches yielded nothing"):
        train(network(), batches=shuffled(X, Y, batch_size=1000, seed=1, drop_last=True))


@pytest.mark.parametrize(
    "batch, reason",
    [
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)), r"\(inputs, labels, index\), .* got 2 entries"),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)), r"shape \(2,\)"),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(3)), "index of torch.float32"),
        ((torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), torch.arange(3)), "2 labels"),
    ],
)
def test_batches_of_another_form_are_refused(batch, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        train(network(), batches=lambda epoch: [batch])


@pytest.mark.parametrize("copies_per_pass", [None, 1])
def test_gradients_that_are_not_finite_stop_before_they_spoil_the_network(copies_per_pass: int | None) -> None:
    f, calls, before = network(), [], []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        before.append(weights(f))
        value = cross_entropy(logits, labels)
        # the root of 0 has an infinite slope
        return value + (logits - logits.detach()).abs().sum().sqrt() if len(calls) == 3 else value

    with pytest.raises(ValueError, match="gradients became infinite or NaN in epoch 0; lower the learning rate"):
        train(f, loss=loss, draws=2, copies_per_pass=copies_per_pass)
    assert len(calls) == 3
    assert torch.equal(weights(f), before[-1])
    assert not torch.equal(before[0], before[-1])
    assert all(p.grad is None for p in f.parameters())


# ------------------------------------------------------------------------------------------ copies, in groups


def grouped() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 16), nn.GroupNorm(4, 16), nn.Tanh(), nn.Linear(16, 3))


THREE = (Y + (np.arange(240) % 5 == 0)).astype(np.int64)   # three classes, noisily


def step_of(loss, copies_per_pass: int | None = None, **settings) -> tuple[Tensor, Epoch]:
    """Gradient of one step, and what the epoch reports."""
    f = grouped()
    before = weights(f)
    batches = shuffled(X, THREE, batch_size=240, seed=1)
    (epoch,) = train(f, lr=1.0, batches=batches, loss=loss, draws=8, copies_per_pass=copies_per_pass, **settings)
    return before - weights(f), epoch


@pytest.mark.parametrize("loss", [cross_entropy, ADRE(0.5), Consistency(10.0), MACER(0.5, 4.0)])
@pytest.mark.parametrize("copies", [1, 2, 3, 8, 100])
def test_groups_of_copies_give_the_gradient_of_the_whole(loss, copies: int) -> None:
    whole, epoch = step_of(loss)
    parts, other = step_of(loss, copies)
    assert torch.allclose(parts, whole, atol=1e-6)
    assert other.loss == pytest.approx(epoch.loss, rel=1e-6)
    assert other.noisy_accuracy == epoch.noisy_accuracy


@pytest.mark.parametrize("loss", [ADRE(0.5), Consistency(10.0), MACER(0.5, 4.0)])
def test_losses_of_groups_would_not_add_up(loss) -> None:
    """The control of the test above: accumulation of the loss over groups is another loss."""

    def naive(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([loss(part, labels) for part in logits.split(2)]).mean()

    assert float((step_of(naive)[0] - step_of(loss)[0]).abs().max()) > 1e-4


def test_groups_bound_what_a_pass_holds_and_see_one_noise() -> None:
    f = Record()
    batch = torch.zeros(10, 20), torch.zeros(10, dtype=torch.int64), torch.arange(10)
    train(f, draws=8, copies_per_pass=3, batches=lambda epoch: [batch])
    assert [len(seen) for seen in f.seen[:3]] == [30, 30, 20]
    assert len(f.seen) == 6   # each group once more in the backward pass
    again = {seen.sum().item() for seen in f.seen[3:]}
    assert again == {seen.sum().item() for seen in f.seen[:3]}
    whole = Record()
    train(whole, draws=8, batches=lambda epoch: [batch])
    assert torch.equal(torch.cat(f.seen[:3]), whole.seen[0])


def test_dropout_is_the_same_when_a_group_is_computed_again() -> None:
    f = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    seen: list[Tensor] = []
    f[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    train(f, draws=4, copies_per_pass=2, batches=shuffled(X, Y, batch_size=240, seed=1))
    assert len(seen) == 4
    assert not torch.equal(seen[0], seen[1])
    assert {part.sum().item() for part in seen[:2]} == {part.sum().item() for part in seen[2:]}


def test_batch_normalisation_sees_one_group_at_a_time() -> None:
    f = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    found: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        found.append(logits.detach().clone())
        return cross_entropy(logits, labels)

    seen: list[Tensor] = []
    f.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    batches = shuffled(X, Y, batch_size=240, seed=1)
    train(f, lr=0.0, loss=loss, draws=4, copies_per_pass=2, batches=batches)
    assert int(f[1].num_batches_tracked) == 4
    f.train()
    with torch.no_grad():
        for group, logits in zip(seen[:2], found[0].split(2), strict=True):
            assert torch.equal(f(group), logits.flatten(0, 1))
        assert not torch.allclose(f(torch.cat(seen[:2])), found[0].flatten(0, 1))


# -------------------------------------------------------------------------------------------- noise that is chosen


class Table:
    """A sigma for each example, looked up by its index."""

    def __init__(self, sigma) -> None:
        self.sigma = np.asarray(sigma)
        self.calls: list[tuple[bool, Tensor, Tensor, int, Key]] = []

    def for_batch(self, f: nn.Module, x: Tensor, y: Tensor, *, index: Tensor, epoch: int, key: Key) -> Gaussian:
        self.calls.append((f.training, y, index, epoch, key))
        return Gaussian(self.sigma[index.numpy()])


@pytest.mark.parametrize("copies_per_pass", [None, 1])
def test_a_schedule_gives_each_example_its_own_sigma_wherever_it_is_shuffled(copies_per_pass: int | None) -> None:
    draws, size = 3, 2000
    x = np.arange(12, dtype=np.float32)[:, None].repeat(size, axis=1) * 100
    y = np.arange(12) % 2
    table = Table(np.geomspace(0.1, 1.2, 12))
    f = nn.Sequential(nn.Linear(size, 2))
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor]) -> None:
        if module.training:
            seen.append(args[0].detach().clone())

    f.register_forward_pre_hook(record)
    history = train(
        f,
        lr=0.0,
        noise=table,
        epochs=2,
        draws=draws,
        copies_per_pass=copies_per_pass,
        batches=shuffled(x, np.eye(2, dtype=np.float32)[y], batch_size=5, seed=1),
    )
    assert [h.inputs for h in history] == [12, 12]
    rows = torch.cat([s for s in seen if len(s)])
    place = (rows.mean(dim=1) / 100).round().long().numpy()
    squares = ((rows.double().numpy() - 100.0 * place[:, None]) ** 2).sum(axis=1)
    low, high = chi2.ppf([1e-10, 1 - 1e-10], size)
    inside = {
        name: (low < squares / sigma**2) & (squares / sigma**2 < high)
        for name, sigma in (("own", table.sigma[place]), ("neighbour's", table.sigma[(place + 1) % 12]))
    }
    assert inside["own"].all()
    assert not inside["neighbour's"].any()
    assert sorted(set(place)) == list(range(12))
    assert [epoch for *_, epoch, _ in table.calls] == [0, 0, 0, 1, 1, 1]
    for training, classes, index, _, _ in table.calls:
        assert not training
        assert torch.equal(classes, index % 2)
    keys = [key for *_, key in table.calls]
    assert len(set(keys)) == 6
    assert all(key.stage not in (Stage.TRAINING, Stage.ATTACK) for key in keys)


def test_a_schedule_of_one_sigma_is_plain_noise() -> None:
    plain, other = network(), network()
    assert train(plain, epochs=2, draws=2) == train(other, epochs=2, draws=2, noise=Table(np.full(240, 0.5)))
    assert torch.equal(weights(plain), weights(other))


def test_noise_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise must have one sigma .* give a NoiseSchedule"):
        train(network(), noise=Gaussian([0.1, 0.2]))
    with pytest.raises(TypeError, match="noise must be a Gaussian or have a method for_batch, got float"):
        train(network(), noise=0.5)
    with pytest.raises(ValueError, match="sigma has length 240, but there are 60 inputs"):
        train(network(), noise=type("Whole", (), {"for_batch": lambda self, *a, **k: Gaussian(np.ones(240))})())


# ------------------------------------------------------------------------------------------------------ adversary


class Watch:
    """An adversary that remembers what it was asked for, and the loss that follows it."""

    def __init__(self, inner: SmoothAdv, f: nn.Module) -> None:
        self.inner, self.f = inner, f
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.modes: list[bool] = []
        self.expected: list[Tensor] = []
        self.met: list[Tensor] = []
        self.epochs: list[int] = []

    def attack(self, logits, x: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        kept = [None if p.grad is None else p.grad.clone() for p in self.f.parameters()]
        moved = self.inner.attack(logits, x, labels, epoch=epoch)
        assert all(p.grad is k or torch.equal(p.grad, k) for p, k in zip(self.f.parameters(), kept, strict=True))
        self.before.append(x), self.after.append(moved), self.epochs.append(epoch), self.modes.append(self.f.training)
        self.expected.append(logits(moved).detach())
        return moved

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self.f.training
        self.met.append(logits.detach().clone())
        return cross_entropy(logits, labels)


@pytest.mark.parametrize("copies_per_pass", [None, 2])
def test_the_loss_meets_the_inputs_and_the_noise_that_the_adversary_left(copies_per_pass: int | None) -> None:
    f = network()
    watch = Watch(SmoothAdv(0.4, 3, warmup=4), f)
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    train(
        f, epochs=5, adversary=watch, loss=watch.loss, draws=4, optimizer=optimizer, copies_per_pass=copies_per_pass
    )
    assert not any(watch.modes)
    assert all(torch.equal(a, b) for a, b in zip(watch.expected, watch.met, strict=True))
    norms = [(b - a).norm(dim=1) for a, b in zip(watch.before, watch.after, strict=True)]
    for found, epoch in zip(norms, watch.epochs, strict=True):
        budget = 0.4 * min(1.0, (epoch + 1) / 4)
        assert torch.all(found <= budget + 1e-6)
        assert float(found.median()) > 0.99 * budget
    assert watch.epochs == [epoch for epoch in range(5) for _ in range(4)]


def test_an_adversary_without_budget_changes_no_bit() -> None:
    plain, other = network(), network()
    assert train(plain, epochs=3, draws=4, loss=ADRE(0.1)) == train(
        other, epochs=3, draws=4, loss=ADRE(0.1), adversary=SmoothAdv(0.0)
    )
    assert torch.equal(weights(plain), weights(other))
    train(other, adversary=SmoothAdv(0.1))
    train(plain)
    assert not torch.equal(weights(plain), weights(other))


def test_an_adversary_meets_eval_mode_and_leaves_every_mode_alone() -> None:
    f = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    train(f, adversary=SmoothAdv(0.5, 4), draws=2)
    assert int(f[1].num_batches_tracked) == 4   # the four batches, and none of the attack's passes


def test_training_against_an_adversary_relies_less_on_features_that_an_attack_could_void() -> None:
    """Two features tell the label: a sure one of small numbers, and a less sure one of large numbers."""
    rng = np.random.default_rng(3)
    sign = np.where(Y == 1, 1.0, -1.0)
    x = np.stack([0.2 * sign, np.where(rng.random(240) < 0.95, 1.0, -1.0) * sign], axis=1).astype(np.float32)
    batches = shuffled(x, Y, batch_size=60, seed=1)
    share = []
    for adversary in (None, SmoothAdv(0.4, 5, warmup=0)):
        f = nn.Linear(2, 2)
        nn.init.zeros_(f.weight), nn.init.zeros_(f.bias)
        train(f, epochs=60, lr=2.0, sigma=0.05, batches=batches, adversary=adversary)
        normal = (f.weight[1] - f.weight[0]).detach()
        share.append(float(normal[0] / normal.norm()))
    assert share[0] > 0.9
    assert share[1] < 0.6


# ------------------------------------------------------------------------------------------------------- warnings


def test_one_draw_is_warned_of_once_and_before_training() -> None:
    with pytest.warns(UserWarning, match="ADRE with draws=1") as found:
        train(network(), loss=ADRE(0.1), epochs=2)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(network(), loss=ADRE(0.1), draws=2)
        f = network()
        before = weights(f)
        with pytest.raises(UserWarning):
            train(f, loss=ADRE(0.1))
    assert torch.equal(weights(f), before)
