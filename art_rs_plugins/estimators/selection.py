"""What a composition is made of: stages of a smoothed classifier and its selector, the core, selectors that learn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from art.estimators.certification.randomized_smoothing import RandomizedSmoothingMixin
from art.estimators.classification import PyTorchClassifier
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.estimators.inputs import as_limits
from art_rs_plugins.estimators.preprocessing import make_transform
from art_rs_plugins.estimators.smooth_reduce import PyTorchSmoothReduce
from art_rs_plugins.smoothing.certify import Predictions, certify_all
from art_rs_plugins.smoothing.modules import BaseClassifier, SmoothedModule, looks_like_probabilities
from art_rs_plugins.smoothing.noise import Key, Noise, Stage, check_seed, derive_seed, standard_normal
from art_rs_plugins.smoothing.sampling import check_count, check_network, count_votes, evaluating, strict_votes
from art_rs_plugins.smoothing.selectors import (
    ConfidenceSelector,
    FixedSelector,
    Gate,
    JointVotes,
    ScoreSelector,
    Selector,
    core_probability,
    log_probabilities,
)
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.composition import (
    Claim,
    Histogram,
    Leading,
    Threshold,
    by_answer,
    by_class,
    by_score,
)
from art_rs_plugins.theory.metrics import check_labels
from art_rs_plugins.theory.patches import Placement
from art_rs_plugins.theory.rules import Marginal, Rule, TopTwo, Verdict
from art_rs_plugins.theory.votes import Votes

__all__ = ["Branch", "CoreModel", "as_core", "certifiable", "check_fit", "cross_fitted", "fit_selector"]

Array = NDArray[Any]


def _probe(shape: tuple[int, ...], clip_values: Any) -> Tensor:
    """Four inputs within clip_values, float32."""
    normal = standard_normal((4, *shape), Key(0, 0, Stage.BANK, 3))
    limits = as_limits(clip_values, shape, True) if np.ndim(clip_values) == 1 else None
    return normal if limits is None else limits[0] + (limits[1] - limits[0]) * normal.sigmoid()


@contextmanager
def _stateless(module: nn.Module, name: str) -> Iterator[None]:
    """Raise ``ValueError`` if a parameter or buffer of `module` changes while it is asked."""
    before = {key: value.detach().clone() for key, value in module.state_dict().items()}
    yield
    changed = [key for key, value in module.state_dict().items() if not torch.equal(value, before[key])]
    if changed:
        raise ValueError(
            f"{name} carries state: {', '.join(changed)} changed when it was asked, so that it is not one function of "
            "the input; freeze it (statistics of batches, adaptation at test time) first"
        )


class Branch:
    """One stage of a composition: a smoothed classifier, and the selector that decides whether it answers.

    Parameters
    ----------
    smoothed : PyTorchSmoothedClassifier
        Any estimator of this package. Certificates of kind ``conditional`` are refused when they come.
    selector : Selector
        A `ScoreSelector` without a network, and a `ConfidenceSelector`, read the votes that `smoothed` takes anyhow;
        for that it has to vote at one sigma, at the raw input.

    Raises
    ------
    TypeError, ValueError
        For parts of other types, and for selectors that cannot read this classifier or its inputs, are random, carry
        state, or look at more than one input at a time.
    """

    def __init__(self, smoothed: PyTorchSmoothedClassifier, selector: Selector) -> None:
        if not isinstance(smoothed, PyTorchSmoothedClassifier):
            raise TypeError(
                f"smoothed must be an estimator of this package, got {type(smoothed).__name__}; "
                "make one of it with PyTorchSmoothedClassifier.from_classifier"
            )
        if not isinstance(selector, Selector):
            raise TypeError(
                f"selector must be a ScoreSelector, ConfidenceSelector or FixedSelector, got {type(selector).__name__};"
                " a function of the clean input has no radius, so that it cannot select"
            )
        self.smoothed, self.selector = smoothed, selector
        self._own: BaseClassifier | None = None
        if isinstance(selector, ScoreSelector) and selector.network is not None:
            self._own = BaseClassifier(selector.network).to(smoothed.device)
        elif not isinstance(selector, FixedSelector) and not _votes_at_the_input(smoothed):
            raise ValueError(
                f"selector reads the votes of smoothed, but {type(smoothed).__name__} does not vote at one sigma at "
                "the raw input; give the selector a network of its own: ScoreSelector(..., network=..., sigma=...)"
            )
        self._outputs, self._probabilities = smoothed.nb_classes, False
        if isinstance(selector, ScoreSelector):
            self._outputs, self._probabilities = self._check_score(selector)

    @property
    def bounds(self) -> int:
        """Bounds that can fail: that of the smoothed classifier, and that of a selector which has any."""
        return 1 if isinstance(self.selector, FixedSelector) else 2

    def certify(
        self,
        x: Tensor,
        *,
        alpha: float,
        n: int,
        n0: int,
        radii: tuple[float, ...] | None,
        seed: int,
        indices: NDArray[np.int64],
    ) -> tuple[Claim, Certificates]:
        """What is known of the selector and of the smoothed classifier at inputs x, each at `alpha`."""
        settings: dict[str, Any] = {"n": n, "n0": n0, "seed": seed, "indices": indices}
        rule = replace(self.smoothed._rule(radii), alpha=alpha)   # type: ignore[type-var]
        if isinstance(self.selector, FixedSelector):
            (found,) = self._compare(x, [rule], alpha, settings)
            return Claim.fixed(np.full(len(x), int(self.selector.certify)), np.inf), found
        chooser = self.selector.rule(alpha, radii)
        if isinstance(self.selector, ConfidenceSelector):
            found, choice = self._compare(x, [rule, chooser], alpha, settings)
            return Claim.of(choice), replace(found, passes=np.maximum(found.passes, choice.passes))
        with evaluating(self._read):
            joint, counting = self._joint((self.selector.theta,))
            rules = [Marginal(alpha, chooser, lambda votes: by_answer(by_score(votes, joint.bins), 0))]
            if self._own is None:
                rules.append(Marginal(alpha, rule, lambda votes: by_class(votes, joint.bins)))
            choice, *rest = certify_all(
                joint, x.to(self.smoothed.device), self._noise(), rules=rules, **settings, **counting
            )
        if not rest:
            (found,) = self._compare(x, [rule], alpha, settings)
            return Claim.of(choice), replace(found, passes=found.passes + choice.passes)
        passes = np.maximum(rest[0].passes, choice.passes) * _passes_of_a_vote(self.smoothed)
        return Claim.of(choice), replace(rest[0], performance=str(self.smoothed.performance), passes=passes)

    def predict(
        self, x: Tensor, *, alpha: float, n: int, seed: int, indices: NDArray[np.int64]
    ) -> tuple[Verdict, Predictions]:
        """Answers of the selector and of the smoothed classifier at inputs x, each wrong with probability `alpha`."""
        settings: dict[str, Any] = {"n": n, "seed": seed, "indices": indices}
        level, selector = self._noise().level(alpha, n, x[0].numel()), self.selector
        if isinstance(selector, ScoreSelector):
            scores, classes = self._count((selector.theta,), x, stage=Stage.PREDICTION, **settings)
            choice = Threshold(selector.tau, level).verdict(by_answer(scores, 0), n)
            if self._own is None:
                verdict = TopTwo(level).decide(classes, n)
                return choice, Predictions(verdict.prediction, verdict.abstained, classes, n, alpha, seed)
            return choice, self.smoothed.predictions(x, alpha=alpha, **settings)
        found = self.smoothed.predictions(x, alpha=alpha, **settings)
        if isinstance(selector, FixedSelector):
            return Verdict(np.full(len(x), int(selector.certify)), np.zeros(len(x), dtype=bool)), found
        return Leading(selector.tau, level).verdict(found.votes, n), found

    def histogram(
        self, x: Tensor, *, edges: Sequence[float], n: int, n0: int, seed: int, indices: NDArray[np.int64]
    ) -> Histogram:
        """Votes of b inputs for classes and for bins of the score; ``TypeError`` for a selector that has no score."""
        if not isinstance(self.selector, ScoreSelector):
            raise TypeError(f"histograms need a ScoreSelector, got {type(self.selector).__name__}")
        tables = []
        for stage, draws in ((Stage.SELECTION, n0), (Stage.ESTIMATION, n)):
            settings: dict[str, Any] = {"n": draws, "seed": seed, "indices": indices, "stage": stage}
            scores, classes = self._count(edges, x, **settings)
            if self._own is not None:
                with evaluating(self.smoothed.model):
                    f, noise = self.smoothed._voter(), self.smoothed.noise(self.smoothed.scale)
                    counting: dict[str, Any] = {"num_classes": self.smoothed.nb_classes}
                    counting["block"] = self.smoothed.performance.block
                    votes = count_votes(f, x.to(self.smoothed.device), noise, **counting, **settings)
                classes = votes.cpu().numpy()
            tables.append((classes, scores))
        (first, score_first), (second, score_second) = tables
        levels = self.smoothed.scale, self.selector.sigma or self.smoothed.scale
        return Histogram(first, second, score_first, score_second, n0, n, np.asarray(edges, np.float64), *levels)

    def soft(self, samples: int, seed: int, *, live: bool) -> tuple[Gate, nn.Module]:
        """Differentiable selector and smoothed classifier; `live` follows later changes of sigma, with its own bank."""
        smoothed = self.smoothed
        module: SmoothedModule = smoothed.model if live else smoothed.attack_view(samples, seed).model
        f = smoothed.model.f if self._own is None else self._own
        block = smoothed.performance.block
        bank: dict[str, Any] = {"samples": samples, "seed": seed, "block": block}
        return Gate(self.selector, module, f, probabilities=self._probabilities, **bank), module

    @property
    def _read(self) -> nn.Module:
        """Whose outputs a score is taken of."""
        return self.smoothed.model if self._own is None else self._own

    def _compare(self, x: Tensor, rules: list[Rule], alpha: float, settings: dict[str, Any]) -> list[Certificates]:
        """Certificates of the smoothed classifier, which has to spend no more than its share."""
        found = self.smoothed.compare(x, rules, **settings)
        if any(np.any(each.alpha > alpha) for each in found):
            raise ValueError(
                f"{type(self.smoothed).__name__} certifies at alpha={found[0].alpha.max()} whatever its rule says, but "
                f"its share is {alpha}; set its alpha to that"
            )
        return found

    def _noise(self) -> Noise:
        """Noise of the selector's votes."""
        sigma = self.selector.sigma if isinstance(self.selector, ScoreSelector) else None
        return self.smoothed.noise(self.smoothed.scale if sigma is None else sigma)

    def _joint(self, edges: Sequence[float]) -> tuple[JointVotes, dict[str, Any]]:
        """What is voted on for the score, and how it is counted; within ``evaluating(self._read)``."""
        assert isinstance(self.selector, ScoreSelector)
        f = self.smoothed._voter() if self._own is None else self._own
        joint = JointVotes(f, self.selector.score, edges, probabilities=self._probabilities)
        return joint, {"num_classes": self._outputs * joint.bins, "block": self.smoothed.performance.block}

    def _count(self, edges: Sequence[float], x: Tensor, **settings: Any) -> tuple[Votes, Votes]:
        """Votes for the bins of the score (b, t + 2) and for the outputs (b, k) of the network that it is taken of."""
        with evaluating(self._read):
            joint, counting = self._joint(edges)
            inputs = x.to(self.smoothed.device)
            votes = count_votes(joint, inputs, self._noise(), **settings, **counting).cpu().numpy()
        return by_score(votes, joint.bins), by_class(votes, joint.bins)

    def _check_score(self, selector: ScoreSelector) -> tuple[int, bool]:
        """Number of outputs that the score is taken of, and whether they are probabilities."""
        shape = self.smoothed.input_shape
        x, f = _probe(shape, None).to(self.smoothed.device), self._own or self.smoothed.model.f
        with evaluating(f), torch.no_grad(), _stateless(f, "selector's network"):
            try:
                outputs = f(x)
            except RuntimeError as error:
                raise ValueError(f"selector's network cannot take inputs of input_shape {shape}: {error}") from error
            if outputs.ndim != 2 or len(outputs) != len(x):
                raise ValueError(f"selector's network must return (m, k) for m inputs, got {tuple(outputs.shape)}")
            check_network(f, x, outputs.shape[1])
            given = self.smoothed.model.probabilities
            probabilities = given if self._own is None else looks_like_probabilities(outputs)
            score = selector.score(log_probabilities(outputs, probabilities))
        if score.shape != (len(x),):
            raise ValueError(f"score must return shape (m,) for m rows, got {tuple(score.shape)} for {len(x)}")
        return outputs.shape[1], probabilities


