"""ART's attacks and our own against the smoothed classifier, judged by fresh votes and joined with certificates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    AutoProjectedGradientDescent,
    BoundaryAttack,
    BrendelBethgeAttack,
    CarliniL2Method,
    DeepFool,
    FastGradientMethod,
    HopSkipJump,
    ProjectedGradientDescent,
    ProjectedGradientDescentNumpy,
    ShadowAttack,
    SquareAttack,
)
from scipy.stats import norm
from support import TEST, TRAIN, X, Y, digits_network, smooth
from torch import nn

from art_rs_plugins import Certificates, Gaussian, PyTorchSmoothedClassifier, audit
from art_rs_plugins.benchmark.attacks import ATTACKS, Attack, run_attack
from art_rs_plugins.smoothing.adversary import SmoothedPGD


@pytest.fixture(scope="module")
def trained() -> PyTorchSmoothedClassifier:
    network = digits_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    estimator = smooth(network, optimizer=optimizer, clip_values=(0, 1), bank_samples=16)
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=25, batch_size=64)
    return estimator


@pytest.fixture(scope="module")
def eight(trained) -> tuple[np.ndarray, np.ndarray]:
    """Eight digits that the smoothed classifier gets right."""
    right = trained.predict(X[TEST], seed=0).argmax(axis=1) == Y[TEST]
    return X[TEST][right][:8], Y[TEST][right][:8]


def smoothed_accuracy(estimator: PyTorchSmoothedClassifier, x: np.ndarray, y: np.ndarray) -> float:
    found = estimator.predictions(x, n=1_000, seed=123)
    return float(np.mean((found.prediction == y) & ~found.abstained))


# ---------------------------------------------------------------------------------------------- on the estimator


@pytest.mark.parametrize(
    "make",
    [
        lambda e: FastGradientMethod(e, norm=2, eps=2.5),
        lambda e: ProjectedGradientDescent(e, norm=2, eps=2.0, eps_step=0.3, max_iter=15, verbose=False),
        lambda e: ProjectedGradientDescentNumpy(e, norm=2, eps=2.0, eps_step=0.3, max_iter=15, verbose=False),
        lambda e: ProjectedGradientDescent(e, norm=np.inf, eps=0.4, eps_step=0.05, max_iter=15, verbose=False),
    ],
    ids=["fgm", "pgd-torch", "pgd-numpy", "pgd-linf"],
)
def test_gradient_attacks_on_the_estimator_change_the_smoothed_prediction(trained, eight, make):
    x, y = eight
    assert smoothed_accuracy(trained, x, y) == 1.0
    adversarial = make(trained).generate(x, np.eye(10, dtype=np.float32)[y])
    assert smoothed_accuracy(trained, adversarial, y) <= 0.5


def test_pgd_takes_the_torch_path_and_the_smoothed_gradient(trained, eight):
    attack = ProjectedGradientDescent(trained, norm=2, eps=1.0, eps_step=0.5, max_iter=1, verbose=False)
    assert "pytorch" in type(attack._attack).__module__
    x, y = eight
    moved = attack.generate(x, np.eye(10, dtype=np.float32)[y]) - x
    gradient = trained.loss_gradient(x, y)
    inside = (x > 0.05) & (x < 0.95)   # the attack clips
    assert np.all(np.sign(moved[inside]) == np.sign(gradient[inside]))


def test_what_the_other_attacks_do_on_the_estimator(trained, eight):
    """Pinned: `predict` is one-hot with abstentions, which these cannot use. `attack_view` is for them."""
    x, y = eight
    one_hot = np.eye(10, dtype=np.float32)[y]
    certain = smooth(trained.model.base, scale=0.01, clip_values=(0, 1))   # it votes on the all-ones image
    with pytest.raises(ValueError, match="seems to predict probabilities"):
        AutoProjectedGradientDescent(certain, loss_type="cross_entropy")
    with pytest.raises(ValueError, match="seems to predict probabilities"):
        BrendelBethgeAttack(certain)
    for attack in (
        CarliniL2Method(trained, max_iter=2, binary_search_steps=2, verbose=False),
        DeepFool(trained, max_iter=5, verbose=False),
        SquareAttack(trained, norm=np.inf, eps=0.3, max_iter=20, verbose=False),
    ):
        adversarial = attack.generate(x, one_hot)
        assert smoothed_accuracy(trained, np.nan_to_num(adversarial), y) >= 0.75, type(attack).__name__


def test_shadow_attack_brings_its_own_noise(trained, eight):
    x, y = eight
    attack = ShadowAttack(trained, sigma=0.25, nb_steps=3, batch_size=4, learning_rate=0.1, verbose=False)
    assert attack.generate(x[:1], np.eye(10, dtype=np.float32)[[(y[0] + 1) % 10]]).shape == (1, 1, 8, 8)


# ---------------------------------------------------------------------------------------------- on the view


@pytest.mark.filterwarnings("ignore::RuntimeWarning:art.attacks.evasion.square_attack")
@pytest.mark.parametrize(
    ("make", "most"),
    [
        (
            lambda v: AutoProjectedGradientDescent(
                v,
                norm=2,
                eps=2.0,
                eps_step=1.0,
                max_iter=10,
                nb_random_init=1,
                loss_type="cross_entropy",
                verbose=False,
            ),
            0.5,
        ),
        (
            lambda v: AutoProjectedGradientDescent(
                v,
                norm=np.inf,
                eps=0.4,
                eps_step=0.2,
                max_iter=10,
                nb_random_init=1,
                loss_type="difference_logits_ratio",
                verbose=False,
            ),
            0.5,
        ),
        (lambda v: CarliniL2Method(v, confidence=2.0, max_iter=20, learning_rate=0.1, verbose=False), 0.5),
        (lambda v: DeepFool(v, max_iter=20, epsilon=0.5, verbose=False), 0.5),
        (lambda v: SquareAttack(v, norm=np.inf, eps=0.5, max_iter=150, verbose=False), 0.75),
        (lambda v: HopSkipJump(v, max_iter=2, max_eval=200, init_eval=20, verbose=False), 0.9),
        (lambda v: BoundaryAttack(v, targeted=False, max_iter=5, num_trial=5, verbose=False), 0.9),
    ],
    ids=["autopgd-ce", "autopgd-dlr", "carlini", "deepfool", "square", "hopskipjump", "boundary"],
)
def test_attacks_on_the_view_change_the_smoothed_prediction(trained, eight, make, most):
    x, y = eight
    np.random.seed(0)   # noqa: NPY002 - ART's attacks draw from NumPy's global generator
    adversarial = make(trained.attack_view()).generate(x, np.eye(10, dtype=np.float32)[y])
    assert np.isfinite(adversarial).all()
    assert smoothed_accuracy(trained, adversarial, y) <= most


# ---------------------------------------------------------------------------------------------- smoothed PGD


def test_smoothed_pgd_finds_the_shortest_way_out_of_a_half_space():
    """For a linear classifier the best direction is its normal: the attack must reach the budget along it."""
    network = nn.Linear(8, 2)
    normal = (network.weight[1] - network.weight[0]).detach()
    normal = normal / normal.norm()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = network(x).argmax(dim=1)
    found = SmoothedPGD(steps=30, samples=64).perturb(network, x, labels, Gaussian(0.5), 0.7, seed=1)
    moved = (found - x).double()
    assert np.allclose(moved.norm(dim=1), 0.7, atol=1e-4)
    assert torch.all(moved.norm(dim=1) <= 0.7)
    along = (moved @ normal.double()) * torch.where(labels == 0, 1.0, -1.0)
    assert torch.all(along > 0.69)
    again = SmoothedPGD(steps=30, samples=64).perturb(network, x, labels, Gaussian(0.5), 0.7, seed=1)
    assert torch.equal(found, again)


def test_smoothed_pgd_respects_limits_and_numbers(trained, eight):
    x, y = (torch.from_numpy(part) for part in eight)
    limits = [torch.tensor(0.0), torch.tensor(1.0)]
    found = SmoothedPGD(steps=5, samples=4).perturb(
        trained.model.f.eval(), x, y, Gaussian(0.25), 0.5, seed=0, clip_values=limits
    )
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    assert torch.all((found - x).flatten(1).norm(dim=1) <= 0.5)
    for wrong in ({"steps": 0}, {"samples": 0}, {"block": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            SmoothedPGD(**wrong)
    with pytest.raises(ValueError, match="budget must be >= 0"):
        SmoothedPGD().perturb(trained.model.f, x, y, Gaussian(0.25), float("nan"), seed=0)


# ---------------------------------------------------------------------------------------------- runs and audits


@pytest.mark.filterwarnings("ignore::RuntimeWarning:art.attacks.evasion.square_attack")
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_named_attack_stays_in_its_budget_and_contradicts_nothing(trained, eight, name):
    x, y = eight
    certificates = trained.certificates(x, n=2_000, seed=0)
    outcomes = run_attack(
        ATTACKS[name], trained, x, y, budgets=(0.5, 2.5), certificates=certificates, steps=8, n=200, seed=1
    )
    assert np.all(outcomes.distance <= outcomes.budgets[:, None] * (1 + 1e-5))
    assert outcomes.distance[1].max() > 0.1
    result = audit(certificates, outcomes, y)
    assert result.contradictions == ()
    assert np.all(result.certified.accuracy <= result.attacked)
    assert np.all(np.diff(result.wrong) >= 0)


def half_space() -> PyTorchSmoothedClassifier:
    network = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    return smooth(network, (2,), 2, scale=0.5, bank_samples=64)


def test_an_inflated_certificate_is_contradicted_and_an_honest_one_is_not():
    x = np.stack([np.full(6, 0.4), np.linspace(-1, 1, 6)], axis=1).astype(np.float32)
    labels = np.zeros(6, np.int64)
    estimator = half_space()
    honest = estimator.certificates(x, n=20_000, seed=0)
    fields = {name: getattr(honest, name) for name in honest.__slots__}
    inflated = Certificates(**{**fields, "radius": honest.radius * 1.5})
    for certificates, expected in ((honest, 0), (inflated, 6)):
        outcomes = run_attack(
            ATTACKS["smoothed-pgd"],
            estimator,
            x,
            labels,
            budgets=(0.2, 0.39, 0.5),
            certificates=certificates,
            steps=20,
            n=1_000,
            seed=2,
        )
        result = audit(certificates, outcomes, labels)
        assert len(result.contradictions) == expected
    case = result.contradictions[0]
    assert (case.certified, case.adversarial, case.budget) == (0, 1, 0.5)
    assert 0.4 < case.distance < case.radius


def test_a_lucky_vote_is_suspected_but_not_confirmed():
    """Just inside the true radius a few votes may be wrong; many fresh ones are not fooled."""
    estimator = half_space()
    x = np.array([[0.4, 0.0]], np.float32)
    certificate = estimator.certificates(x, n=1_000, seed=0)
    liar = half_space()
    liar.predictions = lambda z, **settings: (   # type: ignore[method-assign]
        estimator.predictions(z, **settings)
        if settings["n"] > 1_000
        else half_space().predictions(-np.asarray(z), **settings)
    )
    outcomes = run_attack(
        Attack("still", lambda *_: lambda z, y: z.copy()),
        liar,
        x,
        np.array([0]),
        budgets=(0.1,),
        certificates=certificate,
        n=500,
        seed=0,
    )
    result = audit(certificate, outcomes, np.array([0]))
    assert len(result.suspected) == 1
    assert result.contradictions == ()


def test_attacks_that_return_nan_count_as_no_attack(caplog):
    x = np.array([[0.4, 0.0], [0.5, 0.0]], np.float32)
    broken = Attack("broken", lambda *_: lambda z, y: np.where(np.arange(2)[:, None] == 0, np.nan, z + 5.0))
    outcomes = run_attack(broken, half_space(), x, np.zeros(2, int), budgets=(0.25,), seed=0)
    assert outcomes.distance[0].tolist() == pytest.approx([0.0, 0.25], abs=1e-6)
    assert "NaN or Inf for 1 inputs" in caplog.text


def test_budgets_and_labels_are_checked():
    x = np.array([[0.4, 0.0]], np.float32)
    for budgets in ((), (0.5, 0.25), (0.0, 1.0), (float("nan"),)):
        with pytest.raises(ValueError, match="budgets must be ascending and > 0"):
            run_attack(ATTACKS["pgd"], half_space(), x, np.array([0]), budgets=budgets)
    with pytest.raises(ValueError, match="labels must have shape"):
        run_attack(ATTACKS["pgd"], half_space(), x, np.array([0, 1]), budgets=(0.5,))


def test_the_attack_reaches_what_the_certificate_leaves_open():
    """On a half space both sides of the bracket are known: the attack must succeed just beyond the true distance."""
    estimator = half_space()
    distances = np.array([0.2, 0.4, 0.6])
    x = np.stack([distances, np.zeros(3)], axis=1).astype(np.float32)
    certificates = estimator.certificates(x, n=100_000, seed=0)
    outcomes = run_attack(
        ATTACKS["smoothed-pgd"], estimator, x, np.zeros(3, int), budgets=(0.15, 0.3, 0.5, 0.7), n=5_000, seed=0
    )
    result = audit(certificates, outcomes, np.zeros(3, int))
    assert np.allclose(result.attacked, [1.0, 2 / 3, 1 / 3, 0.0])
    assert np.allclose(result.certified.accuracy, [1.0, 2 / 3, 1 / 3, 0.0])
    assert np.all(certificates.radius < distances)
    assert np.allclose(norm.cdf(distances / 0.5), certificates.count / 100_000, atol=0.01)
