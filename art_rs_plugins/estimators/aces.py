"""ACES: a certified choice, for each input, between a smoothed classifier and an accurate one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from art.estimators.certification.randomized_smoothing import RandomizedSmoothingMixin
from art.estimators.classification import PyTorchClassifier
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm.auto import tqdm

from art_rs_plugins.estimators.base import N_MAX, N, PyTorchSmoothedClassifier
from art_rs_plugins.estimators.inputs import warn_if_hopeless
from art_rs_plugins.estimators.interface import SmoothedInterface
from art_rs_plugins.estimators.selection import Branch, CoreModel, check_fit
from art_rs_plugins.smoothing.certify import Predictions
from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.noise import Gaussian, check_seed
from art_rs_plugins.smoothing.performance import Performance
from art_rs_plugins.smoothing.sampling import check_count, check_indices
from art_rs_plugins.smoothing.selectors import ComposedModule, Selector
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.composition import (
    Claim,
    Fallback,
    Histogram,
    Minimum,
    Split,
    as_certificates,
    compose,
    settle,
)
from art_rs_plugins.theory.rules import Verdict

__all__ = ["Answers", "Compositions", "PyTorchACES"]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Compositions:
    """Certificates of b inputs, with those of the parts.

    Attributes
    ----------
    certificates : Certificates
        Of the composition. A radius of 0 without an abstention speaks of the input alone, as where the core answers.
    selectors : tuple of Claim
        Of each stage's selector.
    smoothed : tuple of Certificates
        Of each stage's smoothed classifier, at its share of alpha.
    core : Verdict
        Answers of the core.
    """

    certificates: Certificates
    selectors: tuple[Claim, ...]
    smoothed: tuple[Certificates, ...]
    core: Verdict


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Answers for b inputs, with those of the parts.

    Attributes
    ----------
    verdict : Verdict
        Of the composition.
    selectors : tuple of Verdict
        Of each stage's selector.
    smoothed : tuple of Predictions
        Of each stage's smoothed classifier.
    core : Verdict
        Of the core.
    """

    verdict: Verdict
    selectors: tuple[Verdict, ...]
    smoothed: tuple[Predictions, ...]
    core: Verdict