def _votes_at_the_input(smoothed: PyTorchSmoothedClassifier) -> bool:
    """Whether its votes are those of one network at one sigma, with the noise on the raw input."""
    votes = type(smoothed)._certify in (PyTorchSmoothedClassifier._certify, PyTorchSmoothReduce._certify)
    return votes and not (isinstance(smoothed, PyTorchSmoothReduce) and smoothed.placement != Placement.SHARED_INPUT)


def _passes_of_a_vote(smoothed: PyTorchSmoothedClassifier) -> int:
    """Passes of the network that one vote takes, at most."""
    return len(smoothed.geometry.offsets) if isinstance(smoothed, PyTorchSmoothReduce) else 1


# ---------------------------------------------------------------------------------------------- the core


class CoreModel:
    """The core of a composition: any classifier of ART, asked once about each input, without noise.

    Parameters
    ----------
    core : PyTorchClassifier
        With whatever defences it has; they belong to this branch, and no certificate depends on them.
    smoothed : PyTorchSmoothedClassifier
        What it has to fit.

    Raises
    ------
    TypeError
        If it is no PyTorchClassifier, or is smoothed itself.
    ValueError
        If it reads other inputs, has other classes, lies on another device, carries state, or mixes the inputs of a
        batch.
    """

    def __init__(self, core: PyTorchClassifier, smoothed: PyTorchSmoothedClassifier) -> None:
        if not isinstance(core, PyTorchClassifier):
            raise TypeError(f"core must be an ART PyTorchClassifier, got {type(core).__name__}")
        if isinstance(core, RandomizedSmoothingMixin):
            raise TypeError(
                f"core is smoothed itself, a {type(core).__name__}: it abstains, its answers are random; make it the "
                "last stage of a chain: PyTorchACES(core=..., smoothed=it, selector=FixedSelector(True)) as core"
            )
        check_fit(core, smoothed)
        self.core = core
        limits = as_limits(core.clip_values, core.input_shape, core.channels_first)
        operations = list(core.preprocessing_operations)
        transform = make_transform(operations, channels_first=core.channels_first, limits=limits)
        self.soft = BaseClassifier(core.model, transform)
        self.random, self.probabilities = self._check()

    def claim(self, answers: Verdict) -> Claim:
        """What these answers say of the core at the same inputs: all, at radius 0, or nothing if it is random."""
        return Claim.fixed(answers.prediction, abstained=answers.abstained | self.random)

    def answer(self, x: Tensor, batch_size: int = 128) -> Verdict:
        """Classes of inputs x (b, ...); where scores are not finite, or none is the largest, it abstains."""
        winner, valid = strict_votes(torch.from_numpy(self._scores(x, batch_size)))
        return Verdict(winner.numpy(), ~valid.numpy())

    def _scores(self, x: Tensor, batch_size: int = 128) -> Array:
        with evaluating(self.core.model):
            scores: Array = self.core.predict(x.detach().cpu().numpy().astype(np.float32), batch_size=batch_size)
        return np.asarray(scores)

    def _check(self) -> tuple[bool, bool]:
        """Ask the core a few times; returns whether it is random, and whether its network ends in a softmax."""
        core = self.core
        x = _probe(core.input_shape, core.clip_values if core.clip_values is not None else (0.0, 1.0))
        with _stateless(core.model, "core"):
            together, again, alone = self._scores(x), self._scores(x), self._scores(x[:1])
        if together.shape != (len(x), core.nb_classes):
            raise ValueError(f"core must return {core.nb_classes} scores for an input, got shape {together.shape}")
        scale = 1e-3 * max(1e-6, float(np.abs(np.nan_to_num(together)).max()))
        random = not np.allclose(together, again, atol=scale, equal_nan=True)
        if not random and not np.allclose(together[:1], alone, atol=scale, equal_nan=True):
            raise ValueError("core's answer for one input changes with the other inputs of its batch; freeze it first")
        with evaluating(core.model), torch.no_grad():
            return random, looks_like_probabilities(self.soft(x.to(core.device)))


