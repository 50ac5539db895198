"""ART's attacks and our own against the smoothed classifier, judged by fresh votes and joined with certificates."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
import types
import warnings
from pathlib import Path

import art.attacks.evasion
import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    AutoAttack,
    AutoProjectedGradientDescent,
    BoundaryAttack,
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
from art_rs_plugins.benchmark.evasion import find_examples
from art_rs_plugins.smoothing.adversary import SmoothedPGD
from art_rs_plugins.theory.metrics import certified_accuracy, certified_correct


@pytest.fixture(scope="module")
def fitted() -> PyTorchSmoothedClassifier:
    network = digits_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    estimator = smooth(network, optimizer=optimizer, clip_values=(0, 1), bank_samples=16)
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=25, batch_size=64)
    return estimator


@pytest.fixture
def trained(fitted) -> PyTorchSmoothedClassifier:
    """A copy for each test, which may do to it what it likes."""
    return copy.deepcopy(fitted)


@pytest.fixture(scope="module")
def eight(fitted) -> tuple[np.ndarray, np.ndarray]:
    """Eight digits that the smoothed classifier gets right."""
    right = fitted.predict(X[TEST], seed=0).argmax(axis=1) == Y[TEST]
    return X[TEST][right][:8], Y[TEST][right][:8]


def smoothed_accuracy(estimator: PyTorchSmoothedClassifier, x: np.ndarray, y: np.ndarray) -> float:
    found = estimator.predictions(x, n=1_000, seed=123)
    return float(np.mean((found.prediction == y) & ~found.abstained))


def true_votes(estimator: PyTorchSmoothedClassifier, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of fresh votes for the true class: near 1/2 at a boundary, where the answer itself is a coin flip."""
    return estimator.predictions(x, n=1_000, seed=123).votes[np.arange(len(y)), y] / 1_000


