"""Normalize and SmoothedModule against explicit sums, and under everything that is done to a network."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor, nn

from art_rs_plugins.smoothing.modules import BaseClassifier, Normalize, SmoothedModule, looks_like_probabilities
from art_rs_plugins.smoothing.noise import Key, Stage, standard_normal

X = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


class Record(nn.Module):
    """Keeps what it was given and returns the first columns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x.flatten(1)[:, :2]


def explicit(module: SmoothedModule, x: Tensor, *, softmax: bool = True) -> Tensor:
    """Log of the mean over the bank, one draw at a time, in the plainest way."""
    bank = standard_normal((module.samples, *x.shape[1:]), Key(module.seed, 0, Stage.BANK, 1)) * module.sigma
    scores = [module.f(x + draw) for draw in bank]
    return torch.stack([s.softmax(1) if softmax else s for s in scores]).mean(0).log()


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 4), (2, 3, 2, 4, 4)])
def test_normalize_works_on_each_channel(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 1.0, 2.0])
    result = Normalize(mean, std)(x)
    for c in range(3):
        assert torch.allclose(result[:, c], (x[:, c] - mean[c]) / std[c])
    assert torch.allclose(Normalize(0.5, 0.25)(x), (x - 0.5) / 0.25)
    whole = torch.rand(shape[1:], generator=torch.Generator().manual_seed(1)) + 0.5
    assert torch.allclose(Normalize(whole.numpy(), whole.numpy())(x), x / whole - 1)


def test_normalize_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="mean and std must have the same shape"):
        Normalize([0.1, 0.2], [0.5])
    for std in (0.0, -1.0, float("nan"), [1.0, float("inf")]):
        with pytest.raises(ValueError, match="std must be finite and > 0"):
            Normalize(np.zeros(np.shape(std)), std)


def test_normalize_adds_no_weights_and_moves_with_its_module() -> None:
    layer = Normalize(0.1, 0.2)
    assert layer.state_dict() == {}
    assert layer.double().mean.dtype == torch.float64


@pytest.mark.parametrize("samples, block", [(1, None), (7, None), (32, None), (32, 5), (32, 1), (9, 11)])
def test_eval_is_the_log_of_the_mean_over_the_bank(samples: int, block: int | None) -> None:
    module = SmoothedModule(network(), 0.5, samples=samples, seed=3, block=block).eval()
    with torch.no_grad():
        result = module(X)
        assert torch.allclose(result, explicit(module, X), atol=1e-6)
        assert torch.allclose(result.exp().sum(1), torch.ones(5))
        assert not torch.allclose(result, module.f(X).log_softmax(1), atol=1e-3)
        assert torch.equal(result, module(X))


def test_eval_of_one_input_does_not_depend_on_the_others() -> None:
    module = SmoothedModule(network(), 0.5, samples=16, seed=3).eval()
    with torch.no_grad():
        whole = module(X)
        for i in range(5):
            assert torch.allclose(module(X[i : i + 1])[0], whole[i], atol=1e-6)
        assert torch.allclose(module(X.flip(0)).flip(0), whole, atol=1e-6)


def test_seed_and_sigma_rule_the_bank() -> None:
    with torch.no_grad():
        base = SmoothedModule(network(), 0.5, seed=3).eval()(X)
        assert torch.equal(base, SmoothedModule(network(), 0.5, seed=3).eval()(X))
        for other in (SmoothedModule(network(), 0.5, seed=4), SmoothedModule(network(), 0.6, seed=3)):
            assert not torch.allclose(base, other.eval()(X), atol=1e-4)


@pytest.mark.parametrize("block", [None, 40, 5, 1])
def test_gradients_are_those_of_the_plain_mean_with_and_without_checkpoints(block: int | None) -> None:
    module = SmoothedModule(network(), 0.5, samples=16, seed=3, block=block).eval()
    labels = torch.tensor([0, 1, 2, 3, 0])

    def gradients(forward) -> list[Tensor]:
        x = X.clone().requires_grad_()
        module.zero_grad()
        nn.functional.nll_loss(forward(x), labels).backward()
        return [x.grad, *(p.grad.clone() for p in module.parameters())]

    for ours, plain in zip(gradients(module), gradients(lambda x: explicit(module, x)), strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)
        assert ours.abs().max() > 1e-4