def as_core(network: nn.Module, smoothed: PyTorchSmoothedClassifier) -> PyTorchClassifier:
    """ART classifier of a network of the raw inputs of `smoothed`, on its device, to be the core beside it."""
    return PyTorchClassifier(
        network.eval(),
        smoothed.loss,
        input_shape=smoothed.input_shape,
        nb_classes=smoothed.nb_classes,
        channels_first=smoothed.channels_first,
        clip_values=smoothed.clip_values,
        device_type=smoothed.device_type,
    )


def check_fit(part: PyTorchClassifier, smoothed: PyTorchSmoothedClassifier) -> None:
    """Raise ``ValueError`` unless a part of a composition reads the inputs and gives the classes of its first stage."""
    name = "a later stage" if isinstance(part, PyTorchSmoothedClassifier) else "core"
    for setting in ("nb_classes", "input_shape", "channels_first"):
        mine, theirs = getattr(part, setting), getattr(smoothed, setting)
        if mine != theirs:
            raise ValueError(f"{name} must have the {setting} of smoothed, {theirs}, got {mine}")
    if part.clip_values is not None and smoothed.clip_values is not None:
        shape = smoothed.input_shape
        ranges = [as_limits(each.clip_values, shape, each.channels_first) for each in (part, smoothed)]
        pairs = [torch.stack([limit.broadcast_to(shape) for limit in limits]) for limits in ranges if limits]
        if not torch.equal(*pairs):
            raise ValueError(
                f"{name} must have the clip_values of smoothed, {smoothed.clip_values}, got {part.clip_values}; "
                "both read the same raw input, in the units that sigma is given in"
            )
    if part.device != smoothed.device:
        raise ValueError(f"{name} is on {part.device}, smoothed on {smoothed.device}; give both one device_type")
    if isinstance(part, PyTorchSmoothedClassifier) and part.noise is not smoothed.noise:
        raise ValueError(f"{name} must have the noise {smoothed.noise.__name__} of smoothed, got {part.noise.__name__}")


