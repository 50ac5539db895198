"""ART's evasion attacks, and smoothed gradient ascent, by name: each as it can meet a classifier that votes.

Attacks that need gradients alone take the estimator. Those that need scores, or decisions that do not change from one
query to the next, take its `attack_view`; fresh votes of the estimator judge what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
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
    SquareAttack,
)
from numpy.typing import NDArray

from art_rs_plugins.benchmark.evasion import Attack, Craft, Images, linf_budget, run_attack
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.estimators.inputs import as_limits
from art_rs_plugins.smoothing.adversary import SmoothedPGD
from art_rs_plugins.smoothing.modules import SmoothedModule
from art_rs_plugins.smoothing.noise import Gaussian, derive_seed
from art_rs_plugins.smoothing.sampling import evaluating

__all__ = ["ATTACKS", "Attack", "run_attack"]

OVERSHOOT = 0.1
"""Part by which an example on the boundary is moved beyond it: votes on the boundary abstain."""

STARTS = 64
"""Random inputs, beside those of the batch, from which a decision-based attack may start."""


def _fgm(estimator: PyTorchSmoothedClassifier, budget: float, _steps: int, _seed: int) -> Craft:
    return _generate(FastGradientMethod(estimator, norm=2, eps=budget))


def _pgd(family: type, norm: float = 2) -> Callable[[PyTorchSmoothedClassifier, float, int, int], Craft]:
    def make(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, _seed: int) -> Craft:
        eps = budget if norm == 2 else linf_budget(estimator, budget)
        settings = {"norm": norm, "eps": eps, "eps_step": 2.5 * eps / steps, "max_iter": steps, "verbose": False}
        return _generate(family(estimator, **settings))

    return make


def _auto_pgd(loss: str) -> Callable[[PyTorchSmoothedClassifier, float, int, int], Craft]:
    def make(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, _seed: int) -> Craft:
        return _generate(_one_auto_pgd(estimator.attack_view(), budget, steps, loss))

    return make


def _one_auto_pgd(view: Any, budget: float, steps: int, loss: str) -> AutoProjectedGradientDescent:
    settings = {"eps": budget, "eps_step": 2.0 * budget, "max_iter": steps, "nb_random_init": 1, "verbose": False}
    return AutoProjectedGradientDescent(view, norm=2, loss_type=loss, **settings)


def _auto_attack(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, _seed: int) -> Craft:
    """ART's four, with `steps` in place of 100 and one start each."""
    view = estimator.attack_view()
    losses = ("cross_entropy", "difference_logits_ratio") if estimator.nb_classes > 2 else ("cross_entropy",)
    parts = [
        *(_one_auto_pgd(view, budget, steps, loss) for loss in losses),
        DeepFool(view, max_iter=steps, epsilon=OVERSHOOT, verbose=False),
        _square_attack(view, budget, steps),
    ]
    return _generate(AutoAttack(view, norm=2, eps=budget, eps_step=2.0 * budget, attacks=parts))


def _square(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, _seed: int) -> Craft:
    return _generate(_square_attack(estimator.attack_view(), budget, steps))


def _square_attack(view: Any, budget: float, steps: int) -> SquareAttack:
    """In linf: in l2 ART's divides by norms of zero, and asks about NaN."""
    return SquareAttack(view, norm=np.inf, eps=linf_budget(view, budget), max_iter=10 * steps, verbose=False)


def _carlini(estimator: PyTorchSmoothedClassifier, _budget: float, steps: int, _seed: int) -> Craft:
    settings = {"confidence": 1.0, "learning_rate": 0.1, "initial_const": 1.0, "binary_search_steps": 3}
    return _generate(CarliniL2Method(estimator.attack_view(), max_iter=steps, verbose=False, **settings))


def _deepfool(estimator: PyTorchSmoothedClassifier, _budget: float, steps: int, _seed: int) -> Craft:
    return _generate(DeepFool(estimator.attack_view(), max_iter=steps, epsilon=OVERSHOOT, verbose=False))


def _hop_skip_jump(estimator: PyTorchSmoothedClassifier, _budget: float, steps: int, seed: int) -> Craft:
    view = estimator.attack_view()
    attack = HopSkipJump(view, norm=2, max_iter=steps, max_eval=10 * steps, init_eval=steps, verbose=False)
    return _from_start(attack, view, seed)


def _boundary(estimator: PyTorchSmoothedClassifier, _budget: float, steps: int, seed: int) -> Craft:
    view = estimator.attack_view()
    attack = BoundaryAttack(view, targeted=False, max_iter=5 * steps, num_trial=5, sample_size=10, verbose=False)
    return _from_start(attack, view, seed)


def _brendel_bethge(estimator: PyTorchSmoothedClassifier, _budget: float, steps: int, seed: int) -> Craft:
    try:
        from art.attacks.evasion import BrendelBethgeAttack
    except ImportError as error:
        raise ImportError("brendel-bethge needs numba: pip install 'art-rs-plugins[attacks]'") from error
    view = estimator.attack_view()
    return _from_start(_OneByOne(BrendelBethgeAttack(view, norm=2, steps=steps, lr=0.1)), view, seed)


class _OneByOne:
    """ART's Brendel-Bethge seeks one boundary for a whole batch, and stays where it began if there is none."""

    def __init__(self, attack: Any) -> None:
        self.attack = attack

    def generate(self, x: Images, y: NDArray[np.int64], *, starting_points: Images, **_: Any) -> Images:
        truth = np.eye(self.attack.estimator.nb_classes, dtype=np.float32)[y]
        found = [
            self.attack.generate(x[row], truth[row], starting_points=starting_points[row])
            for row in (slice(at, at + 1) for at in range(len(x)))
        ]
        return np.concatenate(found)