def test_checkpoints_bound_the_rows_of_a_pass() -> None:
    record = Record()
    module = SmoothedModule(record, 0.5, samples=32, block=10).eval()
    x = X.clone().requires_grad_()
    module(x).sum().backward()
    assert max(len(seen) for seen in record.seen) == 10
    assert sum(len(seen) for seen in record.seen) == 2 * 32 * 5   # once forward, once again for the gradient
    record.seen.clear()
    with torch.no_grad():
        module(X)
    assert sum(len(seen) for seen in record.seen) == 32 * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inputs_meet_the_precision_of_the_network(dtype: torch.dtype) -> None:
    module = SmoothedModule(network(dtype=dtype), 0.5, samples=8).eval()
    reference = SmoothedModule(network(), 0.5, samples=8).eval()
    with torch.no_grad():
        for x in (X, X.double()):
            assert module(x).dtype == (dtype if dtype == torch.float64 else torch.float32)   # scores are never rounded
            assert torch.allclose(module(x).float(), reference(X), atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    assert BaseClassifier(nn.Flatten())(X.double()).dtype == torch.float64   # no parameter, no cast


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_train_adds_one_fresh_draw_of_the_right_scale(sigma: float) -> None:
    record = Record()
    module = SmoothedModule(record, sigma, seed=7).train()
    x = torch.full((2000, 20), 0.3)
    assert module(x).shape == (2000, 2)
    module(x)
    assert [len(seen) for seen in record.seen] == [2000, 2000]
    first, second = ((seen - x).double().numpy().ravel() for seen in record.seen)
    for added in (first, second):
        assert kstest(added, norm(scale=sigma).cdf).pvalue > 1e-6
        for wrong in (2 / 3, 3 / 2):
            assert kstest(added, norm(scale=sigma * wrong).cdf).pvalue < 1e-6
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))
    assert abs(np.corrcoef(first[:20_000], first[20_000:])[0, 1]) < 5 / np.sqrt(20_000)   # inputs share no noise


def test_noise_comes_before_the_transform() -> None:
    record = Record()
    module = SmoothedModule(record, 0.5, transform=Normalize(0.0, 0.25), seed=7).train()
    module(torch.zeros(1000, 20))
    assert float(record.seen[0].std()) == pytest.approx(0.5 / 0.25, rel=0.03)
    assert module.base is record


def test_networks_that_end_in_a_softmax_are_averaged_as_they_are() -> None:
    base = nn.Sequential(network(), nn.Softmax(dim=1))
    module = SmoothedModule(base, 0.5, samples=8, seed=3, probabilities=True).eval()
    with torch.no_grad():
        assert torch.allclose(module(X), SmoothedModule(network(), 0.5, samples=8, seed=3).eval()(X), atol=1e-6)
        assert torch.allclose(module(X), explicit(module, X, softmax=False), atol=1e-6)
        twice = SmoothedModule(base, 0.5, samples=8, seed=3).eval()
        assert not torch.allclose(module(X), twice(X), atol=1e-2)


def test_probability_zero_gives_a_finite_logarithm() -> None:
    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[200.0, -200.0]]).expand(len(x), 2)

    result = SmoothedModule(Certain(), 0.5).eval()(X)
    assert torch.isfinite(result).all()
    assert result[0, 0] == 0.0
    assert result[0, 1] < -80


def test_copies_and_pickles_behave_the_same() -> None:
    module = SmoothedModule(network(), 0.5, transform=Normalize(0.1, 0.3), samples=8, seed=3, block=7)
    module.train()(X)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    training = module(X)
    evaluation = module.eval()(X)
    for twin in twins:
        assert twin.training
        assert torch.equal(twin(X), training)   # the count of draws travels along
        assert torch.equal(twin.eval()(X), evaluation)
        with torch.no_grad():
            twin.base[0].weight.zero_()
        assert torch.equal(module(X), evaluation)


def test_bad_settings_are_named() -> None:
    for sigma in (0.0, float("nan")):
        with pytest.raises(ValueError, match="sigma must be finite"):
            SmoothedModule(network(), sigma)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        SmoothedModule(network(), 0.5, samples=0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        SmoothedModule(network(), 0.5, seed=1.5)


def test_what_looks_like_probabilities() -> None:
    logits = network()(X)
    assert looks_like_probabilities(logits.softmax(1))
    assert not looks_like_probabilities(logits)
    assert not looks_like_probabilities(torch.tensor([[1.5, -0.5]]))
    assert not looks_like_probabilities(torch.tensor([[0.5, 0.5], [0.5, 0.6]]))


def test_normalize_refuses_means_that_cannot_be_meant():
    with pytest.raises(ValueError, match="mean must be finite"):
        Normalize(float("nan"), 1.0)
    with pytest.raises(ValueError, match="mean has 3 entries, but x has 1 channels"):
        Normalize([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])(torch.zeros(2, 1, 4, 4))
