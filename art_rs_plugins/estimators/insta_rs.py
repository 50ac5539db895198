"""Insta-RS: a noise level for each input, with certificates that hold for the classifier that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.estimators.inputs import as_one_hot, check_lengths
from art_rs_plugins.estimators.training import read_weights, target_of
from art_rs_plugins.smoothing.certify import Predictions, predict
from art_rs_plugins.smoothing.modules import BaseClassifier
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.smoothing.sampling import check_count, evaluating
from art_rs_plugins.smoothing.scales import (
    Conditional,
    Scales,
    certify_at,
    certify_frozen,
    certify_scales,
    level_targets,
    predict_scales,
    sigma_of,
)
from art_rs_plugins.smoothing.sigma import Objective
from art_rs_plugins.smoothing.soft import ScaleModule
from art_rs_plugins.smoothing.training import Epoch, fit, shuffled
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.elastic import SigmaFunction
from art_rs_plugins.theory.scales import Cascade, Envelope, Selector, SequentialScales

__all__ = ["PyTorchInstaRS"]

_OVER_LEVELS = (Envelope, Cascade, Selector)


class PyTorchInstaRS(PyTorchSmoothedClassifier):
    """Smoothed classifier over several noise levels, certified for what it answers.

    The published method searches sigma for each input and certifies with that sigma frozen; the classifier that
    searches anew for each query has no such certificate (see `Conditional`). The other choices of `certificate` each
    define a classifier, which `predict` answers with, attacks aim at, and certificates speak of.

    Parameters
    ----------
    *args, **kwargs
        As `PyTorchSmoothedClassifier`. `scale` is the noise level of training, and where a search begins; `noise` is
        Gaussian.
    certificate : Scales
        - ``Envelope(sigmas)``: each class at its best level. Votes at every level; no training.
        - ``Cascade(sigmas, threshold)``: the first level that is sure enough. Votes down to that level.
        - ``Selector(sigmas, selector_sigma)``: a smoothed network chooses the level; see `fit_selector`. Two votes.
        - ``ElasticSigma``, ``ExtendedSigma``, ``BinnedSigma``: sigma is a fixed function of the input. One vote.
        - ``Conditional(search)``: as published, of kind ``conditional``, never counted as certified.

        To be fixed before the inputs are seen. Its alpha gives way to the estimator's.

    Raises
    ------
    ValueError, TypeError
        As `PyTorchSmoothedClassifier`, for a certificate of another type and noise that is not Gaussian. For a
        tolerance, or another rule, under a certificate over levels, which takes n draws or named radii.

    Notes
    -----
    *Guarantee.* For each input, with probability at least 1 - alpha over the draws: either the certificate abstains, or
    the classifier that `certificate` defines answers with its class at every input closer than its radius. A
    `Conditional` certificate says that of the classifier with sigma frozen at this input, which is not the one that
    answers elsewhere.

    *Cost.* n + n0 passes at each level that is asked about, fewer where radii are named: all levels, those down to the
    one that accepts, two, or one and a search; ``Certificates.passes`` counts them.

    *Source.* Chen et al. (2021), "Insta-RS: instance-wise randomized smoothing for improved robustness and accuracy",
    withdrawn; only its abstract was at hand. The certificates are those of `theory.scales` and `theory.elastic`.

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> classifier = PyTorchInstaRS(
    ...     network, nn.CrossEntropyLoss(), (1, 2, 2), 2, scale=0.5, certificate=Envelope((0.25, 0.5))
    ... )
    >>> classifier.certificates(np.full((1, 1, 2, 2), 0.5), n=1000, n0=100, seed=0).passes
    array([2200])
    """

    estimator_params = [   # noqa: RUF012 - ART's own convention
        *PyTorchSmoothedClassifier.estimator_params,
        "certificate",
    ]

    def __init__(self, *args: Any, certificate: Scales, **kwargs: Any) -> None:
        self._certificate = _checked(certificate)
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------ settings

    @property
    def certificate(self) -> Scales:
        """What is certified, at the estimator's alpha."""
        chosen = self._certificate
        return replace(chosen, alpha=self.alpha) if isinstance(chosen, _OVER_LEVELS) else chosen

    @certificate.setter
    def certificate(self, value: Scales) -> None:
        self._certificate = self.model.certificate = _checked(value)

    @property
    def selector(self) -> nn.Module | None:
        """Network of a `Selector`, from raw inputs to a logit for each sigma; None until `fit_selector`."""
        chooser = self.model.selector
        return None if chooser is None else chooser.network

    @selector.setter
    def selector(self, network: nn.Module | None) -> None:
        if network is not None and not isinstance(network, nn.Module):
            raise TypeError(f"selector must be a torch.nn.Module of raw inputs, got {type(network).__name__}")
        self.model.selector = None if network is None else BaseClassifier(network).to(self.device)

    def _check_params(self) -> None:
        super()._check_params()
        if self.noise is not Gaussian:
            raise ValueError(f"noise must be Gaussian where there are several noise levels, got {self.noise.__name__}")

    # ------------------------------------------------------------------ what the base class leaves open

    def _smoothed(self, network: nn.Module, sigma: float, **settings: Any) -> ScaleModule:
        module = ScaleModule(network, sigma, certificate=self._certificate, **settings)
        selector = self.selector if hasattr(self, "_model") else None   # a view shares the selector of `model`
        module.selector = None if selector is None else BaseClassifier(selector)
        return module

    def _rule(self, radii: tuple[float, ...] | None) -> Any:
        if not isinstance(self._certificate, _OVER_LEVELS):
            return super()._rule(radii)
        over_levels: Any = self.certificate
        return over_levels if radii is None else SequentialScales(over_levels, radii)

    def _certify(
        self, f: nn.Module, x: Tensor, *, n: int, n0: int, rules: Sequence[Any], seed: int, indices: NDArray[np.int64]
    ) -> list[Certificates]:
        chosen, votes = self._certificate, {"n": n, "n0": n0, **self._votes(seed, indices)}
        if isinstance(chosen, _OVER_LEVELS):
            for rule in rules:
                named = rule.rule if isinstance(rule, SequentialScales) else rule
                if not isinstance(named, type(chosen)) or replace(named, alpha=chosen.alpha) != chosen:
                    raise TypeError(f"rule must be the certificate, {chosen}, which defines the classifier; got {rule}")
            return [certify_scales(self._networks(f), x, rule, **votes) for rule in rules]
        if not isinstance(chosen, Conditional):
            return certify_at(f, x, chosen, rules=rules, **votes)
        settings = {"start": self.scale, "probabilities": self.model.probabilities, "rules": rules}
        return certify_frozen(f, x, chosen, **settings, **votes)

    def _predict(
        self, f: nn.Module, x: Tensor, *, n: int, alpha: float, seed: int, indices: NDArray[np.int64]
    ) -> Predictions:
        chosen, votes = self._certificate, self._votes(seed, indices)
        if isinstance(chosen, _OVER_LEVELS):
            return predict_scales(self._networks(f), x, replace(chosen, alpha=alpha), n=n, **votes)
        sigma = sigma_of(chosen, f, x, start=self.scale, probabilities=self.model.probabilities, **votes)
        return predict(f, x, Gaussian(sigma), n=n, alpha=alpha, **votes)

    def _networks(self, f: nn.Module) -> nn.Module | list[nn.Module]:
        """What votes at each level."""
        if not isinstance(self._certificate, Selector):
            return f
        return [f] * len(self._certificate.sigmas) + [self._voter(self.model.chooser())]

    # ------------------------------------------------------------------ training

    def fit_selector(
        self,
        x: ArrayLike,
        y: ArrayLike,
        network: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        draws: int = 100,
        objective: Objective | None = None,
        sharpness: float = 10.0,
        batch_size: int = 128,
        nb_epochs: int = 10,
    ) -> list[Epoch]:
        """Train the network of a `Selector` on which level suits each training example, under the selector's noise.

        Parameters
        ----------
        x : array_like, shape (b, *input_shape)
            Training inputs, within clip_values; never those of the test.
        y : array_like, shape (b,) or (b, nb_classes)
            Their classes.
        network : Module
            Raw inputs (m, ...) to logits (m, number of sigmas); trained in place, behind the same preprocessing as the
            base network.
        optimizer : torch.optim.Optimizer, optional
            Of its parameters; Adam at 1e-3 by default.
        draws, objective, sharpness
            Of the targets; see `level_targets`.
        batch_size, nb_epochs : int
            Examples of a batch, passes over the data.

        Returns
        -------
        list of Epoch
            With the accuracy of naming the best level.

        Raises
        ------
        ValueError, TypeError
            If `certificate` is no `Selector`, for a network with another number of outputs, and as `fit`.

        Notes
        -----
        A selector that learned badly costs radius, never truth.
        """
        rule = self._certificate
        if not isinstance(rule, Selector):
            raise ValueError(f"certificate must be a Selector to train one, got {rule}")
        inputs, labels = self._inputs(x, strict=True), as_one_hot(y, self.nb_classes).argmax(axis=1)
        check_lengths(len(inputs), len(labels))
        check_count(nb_epochs, "nb_epochs")
        seed, self.selector = self._next_seed(), network
        learner = self.model.chooser()
        outputs = learner(inputs[:1].to(self.device)).shape
        if outputs != (1, len(rule.sigmas)):
            self.selector = None
            raise ValueError(f"network must have {len(rule.sigmas)} outputs, one for each sigma, got {tuple(outputs)}")
        settings: dict[str, Any] = {"draws": draws, "objective": objective, "sharpness": sharpness}
        with evaluating(self.model):
            f, everyone = self._voter(), np.arange(len(inputs))
            parts = [
                level_targets(
                    f, inputs[rows].to(self.device), labels[rows], rule.sigmas,
                    **settings, **self._votes(seed, everyone[rows]),
                )
                for rows in self._groups(len(inputs), 1024)
            ]   # fmt: skip
        targets = np.concatenate(parts).astype(np.float32)
        return fit(
            learner,
            shuffled(inputs.cpu().numpy(), targets, batch_size=batch_size, seed=seed),
            noise=Gaussian(rule.selector_sigma),
            optimizer=torch.optim.Adam(network.parameters(), lr=1e-3) if optimizer is None else optimizer,
            epochs=nb_epochs,
            seed=seed,
        )

    # ------------------------------------------------------------------ files

    def save(self, filename: str, path: str | None = None) -> None:
        """As in the base class, and the selector's network to ``filename.selector`` where there is one."""
        super().save(filename, path)
        target = Path(f"{target_of(filename, path)}.selector")
        target.unlink(missing_ok=True)
        if self.selector is not None:
            torch.save(self.selector.state_dict(), target)

    def load(self, filename: str, path: str | None = None) -> None:
        """As in the base class, and the selector's weights where `selector` is given already."""
        chooser = self.selector
        target = f"{target_of(filename, path)}.selector"
        state = {} if chooser is None else read_weights(target, chooser, self.device)
        super().load(filename, path)
        if chooser is not None:
            chooser.load_state_dict(state)


def _checked(certificate: Any) -> Any:
    """Return what may define a classifier over several noise levels, or raise ``TypeError``."""
    if isinstance(certificate, type) or not isinstance(certificate, (*_OVER_LEVELS, Conditional, SigmaFunction)):
        raise TypeError(
            "certificate must be an Envelope, Cascade, Selector, Conditional or a SigmaFunction, "
            f"such as Envelope((0.25, 0.5)), got {certificate!r}"
        )
    return certificate
