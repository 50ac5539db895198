"""Smooth-Reduce: the smoothed classifier of an ensemble of overlapping patches, for images and video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.certify import Predictions, certify_all, predict
from art_rs_plugins.smoothing.modules import PatchReduce
from art_rs_plugins.smoothing.performance import Performance
from art_rs_plugins.smoothing.video import Joint, Reduction, Vote
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.patches import CertifiedVote, PatchCertificates, PatchGeometry, Placement
from art_rs_plugins.theory.rules import Marginal, Rule, by_part

__all__ = ["PyTorchPatchVote", "PyTorchSmoothReduce"]


CELLS = 20_000
"""Joint outcomes of several reductions that are counted, at most."""


class PyTorchSmoothReduce(PyTorchSmoothedClassifier):
    """Smoothed classifier of patches: the network answers for each of m patches, and their answers are reduced to one.

    Needs no training of its own: any network trained under noise will do, at m passes where that takes one.

    Parameters
    ----------
    *args, **kwargs
        As `PyTorchSmoothedClassifier`; `model` is the network of one patch, and preprocessing is applied to patches.
    geometry : PatchGeometry
        Which patches, along the first axes behind the channels of `input_shape`.
    reduction : Reduction, optional
        ``Mean()`` of probabilities by default; ``Max()``, ``Vote()``, or ``SubVideos(...)`` for chunks of a clip.
    placement : Placement
        Where the noise is added: to the input by default, which costs no radius.
    consensus : int, optional
        If the first `consensus` patches agree on a class, they decide alone.
    early_exit : bool
        Leave a noisy copy out as soon as the patches that are left cannot change its vote.

    Raises
    ------
    ValueError, TypeError
        As `PyTorchSmoothedClassifier`; for a geometry of another input size, and a placement without a certificate.

    Notes
    -----
    *Guarantee.* That of `PyTorchSmoothedClassifier`, for the classifier of all patches, whatever they and the reduction
    are. Where the noise is added behind resizing, or to every patch, the radius is divided by the operator norm of what
    comes before it; `certificates` returns `PatchCertificates`, whose ``raw_radius`` is what some publications report
    for the input, and does not hold there. ``sigma`` is the level of the noise where it is added.

    *Source.* Joshi et al. (2022), "Smooth-Reduce: Leveraging Patches for Improved Certified Robustness", with the noise
    on the input; their placement is ``Placement.PER_PATCH``, here with the radius that it is worth.

    Examples
    --------
    >>> geometry = PatchGeometry.corners((8, 8), 6)
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    >>> classifier = PyTorchSmoothReduce(network, nn.CrossEntropyLoss(), (1, 8, 8), 3, scale=0.5, geometry=geometry)
    >>> classifier.certificates(np.full((1, 1, 8, 8), 0.5), n=1000, seed=0).lift_norm
    array([1.])
    """

    estimator_params = [   # noqa: RUF012 - ART's own convention
        *PyTorchSmoothedClassifier.estimator_params,
        "geometry",
        "reduction",
        "placement",
        "consensus",
        "early_exit",
    ]
    _own = ("geometry", "reduction", "placement", "consensus", "early_exit")

    def __init__(
        self,
        *args: Any,
        geometry: PatchGeometry,
        reduction: Reduction | None = None,
        placement: Placement = Placement.SHARED_INPUT,
        consensus: int | None = None,
        early_exit: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(geometry, PatchGeometry):
            raise TypeError(f"geometry must be a PatchGeometry, such as PatchGeometry.corners(...), got {geometry!r}")
        self.geometry, self.reduction, self.placement = geometry, reduction, placement
        self.consensus, self.early_exit = consensus, early_exit
        self._compared: tuple[Any, PyTorchSmoothReduce] | None = None
        super().__init__(*args, **kwargs)

    def _network(self, network: nn.Module) -> nn.Module:
        return PatchReduce(
            network.f.network if isinstance(network, PatchReduce) else network,
            self.geometry,
            reduction=self.reduction,
            placement=self.placement,
            consensus=self.consensus,
            early_exit=self.early_exit,
            block=self._performance.block,
        )

    def set_params(self, **kwargs: Any) -> None:
        """Change settings; those of the patches belong to the network, and take a new estimator.

        Raises
        ------
        ValueError, TypeError
            For a setting of the patches that is another than it was, and as the parent class.
        """
        changed = [name for name in self._own if name in kwargs and kwargs[name] != getattr(self, name)]
        if changed:
            raise ValueError(f"{', '.join(changed)} cannot be changed, being part of the classifier; construct another")
        super().set_params(**{name: value for name, value in kwargs.items() if name not in self._own})

    def _check_params(self) -> None:
        if tuple(self.input_shape[1 : 1 + len(self.geometry.size)]) != self.geometry.size:
            raise ValueError(
                f"geometry is of inputs of size {self.geometry.size}, but input_shape is {self.input_shape}: "
                "its axes behind the channels must begin with that size"
            )
        super()._check_params()

    def _update_preprocessing_operations(self) -> None:
        """Move ART's preprocessing behind the patches, so that it meets the noise under every placement."""
        super()._update_preprocessing_operations()
        self.model.base.f.transform, self.model.f.transform = self.model.f.transform, None

    @property
    def performance(self) -> Performance:
        """How the network votes."""
        return super().performance

    @performance.setter
    def performance(self, value: Performance) -> None:
        PyTorchSmoothedClassifier.performance.fset(self, value)   # type: ignore[attr-defined]
        self.model.base.block = self._performance.block

    def _train(self, *args: Any, **kwargs: Any) -> None:
        if self.placement != Placement.SHARED_INPUT:
            raise ValueError(
                f"fit adds its noise to the input, but {self.placement.name} adds it later; train the network of one "
                "patch as a PyTorchSmoothedClassifier of inputs of that shape"
            )
        super()._train(*args, **kwargs)

    def compare(
        self,
        x: ArrayLike | Tensor,
        rules: Sequence[Rule],
        *,
        reductions: Sequence[Reduction] | None = None,
        **settings: Any,
    ) -> list[Certificates]:
        """Certify b inputs under several rules, and for several reductions, that share their draws and passes.

        Parameters
        ----------
        x, rules, **settings
            As in the parent class.
        reductions : sequence of Reduction, optional
            What is compared; by default the estimator's own alone.

        Returns
        -------
        list of Certificates
            For the first reduction under each rule, then for the second, and so on: the same as an estimator with that
            reduction gives.

        Raises
        ------
        ValueError, TypeError
            As the parent class, and for so many classes and reductions that their votes cannot be counted jointly.
        """
        if reductions is None:
            return super().compare(x, rules, **settings)
        if "reduction" not in self.estimator_params:
            raise ValueError(f"{type(self).__name__} has no reductions to compare; take PyTorchSmoothReduce")
        joint, sizes = self._joint(tuple(reductions)), (self.nb_classes + 1,) * len(reductions)
        views = [partial(by_part, sizes=sizes, part=part) for part in range(len(sizes))]
        marginals = [Marginal(rule.alpha, rule, view) for view in views for rule in rules]
        return joint.compare(x, marginals, **{"n0": self.sample_size, **settings})

    def _joint(self, reductions: tuple[Reduction, ...]) -> PyTorchSmoothReduce:
        """Estimator of the joint votes of several reductions, kept while nothing that it depends on changes."""
        cells = (self.nb_classes + 1) ** len(reductions)
        if cells > CELLS:
            raise ValueError(
                f"{len(reductions)} reductions of {self.nb_classes} classes make {cells} joint outcomes, and at most "
                f"{CELLS} are counted; compare fewer at a time"
            )
        limits = None if self.clip_values is None else tuple(np.asarray(value).tobytes() for value in self.clip_values)
        key = (reductions, self.scale, self.noise, self.performance, limits, self.model.base.f.transform)
        if self._compared is None or self._compared[0] != key:
            settings = {"reduction": Joint(reductions), "early_exit": False, "nb_classes": cells}
            self._compared = key, PyTorchSmoothReduce.from_classifier(self, **settings)
        return self._compared[1]

    def _certify(
        self, f: nn.Module, x: Tensor, *, n: int, n0: int, rules: Sequence[Rule], seed: int, indices: NDArray[np.int64]
    ) -> list[Certificates]:
        patches: PatchReduce = self.model.base
        noise, votes = patches.lifted(self.noise(self.scale)), self._votes(seed, indices)
        found = certify_all(f, patches.lift(x), noise, n=n, n0=n0, rules=rules, **votes)
        m = len(self.geometry.offsets)
        return [PatchCertificates.of(certificates, patches.lift_norm, patches=m) for certificates in found]

    def _predict(
        self, f: nn.Module, x: Tensor, *, n: int, alpha: float, seed: int, indices: NDArray[np.int64]
    ) -> Predictions:
        patches: PatchReduce = self.model.base
        noise, votes = patches.lifted(self.noise(self.scale)), self._votes(seed, indices)
        return predict(f, patches.lift(x), noise, n=n, alpha=alpha, **votes)