# ---------------------------------------------------------------------------------------------- learned selectors


def certifiable(
    smoothed: PyTorchSmoothedClassifier,
    x: ArrayLike,
    y: ArrayLike,
    *,
    radius: float,
    n: int = 1000,
    seed: int | None = None,
) -> NDArray[np.bool_]:
    """Which inputs the smoothed classifier certifies for their class at a radius: labels to train a selector on.

    Parameters
    ----------
    smoothed : PyTorchSmoothedClassifier
        As trained; on its own training data it would flatter itself, see `cross_fitted`.
    x, y : array_like, shape (b, *input_shape) and (b,)
        Inputs that it was not trained on, and their classes. Never those of the test.
    radius : float
        l2 radius, >= 0.
    n : int
        Estimation draws for each.
    seed : int, optional
        Of the draws.

    Returns
    -------
    ndarray of bool, shape (b,)
    """
    labels = check_labels(y, len(np.asarray(x)))
    found = smoothed.certificates(x, n=n, seed=seed)
    return np.asarray(found.holds_at(radius) & (found.prediction == labels))


def cross_fitted(
    smoothed: PyTorchSmoothedClassifier,
    x: ArrayLike,
    y: ArrayLike,
    *,
    radius: float,
    folds: int = 3,
    nb_epochs: int = 10,
    batch_size: int = 128,
    n: int = 1000,
    seed: int | None = None,
) -> NDArray[np.bool_]:
    """`certifiable` for training data: each part is judged by a clone that is trained on the others.

    Parameters
    ----------
    smoothed, x, y, radius, n, seed
        As in `certifiable`; with an optimizer. It is not changed. The seed is that of the clones' weights as well, on
        CPUs.
    folds : int
        Parts, and clones that are trained; at least 2.
    nb_epochs, batch_size : int
        Of the training of each.

    Returns
    -------
    ndarray of bool, shape (b,)
    """
    inputs, seed = np.asarray(x, dtype=np.float32), check_seed(seed)
    labels, parts = check_labels(y, len(inputs)), check_count(folds, "folds", least=2)
    order = np.random.default_rng([seed, parts]).permutation(len(inputs))
    result = np.zeros(len(inputs), dtype=bool)
    for number, held in enumerate(np.array_split(order, parts)):
        rest = np.setdiff1d(order, held)
        with torch.random.fork_rng(devices=[]):   # ART draws fresh weights from the global generator
            torch.default_generator.manual_seed(derive_seed(seed, number, 1))
            clone = smoothed.clone_for_refitting()
        clone.fit(inputs[rest], labels[rest], nb_epochs=nb_epochs, batch_size=batch_size)
        own = derive_seed(seed, number)
        result[held] = certifiable(clone, inputs[held], labels[held], radius=radius, n=n, seed=own)
    return result