def _from_start(attack: Any, view: Any, seed: int) -> Craft:
    """Start from the nearest input of another class; ART would draw starts that no seed brings back."""

    def craft(x: Images, y: NDArray[np.int64]) -> Images:
        limits = as_limits(view.clip_values, view.input_shape, view.channels_first)
        low, high = (0.0, 1.0) if limits is None else (limit.numpy() for limit in limits)
        drawn = np.random.default_rng([seed, 0]).uniform(low, high, (STARTS, *x.shape[1:])).astype(np.float32)
        pool = np.concatenate([x, drawn])
        classes = view.predict(pool).argmax(axis=1)
        distance = np.linalg.norm((pool[None] - x[:, None]).reshape(len(x), len(pool), -1), axis=2)
        distance[classes[None] == y[:, None]] = np.inf
        nearest = distance.argmin(axis=1)
        todo = (classes[: len(x)] == y) & np.isfinite(distance.min(axis=1))
        adversarial = x.copy()
        if todo.any():
            starts = pool[nearest[todo]]
            with np.errstate(all="ignore"), redirect_stderr(StringIO()):   # Brendel-Bethge draws a bar unasked
                found = attack.generate(x[todo], y[todo], x_adv_init=starts, starting_points=starts.copy())
            adversarial[todo] = x[todo] + (1.0 + OVERSHOOT) * (found - x[todo])
        return adversarial if limits is None else np.clip(adversarial, low, high)

    return craft


def _smoothed_pgd(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, seed: int) -> Craft:
    attack = SmoothedPGD(steps=steps, samples=estimator.bank_samples, block=estimator.performance.block)
    limits = as_limits(estimator.clip_values, estimator.input_shape, estimator.channels_first)
    if limits is not None:
        limits = limits[0].to(estimator.device), limits[1].to(estimator.device)

    def craft(x: Images, y: NDArray[np.int64]) -> Images:
        inputs, labels = torch.as_tensor(x, device=estimator.device), torch.as_tensor(y, device=estimator.device)
        with evaluating(estimator.model):
            if _is_plain(estimator, inputs):
                noise, probabilities = Gaussian(estimator.scale), estimator.model.probabilities
                settings = {"seed": seed, "clip_values": limits, "probabilities": probabilities}
                adversarial = attack.perturb(estimator.model.f, inputs, labels, noise, budget, **settings)
            else:
                adversarial = attack.perturb_soft(
                    lambda step: estimator.attack_view(seed=derive_seed(seed, step)).model,
                    inputs,
                    labels,
                    budget,
                    clip_values=limits,
                )
        return adversarial.cpu().numpy()

    return craft


def _smoothed_linf(estimator: PyTorchSmoothedClassifier, budget: float, steps: int, seed: int) -> Craft:
    """Signs of the smoothed gradient, with fresh draws in each step."""
    eps = linf_budget(estimator, budget)
    limits = as_limits(estimator.clip_values, estimator.input_shape, estimator.channels_first)

    def craft(x: Images, y: NDArray[np.int64]) -> Images:
        adversarial, truth = x.copy(), np.eye(estimator.nb_classes, dtype=np.float32)[y]
        for step in range(steps):
            view = estimator.attack_view(seed=derive_seed(seed, step))
            moved = adversarial + 2.5 * eps / steps * np.sign(view.loss_gradient(adversarial, truth))
            adversarial = x + np.clip(moved - x, -eps, eps)
            if limits is not None:
                adversarial = np.clip(adversarial, *(limit.cpu().numpy() for limit in limits))
        return np.asarray(adversarial, dtype=np.float32)

    return craft


def _is_plain(estimator: PyTorchSmoothedClassifier, x: torch.Tensor) -> bool:
    """Whether one noise on the input and one network are all there is; every input then gets draws of its own."""
    return type(estimator.model) is SmoothedModule and estimator.model.f.lift(x) is x


def _generate(attack: Any) -> Craft:
    def craft(x: Images, y: NDArray[np.int64]) -> Images:
        with np.errstate(all="ignore"):
            adversarial: Images = attack.generate(x, y)
        return adversarial

    return craft


ATTACKS: Mapping[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("fgm", _fgm),
        Attack("pgd", _pgd(ProjectedGradientDescent)),
        Attack("pgd-numpy", _pgd(ProjectedGradientDescentNumpy)),
        Attack("pgd-linf", _pgd(ProjectedGradientDescent, np.inf)),
        Attack("smoothed-pgd", _smoothed_pgd),
        Attack("smoothed-pgd-linf", _smoothed_linf),
        Attack("autopgd", _auto_pgd("cross_entropy")),
        Attack("autopgd-dlr", _auto_pgd("difference_logits_ratio")),
        Attack("autoattack", _auto_attack),
        Attack("square", _square),
        Attack("carlini", _carlini, budgeted=False),
        Attack("deepfool", _deepfool, budgeted=False),
        Attack("hopskipjump", _hop_skip_jump, budgeted=False),
        Attack("boundary", _boundary, budgeted=False),
        Attack("brendel-bethge", _brendel_bethge, budgeted=False),
    )
}
"""Attacks by name. All budgets are l2: an attack in linf takes the largest linf ball within, budget / sqrt(d) at each
of d values, so that its examples count at that l2 budget. `autoattack` needs multiprocess, `brendel-bethge` numba."""