class PyTorchPatchVote(PyTorchSmoothReduce):
    """Majority vote of m smoothed classifiers, one for each patch, certified through their own certificates.

    Parameters
    ----------
    *args, **kwargs
        As `PyTorchSmoothedClassifier`.
    geometry : PatchGeometry
        Which patches. The vote pays where they overlap little.

    Notes
    -----
    *Guarantee.* That of `CertifiedVote`, with alpha shared out to the patches: with probability at least 1 - alpha,
    more than half of the smoothed classifiers of the patches answer the certified class for every input closer than the
    radius. `predict` answers what more than half of them do, wrongly with probability at most alpha, or abstains.
    """

    estimator_params = [   # noqa: RUF012 - ART's own convention
        *PyTorchSmoothedClassifier.estimator_params,
        "geometry",
    ]

    def __init__(self, *args: Any, geometry: PatchGeometry, **kwargs: Any) -> None:
        super().__init__(*args, geometry=geometry, reduction=Vote(), placement=Placement.PER_PATCH, **kwargs)

    def _certify(
        self, f: nn.Module, x: Tensor, *, n: int, n0: int, rules: Sequence[Rule], seed: int, indices: NDArray[np.int64]
    ) -> list[Certificates]:
        vote, patches, noise = CertifiedVote(self.geometry), self.model.base.lift(x), self.noise(self.scale)
        shared = [replace(rule, alpha=vote.level(rule.alpha)) for rule in rules]   # type: ignore[type-var]
        each, settings = self._voter(self.model.base.f), self._votes(seed, indices)
        found = [
            certify_all(each, patches[:, patch].contiguous(), noise, n=n, n0=n0, rules=shared, **settings)
            for patch in range(patches.shape[1])
        ]
        return [vote.combine(of_patches) for of_patches in zip(*found, strict=True)]

    def _predict(
        self, f: nn.Module, x: Tensor, *, n: int, alpha: float, seed: int, indices: NDArray[np.int64]
    ) -> Predictions:
        vote, patches, noise = CertifiedVote(self.geometry), self.model.base.lift(x), self.noise(self.scale)
        each, settings = self._voter(self.model.base.f), self._votes(seed, indices)
        votes = np.zeros((len(x), self.nb_classes), dtype=np.int64)
        for patch in range(patches.shape[1]):
            answer = predict(
                each, patches[:, patch].contiguous(), noise, n=n, alpha=vote.level(alpha), **settings
            )
            np.add.at(votes, (np.arange(len(x)), answer.prediction), ~answer.abstained)
        leader = votes.argmax(axis=1).astype(np.int64)
        majority = 2 * votes.max(axis=1) > patches.shape[1]
        return Predictions(leader, ~majority, votes, patches.shape[1], alpha, seed)