def fit_selector(
    smoothed: PyTorchSmoothedClassifier,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    theta: float = 0.5,
    tau: float = 0.5,
    network: nn.Module | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    nb_epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
) -> ScoreSelector:
    """Train a network, under the noise of the smoothed classifier, to tell which inputs it certifies.

    Parameters
    ----------
    smoothed : PyTorchSmoothedClassifier
        Whose sigma, preprocessing and device it takes over.
    x : array_like, shape (b, *input_shape)
        Training inputs.
    labels : array_like of bool, shape (b,)
        True for certify, from `cross_fitted`, or from `certifiable` on data that was held out. Never those of the test.
    theta, tau : float
        Of the selector; choose theta on validation data.
    network : Module, optional
        Raw inputs to two logits, core and certify; trained in place. By default a copy of the smoothed network, with a
        linear layer behind its outputs.
    optimizer : callable, optional
        From parameters to an optimiser; Adam at 1e-3 by default.
    nb_epochs, batch_size, seed
        Of the training.

    Returns
    -------
    ScoreSelector
        With the probability of the core as its score. The rarer label weighs as much as the other.

    Raises
    ------
    ValueError
        For labels of another length, or all the same.

    Notes
    -----
    A selector that learned badly costs radius and accuracy, never truth.

    *Source.* Horvath et al. (2022) train such a network without saying on what; labels and weights here follow the
    gates of Mueller, Balunovic and Vechev (2021).
    """
    wanted = np.asarray(labels)
    if wanted.dtype != bool or wanted.shape != (len(np.asarray(x)),):
        raise ValueError(f"labels must be a bool for each input, got dtype {wanted.dtype} and shape {wanted.shape}")
    certify = int(wanted.sum())
    if certify in (0, len(wanted)):
        raise ValueError(f"labels must be of both kinds, got {certify} to certify of {len(wanted)}; change the radius")
    if network is None:
        head = nn.Linear(smoothed.nb_classes, 2)
        with torch.no_grad():
            normal = standard_normal((2, smoothed.nb_classes), Key(check_seed(seed), 0, Stage.TRAINING, 0))
            head.weight.copy_(normal / smoothed.nb_classes**0.5)
            head.bias.zero_()
        network = nn.Sequential(copy.deepcopy(smoothed.model.base), head)
    own: dict[str, Any] = {name: getattr(smoothed, name) for name in PyTorchSmoothedClassifier.estimator_params}
    make = optimizer if optimizer is not None else lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
    weight = torch.tensor([1.0, (len(wanted) - certify) / certify], device=smoothed.device)
    changes = {"loss": nn.CrossEntropyLoss(weight=weight), "nb_classes": 2, "optimizer": make(network.parameters())}
    plain = {"objective": None, "adversary": None, "table": None, "draws": 1, "seed": seed}
    learner = PyTorchSmoothedClassifier(**{**own, **changes, **plain, "model": network})
    learner.fit(np.asarray(x, dtype=np.float32), wanted.astype(np.int64), nb_epochs=nb_epochs, batch_size=batch_size)
    return ScoreSelector(theta, tau, core_probability, learner.model.f, smoothed.scale)