def distances(found: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.linalg.norm((found - x).reshape(len(x), -1), axis=1)


@pytest.fixture(scope="module")
def starts(fitted, eight) -> np.ndarray:
    """For each of the eight the nearest digit of another class: ART draws starts that no seed brings back."""
    x, y = eight
    right = fitted.predict(X[TEST], seed=0).argmax(axis=1) == Y[TEST]
    pool, classes = X[TEST][right], Y[TEST][right]
    far = np.stack([distances(pool, np.broadcast_to(one, pool.shape)) for one in x])
    far[classes[None] == y[:, None]] = np.inf
    return pool[far.argmin(axis=1)]


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning:art.attacks.evasion.square_attack")
@pytest.mark.parametrize(
    ("make", "least", "most"),
    [
        (
            lambda e: CarliniL2Method(
                e,
                confidence=2.0,
                max_iter=10,
                binary_search_steps=2,
                initial_const=10.0,
                learning_rate=0.1,
                verbose=False,
            ),
            0.8,
            0.2,
        ),
        (lambda e: DeepFool(e, max_iter=5, verbose=False), 0.75, 0.6),
        (lambda e: SquareAttack(e, norm=np.inf, eps=0.3, max_iter=100, verbose=False), 0.65, 0.5),
    ],
    ids=["carlini", "deepfool", "square"],
)
def test_what_the_other_attacks_do_on_the_estimator(trained, eight, make, least, most):
    """Pinned: what does nothing, or little, against votes succeeds on `attack_view` with the same settings.

    Judged by shares of votes: DeepFool and Square stop at the boundary, where answers are coin flips.
    """
    x, y = eight
    one_hot = np.eye(10, dtype=np.float32)[y]
    assert true_votes(trained, x, y).mean() >= 0.85
    found = []
    for target in (trained, trained.attack_view()):
        np.random.seed(0)   # noqa: NPY002
        found.append(true_votes(trained, np.nan_to_num(make(target).generate(x, one_hot)), y).mean())
    assert found[0] >= least
    assert found[1] <= most


@pytest.mark.parametrize(
    "make",
    [
        lambda e: HopSkipJump(e, max_iter=1, max_eval=50, init_eval=10, init_size=20, verbose=False),
        lambda e: BoundaryAttack(e, targeted=False, max_iter=2, num_trial=2, init_size=20, verbose=False),
    ],
    ids=["hopskipjump", "boundary"],
)
def test_attacks_that_need_decisions_run_on_the_estimator(trained, eight, starts, make):
    """Pinned: they see fresh votes at every query, and abstentions as class 0.

    They come closer than they started, and stop where few of the votes are still right: not at accuracies, which are
    coin flips there.
    """
    x, y = eight
    np.random.seed(0)   # noqa: NPY002
    adversarial = make(trained).generate(x, np.eye(10, dtype=np.float32)[y], x_adv_init=starts)
    assert np.isfinite(adversarial).all()
    assert distances(adversarial, x).mean() <= 0.98 * distances(starts, x).mean()
    assert true_votes(trained, adversarial, y).mean() <= 0.6
    undecided = smooth(Undecided(), clip_values=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)   # HopSkipJump divides by a variance of zero
        still = make(undecided).generate(x[:2], np.eye(10, dtype=np.float32)[[0, 0]])
    assert np.array_equal(still, x[:2])   # every query abstains, which is taken for the right class 0


class Undecided(nn.Module):
    """Ties vote for no class: the smoothed classifier abstains everywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 10)


def test_refusals_hang_on_one_input(trained):
    """Pinned: ART takes votes for probabilities if the all-ones input has a class, and for logits if it abstains."""
    constructors = (
        lambda e: AutoProjectedGradientDescent(e, loss_type="cross_entropy"),
        lambda e: AutoAttack(e),
        lambda e: brendel_bethge()(e),
    )
    certain = smooth(trained.model.base, scale=0.01, clip_values=(0, 1))
    undecided = smooth(Undecided(), clip_values=(0, 1))
    for construct in constructors:
        with pytest.raises(ValueError, match="seems to predict probabilities"):
            construct(certain)
        construct(undecided)


def test_shadow_attack_brings_its_own_noise(trained, eight, monkeypatch):
    x, y = eight
    asked, gradient = [], trained.loss_gradient
    monkeypatch.setattr(trained, "loss_gradient", lambda **call: asked.append(call) or gradient(**call))
    attack = ShadowAttack(trained, sigma=0.25, nb_steps=3, batch_size=4, learning_rate=0.1, verbose=False)
    adversarial = attack.generate(x[:1], np.eye(10, dtype=np.float32)[[(y[0] + 1) % 10]])
    assert [call["sampling"] for call in asked] == [False] * 3
    assert [len(call["x"]) for call in asked] == [4] * 3
    assert not np.allclose(adversarial, x[:1])


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
        (lambda v: DeepFool(v, max_iter=20, epsilon=0.5, verbose=False), 0.5),
        (lambda v: SquareAttack(v, norm=np.inf, eps=0.5, max_iter=150, verbose=False), 0.75),
    ],
    ids=["autopgd-ce", "autopgd-dlr", "deepfool", "square"],
)
def test_attacks_on_the_view_change_the_smoothed_prediction(trained, eight, make, most):
    x, y = eight
    np.random.seed(0)   # noqa: NPY002 - ART's attacks draw from NumPy's global generator
    adversarial = make(trained.attack_view()).generate(x, np.eye(10, dtype=np.float32)[y])
    assert np.isfinite(adversarial).all()
    assert smoothed_accuracy(trained, adversarial, y) <= most


@pytest.mark.parametrize(
    "make",
    [
        lambda v: HopSkipJump(v, max_iter=2, max_eval=200, init_eval=20, verbose=False),
        lambda v: BoundaryAttack(v, targeted=False, max_iter=5, num_trial=5, verbose=False),
    ],
    ids=["hopskipjump", "boundary"],
)
def test_attacks_that_need_decisions_come_closer_on_the_view(trained, eight, starts, make):
    x, y = eight
    np.random.seed(0)   # noqa: NPY002
    adversarial = make(trained.attack_view()).generate(x, np.eye(10, dtype=np.float32)[y], x_adv_init=starts)
    assert distances(adversarial, x).mean() <= 0.93 * distances(starts, x).mean()
    assert true_votes(trained, adversarial, y).mean() <= 0.4


def brendel_bethge() -> type:
    """ART's attack with its optimisers as plain Python: numba takes 20 seconds to compile them."""

    def plain(spec):
        def keep(family: type) -> type:
            family.class_type = types.SimpleNamespace(instance_type=None)
            return family

        return keep

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numba.experimental", types.SimpleNamespace(jitclass=plain))
        path = Path(art.attacks.evasion.__file__).with_name("brendel_bethge.py")
        spec = importlib.util.spec_from_file_location("brendel_bethge_in_python", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.BrendelBethgeAttack


def test_brendel_bethge_on_the_view(trained, eight, starts):
    """It ends a rounding error beyond the view's boundary: no nearer than there, and no farther than it must be.

    Answers there are coin flips, for fresh votes and for views asked in another batch; a step along the ray they are
    not.
    """
    x, y = eight
    one_hot, view = np.eye(10, dtype=np.float32)[y], trained.attack_view()
    attack = brendel_bethge()(view, norm=2, steps=20, lr=0.1)
    assert attack.estimator.model is view.model

    def find(rows: slice) -> np.ndarray:
        with np.errstate(all="ignore"):   # its solver divides by zero where it has nothing left to do
            return attack.generate(x[rows], one_hot[rows], starting_points=starts[rows].copy())

    moved = np.concatenate([find(slice(at, at + 1)) for at in range(8)]) - x
    assert np.all(view.predict(x + 1.02 * moved).argmax(axis=1) != y)
    assert np.mean(view.predict(x + 0.95 * moved).argmax(axis=1) == y) >= 0.75
    assert smoothed_accuracy(trained, x + 1.25 * moved, y) <= 0.125
    assert smoothed_accuracy(trained, x + 0.5 * moved, y) >= 0.875
    distance, start = distances(x + moved, x), distances(starts, x)
    assert np.all(distance <= 0.8 * start)
    nearest = distances(DeepFool(view, max_iter=20, epsilon=0.01, verbose=False).generate(x, one_hot), x)
    assert distance.sum() <= 1.3 * nearest.sum()
    # Pinned: ART looks for the boundary of a whole batch at once, and leaves one with several classes where it began.
    assert distances(find(slice(8)), x).sum() >= 1.5 * distance.sum()


def test_auto_attack_on_the_view(trained, eight):
    pytest.importorskip("multiprocess", reason="ART's AutoAttack imports it without declaring it")
    x, y = eight
    np.random.seed(0)   # noqa: NPY002
    attack = AutoAttack(trained.attack_view(), norm=2, eps=2.0, eps_step=0.5, batch_size=8)
    small = {"max_iter": 5, "nb_random_init": 1, "nb_restarts": 1, "verbose": False}
    for part in attack.attacks:
        part.set_params(**{name: value for name, value in small.items() if name in part.attack_params})
    assert len(attack.attacks) == 4
    adversarial = attack.generate(x, np.eye(10, dtype=np.float32)[y])
    distance = np.linalg.norm((adversarial - x).reshape(8, -1), axis=1)
    assert np.all(distance <= 2.0 * (1 + 1e-5))
    assert smoothed_accuracy(trained, adversarial, y) <= 0.25


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


def test_smoothed_pgd_by_name_keeps_the_estimators_range(trained, eight):
    x, y = eight
    free = smooth(trained.model.base, bank_samples=16)
    inside, outside = (ATTACKS["smoothed-pgd"].make(e, 2.5, 8, 0)(x, y) for e in (trained, free))
    assert inside.min() >= 0.0
    assert inside.max() <= 1.0
    assert outside.min() < -0.05
    assert outside.max() > 1.05


def test_smoothed_pgd_by_name_keeps_the_range_of_each_channel():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = np.full((4, 3, 2, 2), 0.5, np.float32)
    tops = np.array([1.0, 2.0, 3.0])
    labels = np.zeros(4, int)
    for shape in ((3,), (3, 1, 1)):
        clip_values = (np.zeros(shape), tops.reshape(shape))
        estimator = smooth(network, (3, 2, 2), 2, bank_samples=8, clip_values=clip_values)
        found = ATTACKS["smoothed-pgd"].make(estimator, 5.0, 10, 0)(x, labels)
        assert found.min() >= 0.0
        assert np.all(found.max(axis=(0, 2, 3)) <= tops)
        assert found.max() > 1.0


# ---------------------------------------------------------------------------------------------- runs and audits


@pytest.mark.filterwarnings("ignore::RuntimeWarning:art.attacks.evasion.square_attack")
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_named_attack_stays_in_its_budget_and_contradicts_nothing(trained, eight, name, monkeypatch):
    if name == "autoattack":
        pytest.importorskip("multiprocess", reason="ART's AutoAttack imports it without declaring it")
    monkeypatch.setattr(art.attacks.evasion, "BrendelBethgeAttack", brendel_bethge(), raising=False)
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


def test_brendel_bethge_by_name_moves_every_input_of_a_batch(trained, eight, monkeypatch):
    """In a batch ART's own stays at its starting points: no step of one search is right for all inputs."""
    x, y = eight
    family, begun = brendel_bethge(), []

    class Watched(family):
        def generate(self, x, y=None, **kwargs):
            begun.append(kwargs["starting_points"].copy())
            return super().generate(x, y, **kwargs)

    monkeypatch.setattr(art.attacks.evasion, "BrendelBethgeAttack", Watched, raising=False)
    found = ATTACKS["brendel-bethge"].make(trained, 1.0, 20, 0)(x, y)
    assert [len(points) for points in begun] == [1] * len(x)
    start, end = (np.linalg.norm((z - x).reshape(len(x), -1), axis=1) for z in (np.concatenate(begun), found))
    assert (end < 0.9 * start).all()


@pytest.mark.parametrize("name", ["pgd-linf", "smoothed-pgd-linf", "square"])
def test_attacks_in_linf_stay_in_the_largest_ball_within_the_l2_budget(trained, eight, name):
    x, y = eight
    found = find_examples(ATTACKS[name], trained, x, y, budgets=(0.8,), steps=8, seed=0)[0]
    moved = np.abs(found - x).reshape(8, -1)
    assert np.all(moved <= 0.8 / 8 + 1e-6)   # sqrt(64) pixels
    assert np.all(np.linalg.norm(moved, axis=1) <= 0.8 * (1 + 1e-6))
    assert moved.max() > 0.099
    assert found.min() >= 0.0
    assert found.max() <= 1.0


def test_smoothed_linf_steps_reach_the_corner_that_a_linear_classifier_asks_for():
    """The strongest linf step against a half space is the sign of its normal, whatever the noise."""
    network = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    estimator = smooth(network, (4,), 2, scale=0.5, bank_samples=16)
    x = np.full((2, 4), 0.3, np.float32)
    found = find_examples(ATTACKS["smoothed-pgd-linf"], estimator, x, [0, 1], budgets=(0.4,), steps=5, seed=0)[0]
    corner = 0.4 / 2 * np.array([-1.0, 1.0, -1.0, -1.0])
    assert np.allclose(found - x, np.stack([corner, -corner]), atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:art.attacks.evasion.square_attack")
@pytest.mark.parametrize("name", ["square", "hopskipjump", "boundary", "autopgd"])
def test_a_seed_repeats_an_attack_and_the_global_generators_go_on(trained, eight, name):
    """ART draws from NumPy's and Python's generators, and starts of its own from entropy that no seed brings back."""
    x, y = eight
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()   # noqa: NPY002
    first, again, other = (
        find_examples(ATTACKS[name], trained, x, y, budgets=(1.0,), steps=3, seed=seed) for seed in (1, 1, 2)
    )
    after = np.random.get_state()[1], random.getstate(), torch.get_rng_state()   # noqa: NPY002
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(before[0], after[0])
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


def test_decision_based_attacks_leave_what_is_wrong_already(trained, eight):
    x, y = eight
    found = find_examples(ATTACKS["hopskipjump"], trained, x, (y + 1) % 10, budgets=(1.0,), steps=2, seed=0)[0]
    assert np.array_equal(found, x)


def test_brendel_bethge_says_what_it_needs(trained, eight, monkeypatch):
    monkeypatch.delattr(art.attacks.evasion, "BrendelBethgeAttack", raising=False)
    with pytest.raises(ImportError, match=r"needs numba: pip install 'art-rs-plugins\[attacks\]'"):
        ATTACKS["brendel-bethge"].make(trained, 1.0, 3, 0)


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


def test_nothing_is_attacked_before_everything_is_checked():
    def attacked(*_):
        raise AssertionError("an attack ran")

    x, estimator = np.array([[0.4, 0.0], [0.5, 0.0]], np.float32), half_space()
    certificates = estimator.certificates(x, n=100, seed=0)
    wrong = [
        ({"labels": np.array([0, 2])}, r"labels must be class indices in \[0, 2\)"),
        ({"labels": np.array([-1, 0])}, r"labels must be class indices in \[0, 2\)"),
        ({"x": np.array([[0.4, np.nan], [0.5, 0.0]])}, "x must be finite"),
        ({"x": np.array([[0.4, np.inf], [0.5, 0.0]])}, "x must be finite"),
        ({"certificates": certificates[:1]}, "certificates"),
        ({"n": 10}, r"n=10 votes can never reach alpha"),
        ({"n": 0}, "n must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
    ]
    for change, words in wrong:
        call = {"x": x, "labels": np.array([0, 0]), "certificates": certificates, **change}
        with pytest.raises(ValueError, match=words):
            run_attack(Attack("any", attacked), estimator, call.pop("x"), call.pop("labels"), budgets=(0.5,), **call)


@pytest.mark.parametrize("kind", ["committed", "conditional"])
def test_what_is_not_certified_is_never_counted_as_certified(kind):
    x, labels, estimator = np.array([[0.4, 0.0], [0.5, 0.0]], np.float32), np.zeros(2, int), half_space()
    honest = estimator.certificates(x, n=1_000, seed=0)
    other = Certificates(**{**{name: getattr(honest, name) for name in honest.__slots__}, "kind": kind})
    outcomes = run_attack(ATTACKS["fgm"], estimator, x, labels, budgets=(0.1,), n=100, seed=0)
    for count in (
        lambda c: certified_accuracy(c, labels, [0.1]),
        lambda c: certified_correct(c, labels),
        lambda c: audit(c, outcomes, labels),
    ):
        count(honest)
        with pytest.raises(ValueError, match=kind):
            count(other)


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