class PyTorchACES(SmoothedInterface, RandomizedSmoothingMixin, PyTorchClassifier):
    """Answer with a smoothed classifier where a smoothed selector says so, and with an accurate core elsewhere.

    What is selected and certified keeps its class within a radius. What goes to the core has the core's accuracy and no
    radius: it is certified at 0 at most. Which input goes where is the selector's theta: choose it on validation data.

    A core that is a `PyTorchACES` makes a chain: the first stage whose selector certifies answers. Allocation and
    fallback are those of the outermost.

    Parameters
    ----------
    core : PyTorchClassifier
        Any of ART, asked without noise: with defences, adversarially trained, quantised, an ensemble, random. None of
        it touches a certified radius. What a random one answers is known of no input beforehand.
    smoothed : PyTorchSmoothedClassifier
        Any estimator of this package with certificates of its own for the classifier that answers: Insta-RS with a rule
        of several levels, data-dependent smoothing with a memory. The latter's are ``committed``, and so are these.
    selector : Selector
        `ScoreSelector` (by default of the entropy of `smoothed`), `ConfidenceSelector` or `FixedSelector`.
    allocation : type
        ``Split``, a share of alpha for each part, or ``Minimum``, all of it for each part of one path.
    fallback : Fallback
        What to answer where the selector's votes are not clear.

    Raises
    ------
    TypeError, ValueError
        For parts that do not fit each other, or would void the certificate; each with its reason.

    Notes
    -----
    *Guarantee.* See `certificates`. It is about F(x) = argmax_c P(f(x + eps) = c) where P(s(x + eps) = certify) >= tau,
    and F(x) = core(x) elsewhere; s is the selector's vote on one noisy copy, and each part has its own sigma.

    *Preprocessing.* That of a part belongs to it. There is none before all of them: a certificate would need its
    Lipschitz constant, which JPEG and quantisation do not have.

    *Source.* Horvath, Mueller, Fischer and Vechev (2022), "Robust and accurate - compositional architectures for
    randomized smoothing" (ACES); chains after Mueller, Balunovic and Vechev (2021), "Certify or predict" (ACE).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from art_rs_plugins.smoothing.selectors import ScoreSelector
    >>> parts = [nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2)]
    >>> loss = nn.CrossEntropyLoss()
    >>> composed = PyTorchACES(
    ...     core=PyTorchClassifier(parts[0], loss, input_shape=(1, 2, 2), nb_classes=2),
    ...     smoothed=PyTorchSmoothedClassifier(parts[1], loss, input_shape=(1, 2, 2), nb_classes=2, scale=0.5),
    ...     selector=ScoreSelector(theta=0.3),
    ... )
    >>> composed.certificates(np.full((1, 1, 2, 2), 0.5), n=1000, seed=0).n
    array([1000])
    """

    estimator_params = ["core", "smoothed", "selector", "allocation", "fallback"]   # noqa: RUF012 - ART's own convention

    def __init__(
        self,
        *,
        core: PyTorchClassifier,
        smoothed: PyTorchSmoothedClassifier,
        selector: Selector,
        allocation: type[Split] | type[Minimum] = Split,
        fallback: Fallback = Fallback.AGREE,
    ) -> None:
        if allocation not in (Split, Minimum):
            raise TypeError(f"allocation must be the class Split or Minimum, got {allocation!r}; smoothed has alpha")
        if not isinstance(fallback, Fallback):
            raise TypeError(f"fallback must be a Fallback, such as Fallback.AGREE, got {fallback!r}")
        later: tuple[Branch, ...] = core.branches if isinstance(core, PyTorchACES) else ()
        self.branches: tuple[Branch, ...] = (Branch(smoothed, selector), *later)
        for branch in later:
            check_fit(branch.smoothed, smoothed)
        fallback.check(len(self.branches))
        last: PyTorchClassifier = core.core_model.core if isinstance(core, PyTorchACES) else core
        self.core_model: CoreModel = CoreModel(last, smoothed)
        self.core, self.smoothed, self.selector = core, smoothed, selector
        self.allocation, self.fallback = allocation, fallback
        PyTorchClassifier.__init__(
            self,
            model=self._soft(smoothed.bank_samples, smoothed.seed, live=True),
            loss=smoothed.loss,
            input_shape=smoothed.input_shape,
            nb_classes=smoothed.nb_classes,
            channels_first=smoothed.channels_first,
            clip_values=smoothed.clip_values,
            preprocessing=None,
            device_type=smoothed.device_type,
        )

    def _soft(self, samples: int, seed: int, *, live: bool) -> ComposedModule:
        stages = [branch.soft(samples, seed, live=live) for branch in self.branches]
        return ComposedModule(stages, self.core_model.soft, core_probabilities=self.core_model.probabilities)

    # ------------------------------------------------------------------ settings, which are those of the parts

    @property
    def scale(self) -> float:
        """Noise level of the first stage's smoothed classifier."""
        return self.smoothed.scale

    @property
    def alpha(self) -> float:
        """Failure probability of one prediction or certificate: that of the first stage's smoothed classifier."""
        return self.smoothed.alpha

    @property
    def sample_size(self) -> int:
        """Votes of one prediction and selection draws of one certificate."""
        return self.smoothed.sample_size

    @property
    def bank_samples(self) -> int:
        """Draws in the fixed bank of ``model``."""
        return self.smoothed.bank_samples

    @property
    def noise(self) -> type[Gaussian] | type[GridGaussian]:
        """Noise family of votes."""
        return self.smoothed.noise

    @property
    def performance(self) -> Performance:
        """How the first stage's network votes."""
        return self.smoothed.performance

    @property
    def bounds(self) -> int:
        """Bounds that may fail in one certificate: alpha / bounds is the share of each under ``Split``."""
        return sum(branch.bounds for branch in self.branches)

    def set_params(self, **kwargs: Any) -> None:
        """Refuse: settings are those of the parts, and another part makes another composition."""
        raise ValueError(
            f"{', '.join(kwargs) or 'nothing'} cannot be set on a composition: set it on the part that it belongs to, "
            "or construct another PyTorchACES, which trains nothing"
        )

    def close(self) -> None:
        """Let go of what the parts hold open."""
        for branch in self.branches:
            branch.smoothed.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.get_params())

    # ------------------------------------------------------------------ certificates and predictions

    def compositions(
        self,
        x: ArrayLike | Tensor,
        *,
        n: int | None = None,
        radii: Sequence[float] | None = None,
        n0: int | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 128,
    ) -> Compositions:
        """Certify b inputs, with the certificates of the parts.

        Parameters
        ----------
        x, n, radii, n0, indices, seed, batch_size
            As in `certificates`.

        Returns
        -------
        Compositions

        Raises
        ------
        ValueError, TypeError
            As `certificates`.
        """
        inputs = self._inputs(x, strict=True)
        keys, seed = check_indices(indices, len(inputs)), check_seed(seed)
        named = None if radii is None else tuple(np.atleast_1d(np.asarray(radii, dtype=np.float64)).tolist())
        draws = (N if named is None else N_MAX) if n is None else check_count(n, "n")
        allocation = self.allocation(self.alpha)
        share = allocation.share(self.bounds)
        if 0.5**draws > share:
            warnings.warn(f"n={draws} draws can never certify at alpha={share}; use a larger n", stacklevel=2)
        settings: dict[str, Any] = {"alpha": share, "n": draws, "radii": named, "seed": seed}
        settings["n0"] = self.sample_size if n0 is None else check_count(n0, "n0")
        parts: list[list[tuple[Claim, Certificates]]] = []
        for rows in self._groups(len(inputs), batch_size):
            group, own = inputs[rows], keys[rows]
            parts.append([branch.certify(group, indices=own, **settings) for branch in self.branches])
        stages = [_joined(part) for part in zip(*parts, strict=True)]
        core = self.core_model.answer(inputs, batch_size)
        claims = [(selector, Claim.of(smoothed)) for selector, smoothed in stages]
        known = compose(allocation, claims, self.core_model.claim(core))
        return Compositions(
            certificates=as_certificates(known, stages, self.alpha),
            selectors=tuple(selector for selector, _ in stages),
            smoothed=tuple(smoothed for _, smoothed in stages),
            core=core,
        )

    def certificates(
        self,
        x: ArrayLike | Tensor,
        *,
        n: int | None = None,
        radii: Sequence[float] | None = None,
        n0: int | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 128,
    ) -> Certificates:
        """Certify b inputs.

        Parameters
        ----------
        x : array_like or Tensor, shape (b, *input_shape)
            Raw inputs, within clip_values; cast to float32.
        n : int, optional
            Estimation draws for each part; 10,000 by default, and with radii at most, 100,000 by default.
        radii : sequence of float, optional
            Certify the largest of these that holds, and stop as soon as that is clear. Selectors with a tau other than
            1/2 take all n draws.
        n0 : int, optional
            Selection draws, which name the path; `sample_size` by default.
        indices : array_like of int, shape (b,), optional
            Index of each input in its data set, which names its noise; its position in x by default.
        seed : int, optional
            In [0, 2**63); None draws entropy from the system. Recorded either way.
        batch_size : int
            Inputs on the device at a time. It bounds memory and changes no bit of the result.

        Returns
        -------
        Certificates
            One row for each input; radii in l2, in the units of the raw input. Where the core certifiably answers, the
            radius is 0 without an abstention: the class is known at the input, and nowhere else.

        Raises
        ------
        ValueError, TypeError
            For inputs or numbers that do not fit, and for parts whose certificates are ``conditional``.

        Notes
        -----
        *Guarantee.* For each input, with probability at least 1 - alpha over the draws: either the certificate
        abstains, or F(x) is its class, and F(z) is for every z closer to x than its radius. See `Split` and `Minimum`.
        Theta, tau and the parts have to be fixed before the inputs are seen.

        *Source.* Horvath et al. (2022), CERTIFY; theorem 1 of Cohen et al. (2019).
        """
        settings: dict[str, Any] = {"n": n, "radii": radii, "n0": n0, "indices": indices, "seed": seed}
        return self.compositions(x, batch_size=batch_size, **settings).certificates

    def certify(
        self,
        x: ArrayLike | Tensor,
        n: int | None = None,
        batch_size: int = 32,
        *,
        radii: Sequence[float] | None = None,
    ) -> tuple[Array, Array]:
        """Certify b inputs, in ART's form: classes (b,), -1 where abstained, and radii (b,); see `certificates`."""
        found = self.certificates(x, n=n, radii=radii, batch_size=batch_size)
        return np.where(found.abstained, -1, found.prediction), found.radius.copy()

    def answers(
        self,
        x: ArrayLike | Tensor,
        *,
        n: int | None = None,
        alpha: float | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 128,
        verbose: bool = False,
    ) -> Answers:
        """Answer, with the answers of the parts.

        Parameters
        ----------
        x : array_like or Tensor, shape (b, *input_shape)
            Raw inputs; not held to clip_values.
        n : int, optional
            Votes for each part; `sample_size` by default.
        alpha : float, optional
            Probability of a wrong answer, at most; the composition's by default. Each part takes its share, whatever
            the allocation.
        indices, seed, batch_size
            As in `certificates`.
        verbose : bool
            Show a progress bar.

        Returns
        -------
        Answers

        Raises
        ------
        ValueError, TypeError
            For inputs or numbers that do not fit.

        Notes
        -----
        *Guarantee.* For each input, the probability of an answer other than F(x) is at most alpha; see `Fallback`. The
        core is taken at its word.
        """
        inputs = self._inputs(x)
        keys, seed = check_indices(indices, len(inputs)), check_seed(seed)
        share = Split(self.alpha if alpha is None else alpha).share(self.bounds)
        draws = self.sample_size if n is None else check_count(n, "n")
        warn_if_hopeless(draws, share)
        settings: dict[str, Any] = {"alpha": share, "n": draws, "seed": seed}
        parts: list[list[tuple[Verdict, Predictions]]] = []
        groups = self._groups(len(inputs), batch_size)
        for rows in tqdm(groups, desc="Composition", disable=not verbose):
            parts.append([branch.predict(inputs[rows], indices=keys[rows], **settings) for branch in self.branches])
        stages = [_answered(part) for part in zip(*parts, strict=True)]
        core = self.core_model.answer(inputs, batch_size)
        verdicts = [(selector, Verdict(found.prediction, found.abstained)) for selector, found in stages]
        return Answers(
            verdict=settle(self.fallback, verdicts, core),
            selectors=tuple(selector for selector, _ in stages),
            smoothed=tuple(found for _, found in stages),
            core=core,
        )

    def predictions(
        self,
        x: ArrayLike | Tensor,
        *,
        n: int | None = None,
        alpha: float | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 128,
        verbose: bool = False,
    ) -> Predictions:
        """Answers of the composition, with the votes of its first stage for the classes; see `answers`."""
        settings: dict[str, Any] = {"n": n, "alpha": alpha, "indices": indices, "batch_size": batch_size}
        seed = check_seed(seed)
        found = self.answers(x, seed=seed, verbose=verbose, **settings)
        votes, level = found.smoothed[0], self.alpha if alpha is None else alpha
        return Predictions(found.verdict.prediction, found.verdict.abstained, votes.votes, votes.n, level, seed)

    def histogram(
        self,
        x: ArrayLike | Tensor,
        *,
        edges: Sequence[float] | None = None,
        n: int = N,
        n0: int | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
    ) -> tuple[Histogram, Verdict]:
        """Votes of the first stage for classes and for bins of the selector's score, and the answers of the core.

        Parameters
        ----------
        x, n, n0, indices, seed
            As in `certificates`; the same seed and indices give the votes that `certificates` would decide on.
        edges : sequence of float, optional
            Ascending, in [0, 1]: values that theta may take. 0, 0.01, ..., 1 by default.

        Returns
        -------
        Histogram, Verdict
            All that is needed to choose theta and tau, on validation data and without further passes.

        Raises
        ------
        ValueError, TypeError
            For inputs, numbers or edges that do not fit, and a selector without a score.
        """
        grid = np.asarray(np.arange(101) / 100.0 if edges is None else edges, dtype=np.float64)
        if grid.ndim != 1 or not len(grid) or np.any(np.diff(grid) <= 0) or grid[0] < 0.0 or grid[-1] > 1.0:
            raise ValueError(f"edges must be ascending and in [0, 1], got {edges}")
        inputs = self._inputs(x, strict=True)
        draws = {"n": check_count(n, "n"), "n0": self.sample_size if n0 is None else check_count(n0, "n0")}
        keys, seed = check_indices(indices, len(inputs)), check_seed(seed)
        found = self.branches[0].histogram(inputs, edges=grid.tolist(), seed=seed, indices=keys, **draws)
        return found, self.core_model.answer(inputs)

    def attack_view(self, samples: int | None = None, seed: int = 0) -> PyTorchClassifier:
        """Deterministic soft scores of the composition, for attacks that need scores.

        Parameters
        ----------
        samples : int, optional
            Draws in its fixed banks; `bank_samples` by default.
        seed : int
            Seed of its banks.

        Returns
        -------
        PyTorchClassifier
            Sharing the parts, as they are now; log probabilities of selector times smoothed classifier plus the rest
            times the core, never abstaining. Only fresh votes say what an adversarial example of it is worth.
        """
        module = self._soft(self.bank_samples if samples is None else samples, seed, live=False)
        return PyTorchClassifier(
            model=module.eval(),
            loss=self.loss,
            input_shape=self.input_shape,
            nb_classes=self.nb_classes,
            channels_first=self.channels_first,
            clip_values=self.clip_values,
            preprocessing=None,
            device_type=self.smoothed.device_type,
        )

    # ------------------------------------------------------------------ training, which is that of the parts

    def fit(self, x: Array, y: Array, *args: Any, **kwargs: Any) -> None:
        """Refuse: train core, smoothed classifier and selector by themselves."""
        raise ValueError("a composition is not trained: fit its core and its smoothed classifier, or fit_selector")

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Refuse, as `fit`."""
        self.fit(np.empty(0), np.empty(0))

    def clone_for_refitting(self) -> Self:
        """Refuse, as `fit`."""
        raise ValueError("a composition is not trained: clone its parts, and compose them")


def _rebuild(family: type[PyTorchACES], settings: dict[str, Any]) -> PyTorchACES:
    return family(**settings)


def _joined(parts: Sequence[tuple[Claim, Certificates]]) -> tuple[Claim, Certificates]:
    """One stage's claims for all inputs, from those of groups."""
    fields = ("prediction", "radius", "abstained")
    selector = Claim(*(np.concatenate([getattr(claim, field) for claim, _ in parts]) for field in fields))
    return selector, Certificates.concatenate([certificates for _, certificates in parts])


def _answered(parts: Sequence[tuple[Verdict, Predictions]]) -> tuple[Verdict, Predictions]:
    """One stage's answers for all inputs, from those of groups."""
    fields = ("prediction", "abstained")
    selector = Verdict(*(np.concatenate([getattr(verdict, field) for verdict, _ in parts]) for field in fields))
    return selector, Predictions.concatenate([found for _, found in parts])
