"""The adversary of training: it keeps its budget and range, climbs the smoothed loss, and sees fixed noise."""

import math

import pytest
import torch
from torch import Tensor, nn

from art_rs_plugins.smoothing.adversary import SmoothAdv
from art_rs_plugins.smoothing.noise import Key, Stage, standard_normal


class Fixed:
    """Logits of noisy copies under fixed noise, recording where they were asked for."""

    def __init__(self, f: nn.Module, m: int, shape: tuple[int, ...], sigma: float = 0.5, seed: int = 0) -> None:
        self.f, self.noise = f, sigma * standard_normal((m, *shape), Key(seed, 0, Stage.TRAINING, 0))
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.f((x + self.noise).flatten(0, 1)).unflatten(0, self.noise.shape[:2])

    def smoothed(self, x: Tensor, labels: Tensor) -> Tensor:
        """-log mean_j softmax_y of each input, float64."""
        p = self(x).double().softmax(dim=2).mean(dim=0)
        return -p[torch.arange(len(x)), labels].log()


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return make()


def run(logits: Fixed, x: Tensor, labels: Tensor, eps: float, steps: int, **settings) -> Tensor:
    return SmoothAdv(eps, steps, warmup=0, **settings).attack(logits, x, labels, epoch=0)


@pytest.mark.parametrize("eps", [0.01, 0.25, 2.0, 50.0])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("clipped", [False, True])
def test_budget_and_range_are_kept_and_the_loss_does_not_fall(eps: float, steps: int, clipped: bool) -> None:
    f = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    x = torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    logits = Fixed(f, 4, x.shape)
    limits = (torch.tensor(0.0), torch.tensor(1.0)) if clipped else None
    found = run(logits, x, labels, eps, steps, clip_values=limits)
    assert not found.requires_grad
    assert torch.all((found.double() - x.double()).flatten(1).norm(dim=1) <= eps + 1e-6)
    assert torch.all(logits.smoothed(found, labels) > logits.smoothed(x, labels))
    if clipped:
        assert float(found.min()) >= 0.0
        assert float(found.max()) <= 1.0
    elif eps >= 2.0:
        assert float(found.min()) < 0.0   # so that the range has something to hold back


def test_a_linear_network_is_climbed_along_its_normal_in_steps_of_twice_the_budget_in_all() -> None:
    f = seeded(lambda: nn.Linear(8, 2))
    normal = (f.weight[1] - f.weight[0]).detach()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    logits = Fixed(f, 4, x.shape)
    found = run(logits, x, labels, 0.8, 8)
    away = torch.where(labels == 0, 1.0, -1.0)[:, None] * normal / normal.norm()
    assert torch.allclose(found, x + 0.8 * away, atol=1e-5)
    travelled = torch.stack([(at - x).norm(dim=1) for at in logits.asked])
    assert len(travelled) == 8
    for step, norms in enumerate(travelled):
        assert torch.allclose(norms, torch.full((6,), min(0.8, 0.2 * step)), atol=1e-5)


def test_the_first_step_follows_the_loss_of_the_mean_and_not_the_mean_of_losses() -> None:
    f = seeded(lambda: nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3)))
    with torch.no_grad():
        f[2].weight.mul_(8.0)   # copies that disagree
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    logits = Fixed(f, 6, x.shape, sigma=1.0)
    moved = (run(logits, x, labels, 0.1, 1) - x).double()

    def direction(value) -> Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(logits(leaf).double().softmax(2)[:, torch.arange(20), labels]), leaf)
        return gradient.double()

    smoothed = torch.cosine_similarity(moved, direction(lambda p: -p.mean(0).log().sum()), dim=1)
    apart = torch.cosine_similarity(moved, direction(lambda p: -p.log().mean(0).sum()), dim=1)
    assert torch.all(smoothed > 1 - 1e-5)
    assert float(apart.min()) < 0.95


def test_warm_up_rises_in_equal_steps_to_the_whole_budget() -> None:
    adversary = SmoothAdv(0.5, warmup=10)
    rising = [0.05 * t for t in range(1, 11)]
    assert [adversary.budget(epoch) for epoch in range(12)] == pytest.approx([*rising, 0.5, 0.5])
    for warmup in (0, 1):
        assert [SmoothAdv(0.5, warmup=warmup).budget(epoch) for epoch in range(3)] == [0.5] * 3
    f = seeded(lambda: nn.Linear(8, 2))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(6, dtype=torch.int64)
    for epoch in (0, 4, 9, 20):
        found = adversary.attack(Fixed(f, 4, x.shape), x, labels, epoch=epoch)
        assert (found - x).norm(dim=1).tolist() == pytest.approx([adversary.budget(epoch)] * 6, rel=1e-4)


def test_no_budget_means_the_inputs_themselves_and_no_pass() -> None:
    f = seeded(lambda: nn.Linear(8, 2))
    x = torch.randn(6, 8)
    logits = Fixed(f, 4, x.shape)
    assert run(logits, x, torch.zeros(6, dtype=torch.int64), 0.0, 5) is x
    assert not logits.asked


def test_parameters_get_no_gradient_and_flat_regions_no_nan() -> None:
    f = seeded(lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(6, dtype=torch.int64)
    run(Fixed(f, 4, x.shape), x, labels, 0.5, 3)
    assert all(p.grad is None for p in f.parameters())
    with torch.no_grad():
        f[0].bias.fill_(-1e6)   # dead
    assert torch.equal(run(Fixed(f, 4, x.shape), x, labels, 0.5, 3), x)


def test_half_precision_networks_are_climbed_where_they_are_sure() -> None:
    """At margins of 11 and more the softmax of float16 is 1, and its gradient 0."""
    f = seeded(lambda: nn.Linear(8, 2))

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x).to(torch.float16)

    normal = (f.weight[1] - f.weight[0]).detach()
    x = torch.linspace(11.0, 13.0, 6)[:, None] * normal / normal.norm() ** 2
    logits = Fixed(Half(), 4, x.shape, sigma=0.1)
    found = run(logits, x, torch.ones(6, dtype=torch.int64), 0.5, 3)
    assert torch.allclose(found, x - 0.5 * normal / normal.norm(), atol=1e-3)


def test_bad_settings_are_named() -> None:
    for wrong in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps must be finite and >= 0"):
            SmoothAdv(wrong)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        SmoothAdv(0.5, 0)
    with pytest.raises(TypeError, match="steps must be an integer"):
        SmoothAdv(0.5, 2.5)
    with pytest.raises(ValueError, match="warmup must be at least 0"):
        SmoothAdv(0.5, 2, -1)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    for limits in ((one, zero), (zero, zero), (zero,), (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))):
        with pytest.raises(ValueError, match="clip_values must be"):
            SmoothAdv(0.5, clip_values=limits)
