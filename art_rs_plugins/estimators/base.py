"""Plain randomized smoothing as an ART estimator; the methods derive from it, one level below."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from art_rs_plugins.estimators.inputs import (
    as_limits,
    as_noise,
    as_performance,
    as_sigma,
    warn_if_hopeless,
)
from art_rs_plugins.estimators.preprocessing import is_augmentation, make_transform
from art_rs_plugins.estimators.tables import TableMaker
from art_rs_plugins.estimators.training import Trainable
from art_rs_plugins.smoothing.certify import Predictions, certify_all, predict
from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.modules import BaseClassifier, SmoothedModule, looks_like_probabilities
from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, check_seed, standard_normal
from art_rs_plugins.smoothing.performance import Performance, Voters
from art_rs_plugins.smoothing.sampling import check_count, check_indices, evaluating
from art_rs_plugins.smoothing.training import Adversary, Epoch, Loss
from art_rs_plugins.theory.bounds import check_alpha
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.rules import OneSided, Planned, Rule, Sequential

__all__ = ["PyTorchSmoothedClassifier", "share_votes"]

Array = NDArray[Any]

N, N_MAX, PILOT = 10_000, 100_000, 500
"""Estimation draws by default; the most that a sequential or planned certificate takes; the least of a pilot."""


class PyTorchSmoothedClassifier(Trainable, PyTorchRandomizedSmoothing):
    r"""A PyTorch classifier smoothed by Gaussian noise, certified in l2, attackable and trainable by ART.

    ``model`` is a `SmoothedModule` whose ``base`` is the network: attacks and trainers of ART that reach for the model
    meet the smoothed classifier and the right noise. Noise is added to the raw input, once, in training and in
    certification alike; preprocessing comes after it and is a part of the base classifier.

    Parameters
    ----------
    model : Module
        Network, (m, *input_shape) to logits (m, nb_classes), or probabilities.
    loss : Module
        Training loss of (outputs, labels), such as ``torch.nn.CrossEntropyLoss()``.
    input_shape : tuple of int
        Shape of one input: (features,), (c, h, w) or (c, t, h, w).
    nb_classes : int
        Number of classes.
    optimizer : torch.optim.Optimizer, optional
        Needed by `fit`.
    channels_first : bool
        As in ART.
    clip_values : tuple, optional
        Range of the raw input, such as (0, 1). Inputs to certify or train on are held to it; noisy ones are not.
    preprocessing_defences, preprocessing
        As in ART, applied after the noise. Defences without a PyTorch form run on the host, which is slow.
    postprocessing_defences
        Refused: votes are counted before them, so that they would only dress the answer.
    device_type : str
        ``"gpu"`` or ``"cpu"``; falls back to the CPU where CUDA is missing, as in ART.
    sample_size : int
        Votes of one `predict`, and selection draws n0 of one certificate, as in ART.
    scale : float
        Noise level sigma, in the units of the raw input.
    alpha : float
        Failure probability of one prediction or certificate.
    bank_samples : int
        Draws in the fixed bank behind ``model.eval()``, gradients and `attack_view`.
    seed : int
        Seed of the bank and of training. Certificates and predictions take one for each call.
    noise : type of noise
        ``Gaussian``, or ``GridGaussian`` for inputs of 8 bits, whose certificates hold in floating point.
    performance : Performance, optional
        How the network votes: dtype, layout, compilation, rows of a forward pass. float32 as it is by default.
    objective : Loss, optional
        What `fit` minimises, of the logits (draws, b, nb_classes) of noisy copies; see `smoothing.losses`. By default
        the mean of `loss` over them.
    draws : int
        Noisy copies of each input in training.
    adversary : Adversary, optional
        Moves the inputs of a batch before `fit` takes the loss, such as `SmoothAdv`.
    table : callable, optional
        Trains with a sigma for each example: makes the table from the number of examples and `scale`, such as
        ``SigmaTable`` or ``functools.partial(SigmaTable, start=5, every=3)``; epochs are counted within one call of
        `fit`, and an example is known by its position. By default `fit` trains at `scale`. What a loss says of sigma,
        as the weight of `MACER` does, stays that of `scale`.

    Raises
    ------
    ValueError, TypeError
        For sigma, alpha or counts out of range, a network that does not fit input_shape and nb_classes, or
        postprocessing defences.

    Notes
    -----
    *Guarantee.* See `certificates`. It is about argmax_c P(f(x + eps) = c), eps ~ N(0, scale^2 I), where f is the
    preprocessing and the network in eval mode, at its dtype, on its device.

    *Source.* Cohen, Rosenfeld and Kolter (2019), "Certified Adversarial Robustness via Randomized Smoothing".

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> classifier = PyTorchSmoothedClassifier(
    ...     network, nn.CrossEntropyLoss(), input_shape=(1, 2, 2), nb_classes=2, scale=0.5
    ... )
    >>> classifier.certificates(np.full((1, 1, 2, 2), 0.5), n=1000, seed=0).n
    array([1000])
    """

    estimator_params = [   # noqa: RUF012 - ART's own convention
        *(
            name
            for name in PyTorchRandomizedSmoothing.estimator_params
            if name not in ("use_amp", "opt_level", "loss_scale")   # not in the constructor of ART's class either
        ),
        "bank_samples",
        "seed",
        "noise",
        "performance",
        "objective",
        "draws",
        "adversary",
        "table",
    ]

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        input_shape: tuple[int, ...],
        nb_classes: int,
        optimizer: torch.optim.Optimizer | None = None,
        channels_first: bool = True,
        clip_values: Any = None,
        preprocessing_defences: Any = None,
        postprocessing_defences: Any = None,
        preprocessing: Any = (0.0, 1.0),
        device_type: str = "gpu",
        sample_size: int = 32,
        scale: float = 0.1,
        alpha: float = 0.001,
        *,
        bank_samples: int = 32,
        seed: int = 0,
        noise: type[Gaussian] | type[GridGaussian] = Gaussian,
        performance: Performance | None = None,
        objective: Loss | None = None,
        draws: int = 1,
        adversary: Adversary | None = None,
        table: TableMaker | None = None,
    ) -> None:
        base = model.base if isinstance(model, SmoothedModule) else model
        if not isinstance(base, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if device_type not in ("gpu", "cpu"):
            raise ValueError(f"device_type must be 'gpu' (or the CPU without CUDA) or 'cpu', got {device_type!r}")
        if getattr(loss, "reduction", "mean") == "none":
            raise ValueError("loss must reduce to a scalar; use reduction='mean'")
        sigma, bank_samples = as_sigma(scale), check_count(bank_samples, "bank_samples")
        self._performance, self._noise = as_performance(performance), as_noise(noise)
        self.objective, self.draws, self.adversary, self.table = objective, draws, adversary, table
        network = self._network(base)
        super().__init__(
            model=self._smoothed(network, sigma, samples=bank_samples, seed=seed, block=self._performance.block),
            loss=loss,
            input_shape=tuple(input_shape),
            nb_classes=nb_classes,
            optimizer=optimizer,
            channels_first=channels_first,
            clip_values=clip_values,
            preprocessing=None,
            device_type=device_type,
            sample_size=sample_size,
            scale=sigma,
            alpha=alpha,
        )
        self._layer_names = [name for name, _ in network.named_children()]
        self.preprocessing = self._set_preprocessing(preprocessing)
        self.preprocessing_defences = self._set_preprocessing_defences(preprocessing_defences)
        self.postprocessing_defences = self._set_postprocessing_defences(postprocessing_defences)
        self.history_: list[Epoch] = []
        self._voters = [Voters()]   # the last of them votes; see `share_votes`
        self._update_preprocessing_operations()
        if isinstance(model, SmoothedModule) and model.f.transform is not None and self.model.f.transform is None:
            raise ValueError(
                "model is a SmoothedModule whose transform would be lost; give its network, and the preprocessing too"
            )
        self._check_params()

    @classmethod
    def from_classifier(cls, classifier: PyTorchClassifier, **settings: Any) -> Self:
        """Smooth a classifier that exists already, with its network, loss, optimiser, preprocessing and device.

        Parameters
        ----------
        classifier : PyTorchClassifier
            Of ART, or an estimator of this package. Its network is shared, not copied.
        **settings
            Further arguments of the constructor, such as ``scale=0.25``; they win over the classifier's own.

        Raises
        ------
        TypeError
            If it is no PyTorchClassifier.
        """
        if not isinstance(classifier, PyTorchClassifier):
            raise TypeError(
                f"classifier must be an ART PyTorchClassifier, got {type(classifier).__name__}; "
                "pass a torch.nn.Module to the constructor instead"
            )
        if isinstance(classifier.model, SmoothedModule) and not isinstance(classifier, PyTorchSmoothedClassifier):
            raise TypeError("classifier is an attack view; wrap the estimator itself, or its network")
        own = {name: getattr(classifier, name) for name in cls.estimator_params if hasattr(classifier, name)}
        if isinstance(classifier.model, SmoothedModule):   # its transform is made anew, of the preprocessing
            own["model"] = classifier.model.base
        return cls(**{**own, **settings})

    # ------------------------------------------------------------------ settings

    @property
    def scale(self) -> float:
        """Noise level sigma, in the units of the raw input; held by ``model``."""
        return float(self.model.sigma)

    @scale.setter
    def scale(self, value: float) -> None:
        self.model.sigma = as_sigma(value)

    @property
    def alpha(self) -> float:
        """Failure probability of one prediction or certificate."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = check_alpha(value)

    @property
    def sample_size(self) -> int:
        """Votes of one prediction, and selection draws of one certificate."""
        return self._sample_size

    @sample_size.setter
    def sample_size(self, value: int) -> None:
        self._sample_size = check_count(value, "sample_size")

    @property
    def bank_samples(self) -> int:
        """Draws in the fixed bank of ``model``."""
        return int(self.model.samples)

    @bank_samples.setter
    def bank_samples(self, value: int) -> None:
        self.model.samples = check_count(value, "bank_samples")

    @property
    def seed(self) -> int:
        """Seed of the bank and of training."""
        return int(self.model.seed)

    @seed.setter
    def seed(self, value: int) -> None:
        self.model.seed = check_seed(value)

    @property
    def noise(self) -> type[Gaussian] | type[GridGaussian]:
        """Noise family of votes; training, gradients and views draw ordinary Gaussian noise of the same sigma."""
        return self._noise

    @noise.setter
    def noise(self, value: type[Gaussian] | type[GridGaussian]) -> None:
        self._noise = as_noise(value)

    @property
    def performance(self) -> Performance:
        """How the network votes."""
        return self._performance

    @performance.setter
    def performance(self, value: Performance) -> None:
        self._performance = as_performance(value)
        self.model.block = self._performance.block

    def set_params(self, **kwargs: Any) -> None:
        """Change settings, all of them or, if one is refused, none.

        Parameters
        ----------
        **kwargs
            Among ``estimator_params``.

        Raises
        ------
        ValueError, TypeError
            For a name that is no setting, a value out of range, or another model, which takes a new estimator.
        """
        if kwargs.get("model", self.model) not in (self.model, self.model.base):
            raise ValueError("model cannot be exchanged; construct a new estimator for it")
        changes = {name: value for name, value in kwargs.items() if name != "model"}
        before, bound = self.get_params(), self._bound
        try:
            super().set_params(**changes)
        except Exception:
            super().set_params(**{name: before[name] for name in changes if name in before})
            self._bound = bound
            raise

    def _update_preprocessing_operations(self) -> None:
        """Move ART's preprocessing into the base classifier; none is left for ART to apply before the noise."""
        super()._update_preprocessing_operations()
        operations = list(self.preprocessing_operations)
        self.preprocessing_operations.clear()
        self._augmentations = [operation for operation in operations if is_augmentation(operation)]
        limits = as_limits(self.clip_values, self.input_shape, self.channels_first)
        transform = make_transform(operations, channels_first=self.channels_first, limits=limits)
        self.model.f.transform = None if transform is None else transform.to(self.device)

    def _check_params(self) -> None:
        super()._check_params()
        if self.postprocessing_defences:
            raise ValueError(
                "postprocessing_defences are not supported: votes are counted before them; "
                "put what should take part in the vote into the network"
            )
        warn_if_hopeless(self.sample_size, self.alpha, "sample_size")
        cuda = self.device_type != "cpu" and torch.cuda.is_available()
        self._device = torch.device(f"cuda:{torch.cuda.current_device()}" if cuda else "cpu")
        self._model.to(self._device)
        self.performance.check_device(self._device)
        self._check_outputs()

    def _check_outputs(self) -> None:
        """Run the network once: a wrong shape should be met here, not in the middle of a certificate."""
        probe = standard_normal((8, *self.input_shape), Key(0, 0, Stage.BANK, 2), self.device)
        probe[0] = 0.0
        try:
            with torch.no_grad(), evaluating(self.model):
                outputs = self.model.f(self.model.f.lift(probe))
        except RuntimeError as error:
            raise ValueError(f"model cannot take inputs of input_shape {self.input_shape}: {error}") from error
        if outputs.shape != (8, self.nb_classes):
            raise ValueError(
                f"model must return shape (m, nb_classes) = (m, {self.nb_classes}), got {tuple(outputs.shape)} at m = 8"
            )
        self.model.probabilities = looks_like_probabilities(outputs)

    # ------------------------------------------------------------------ what a method may change

    def _network(self, network: nn.Module) -> nn.Module:
        """The network that is smoothed, from the one that was given."""
        return network

    def _smoothed(self, network: nn.Module, sigma: float, **settings: Any) -> SmoothedModule:
        """The soft version of what is certified: what trains, and what attacks aim at."""
        return SmoothedModule(network, sigma, **settings)

    def _rule(self, radii: tuple[float, ...] | None) -> Rule:
        """How to decide where the caller does not say: for the whole radius, or for named ones."""
        return OneSided(self.alpha) if radii is None else Sequential(radii, self.alpha)

    def _certify(
        self, f: nn.Module, x: Tensor, *, n: int, n0: int, rules: Sequence[Rule], seed: int, indices: NDArray[np.int64]
    ) -> list[Certificates]:
        """Certificates of one group of inputs under each rule, from the base classifier as it votes."""
        return certify_all(f, x, self.noise(self.scale), n=n, n0=n0, rules=rules, **self._votes(seed, indices))

    def _predict(
        self, f: nn.Module, x: Tensor, *, n: int, alpha: float, seed: int, indices: NDArray[np.int64]
    ) -> Predictions:
        """Predictions for one group of inputs."""
        return predict(f, x, self.noise(self.scale), n=n, alpha=alpha, **self._votes(seed, indices))

    def _votes(self, seed: int, indices: NDArray[np.int64]) -> dict[str, Any]:
        """What every count of votes takes."""
        block = self.performance.block
        return {"num_classes": self.nb_classes, "seed": seed, "indices": indices, "block": block}

    # ------------------------------------------------------------------ certificates and predictions

    def _voter(self, f: BaseClassifier | None = None) -> nn.Module:
        """A classifier as it votes, made anew when its weights or transform, or `performance`, have changed."""
        return self._voters[-1].of(self.model.f if f is None else f, self.performance)

    def certificates(
        self,
        x: ArrayLike | Tensor,
        *,
        n: int | None = None,
        radii: Sequence[float] | None = None,
        tolerance: float | None = None,
        n0: int | None = None,
        rule: Rule | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 128,
    ) -> Certificates:
        """Certify b inputs, with all that is needed to judge each certificate.

        Parameters
        ----------
        x : array_like or Tensor, shape (b, *input_shape)
            Raw inputs, within clip_values; cast to float32.
        n : int, optional
            Estimation draws for each input; 10,000 by default. With radii or a tolerance the most that an input may
            take, 100,000 by default.
        radii : sequence of float, optional
            Certify the largest of these that holds, and stop as soon as that is clear; see `Sequential`.
        tolerance : float, optional
            Certify the whole radius, with as few draws as an expected loss of this much allows; see `Planned`.
        n0 : int, optional
            Selection draws; `sample_size` by default, and at least 500 with a tolerance, whose pilot they are.
        rule : Rule, optional
            From votes to a decision; ``OneSided(alpha)``, or what radii or tolerance ask for, by default.
        indices : array_like of int, shape (b,), optional
            Index of each input in its data set, which names its noise; its position in x by default.
        seed : int, optional
            In [0, 2**63); None draws entropy from the system. Recorded either way. A seed known to whoever chooses the
            inputs voids alpha: fix it after the inputs.
        batch_size : int
            Inputs on the device at a time. It bounds memory and changes no bit of the result.

        Returns
        -------
        Certificates
            One row for each input; radii in l2, in the units of the raw input.

        Raises
        ------
        ValueError, TypeError
            For inputs of the wrong shape or type, NaN or Inf, outside clip_values by more than 1e-6; for n, n0, seed or
            indices out of range; for a network whose output depends on its batch.

        Notes
        -----
        *Guarantee.* For each input, with probability at least 1 - alpha over the draws: either the certificate
        abstains, or argmax_c P(f(z + eps) = c) is its class for every z closer to x than its radius.

        *Source.* Cohen et al. (2019), CERTIFY, theorem 1 and proposition 2.
        """
        if sum(choice is not None for choice in (radii, tolerance, rule)) > 1:
            raise ValueError("radii, tolerance and rule each say how to decide; give one of them")
        if n is None:
            n = N_MAX if radii is not None or tolerance is not None else N
        if radii is None and tolerance is None and rule is None and 0.5 ** check_count(n, "n") > self.alpha:
            warnings.warn(
                f"n={n} draws can never certify at alpha={self.alpha}: every input will abstain; use a larger n",
                stacklevel=2,
            )
        if radii is not None:
            rule = self._rule(tuple(np.atleast_1d(np.asarray(radii, dtype=np.float64)).tolist()))
        elif tolerance is not None:
            rule, n0 = Planned(tolerance, self.alpha), max(self.sample_size, PILOT) if n0 is None else n0
        rules = [self._rule(None) if rule is None else rule]
        return self.compare(x, rules, n=n, n0=n0, indices=indices, seed=seed, batch_size=batch_size)[0]

    def compare(
        self,
        x: ArrayLike | Tensor,
        rules: Sequence[Rule],
        *,
        n: int = N,
        n0: int | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 128,
    ) -> list[Certificates]:
        """Certify b inputs under several rules that share their draws.

        Parameters
        ----------
        x, n, n0, indices, seed, batch_size
            As in `certificates`.
        rules : sequence of Rule
            From votes to a decision.

        Returns
        -------
        list of Certificates
            One for each rule, the same as `certificates` gives for it.

        Raises
        ------
        ValueError, TypeError
            As `certificates`, and for no rules.

        Notes
        -----
        *Guarantee.* That of `certificates` for each rule on its own.
        """
        inputs = self._inputs(x, strict=True)
        keys, seed = check_indices(indices, len(inputs)), check_seed(seed)
        settings: dict[str, Any] = {"n": n, "n0": self.sample_size if n0 is None else n0, "rules": rules, "seed": seed}
        with evaluating(self.model):
            f = self._voter()
            groups = [
                self._certify(f, inputs[rows].to(self.device), indices=keys[rows], **settings)
                for rows in self._groups(len(inputs), batch_size)
            ]
        found = [Certificates.concatenate(parts) for parts in zip(*groups, strict=True)]
        return [replace(certificates, performance=str(self.performance)) for certificates in found]

    def certify(
        self,
        x: ArrayLike | Tensor,
        n: int | None = None,
        batch_size: int = 32,
        *,
        radii: Sequence[float] | None = None,
        tolerance: float | None = None,
    ) -> tuple[Array, Array]:
        """Certify b inputs, in ART's form.

        Parameters
        ----------
        x : array_like or Tensor, shape (b, *input_shape)
            Raw inputs.
        n : int
            Estimation draws; `sample_size` further draws name the class.
        batch_size : int
            Inputs on the device at a time; changes no bit of the result.
        radii, tolerance
            As in `certificates`.

        Returns
        -------
        prediction : ndarray of int64, shape (b,)
            Certified class, -1 where abstained.
        radius : ndarray of float64, shape (b,)
            Certified l2 radius, 0 where abstained.

        Raises
        ------
        ValueError, TypeError
            As `certificates`.

        Notes
        -----
        *Guarantee.* That of `certificates`, at ``alpha``, with entropy from the system.
        """
        found = self.certificates(x, n=n, radii=radii, tolerance=tolerance, batch_size=batch_size)
        return np.where(found.abstained, -1, found.prediction), found.radius.copy()

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
        """Answer with the class of the smoothed classifier, with the votes behind it.

        Parameters
        ----------
        x : array_like or Tensor, shape (b, *input_shape)
            Raw inputs; not held to clip_values, and NaN only makes votes invalid.
        n : int, optional
            Votes for each input; `sample_size` by default.
        alpha : float, optional
            Probability of a wrong class, at most; the estimator's by default.
        indices, seed, batch_size
            As in `certificates`.
        verbose : bool
            Show a progress bar.

        Returns
        -------
        Predictions

        Raises
        ------
        ValueError, TypeError
            For inputs of the wrong shape or type, or n, alpha, indices, seed or batch_size out of range.

        Notes
        -----
        *Guarantee.* For each input, the probability of a class other than the smoothed classifier's is at most alpha.

        *Source.* Cohen et al. (2019), PREDICT and proposition 1.
        """
        inputs = self._inputs(x)
        keys, seed = check_indices(indices, len(inputs)), check_seed(seed)
        n, alpha = self.sample_size if n is None else check_count(n, "n"), self.alpha if alpha is None else alpha
        warn_if_hopeless(n, alpha)
        groups = self._groups(len(inputs), batch_size)
        with evaluating(self.model):
            f = self._voter()
            parts = [
                self._predict(f, inputs[rows].to(self.device), n=n, alpha=alpha, seed=seed, indices=keys[rows])
                for rows in tqdm(groups, desc="Randomized smoothing", disable=not verbose)
            ]
        return Predictions.concatenate(parts)

    def attack_view(self, samples: int | None = None, seed: int = 0) -> PyTorchClassifier:
        """Deterministic soft scores of the smoothed classifier, for attacks that need scores.

        Parameters
        ----------
        samples : int, optional
            Draws in its fixed bank; `bank_samples` by default.
        seed : int
            Seed of its bank.

        Returns
        -------
        PyTorchClassifier
            Sharing this network, with sigma and preprocessing as they are now; log mean probabilities, float32 inside
            whatever comes in, never abstaining. An adversarial example of the view is one of the smoothed classifier
            only after fresh votes say so.
        """
        module = self._smoothed(
            self.model.base,
            self.scale,
            transform=self.model.f.transform,
            samples=self.bank_samples if samples is None else samples,
            seed=seed,
            probabilities=self.model.probabilities,
            block=self.performance.block,
        )
        return PyTorchClassifier(
            model=module.eval(),
            loss=self.loss,
            input_shape=self.input_shape,
            nb_classes=self.nb_classes,
            channels_first=self.channels_first,
            clip_values=self.clip_values,
            preprocessing=None,
            device_type=self.device_type,
        )

    def get_activations(
        self, x: Array | Tensor, layer: int | str, batch_size: int = 128, framework: bool = False
    ) -> Array | Tensor:
        """Activations of a layer of the base network at clean inputs.

        Parameters
        ----------
        x : ndarray or Tensor, shape (b, *input_shape)
            Raw inputs.
        layer : int or str
            Position or name among `layer_names`, the children of the base network.
        batch_size : int
            Inputs of one forward pass.
        framework : bool
            True returns a tensor that carries gradients.

        Raises
        ------
        ValueError, TypeError
            If there is no such layer.
        """
        names = self.layer_names
        if isinstance(layer, str) and layer in names:
            name = layer
        elif isinstance(layer, int | np.integer) and -len(names) <= layer < len(names):
            name = names[layer]
        else:
            raise ValueError(f"layer must be one of {names} or its position, got {layer!r}")
        inputs, size = self._inputs(x, keep_dtype=framework).to(self.device), check_count(batch_size, "batch_size")
        found: list[Tensor] = []
        handle = self.model.base.get_submodule(name).register_forward_hook(lambda *call: found.append(call[2]))
        try:
            with torch.set_grad_enabled(framework), evaluating(self.model):
                for start in range(0, len(inputs), size):
                    self.model.f(self.model.f.lift(inputs[start : start + size]))
        finally:
            handle.remove()
        activations = torch.cat(found)
        return activations if framework else activations.cpu().numpy()

    # ------------------------------------------------------------------ copies

    def close(self) -> None:
        """Let go of what the method holds open; nothing here."""

    def __getstate__(self) -> dict[str, Any]:
        # ART writes files into its data folder on every pickle and deepcopy; this one is whole in itself
        left = ("_model_wrapper", "_device", "_voters")
        state = {name: value for name, value in self.__dict__.items() if name not in left}
        state["_model"] = self.model
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state.pop("_model")
        self.__dict__.update(state)
        self._model = self._make_model_wrapper(module)
        self._voters = [Voters()]   # the last of them votes; see `share_votes`
        self._check_params()


@contextmanager
def share_votes(*estimators: PyTorchSmoothedClassifier, voters: Voters | None = None) -> Iterator[None]:
    """Let estimators of one network share their votes: a draw that several of them ask about is one forward pass.

    Parameters
    ----------
    *estimators : PyTorchSmoothedClassifier
        Around one and the same network object and with the same ``performance``, such as plain smoothing and
        `PyTorchInstaRS` at some of its noise levels. Preprocessing that an estimator was given is its own, and sets its
        votes apart; put it into the network to share them.
    voters : Voters, optional
        Networks ready to vote, from an earlier block; their votes are let go of when this one ends.

    Raises
    ------
    ValueError
        For no estimators, and for a ``performance`` that leaves dtype, layout and code as they are: only a frozen copy
        of the network can vouch that its votes are still true. ``Performance(channels_last=True)`` makes one.
    TypeError
        For what is none of our estimators.

    Notes
    -----
    Votes are shared where seed, index, input and sigma agree, and kept until the block ends; each certificate has the
    same bits as without it, and ``passes`` counts what it would have taken alone. New weights are noticed; what else
    makes the network another function has to stay as it is.

    *Guarantee.* That of each certificate on its own. They err together rather than independently, and for the best of
    several at one input the failure probabilities add, as always.

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> settings = (network, nn.CrossEntropyLoss(), (1, 2, 2), 2)
    >>> sure, unsure = (
    ...     PyTorchSmoothedClassifier(*settings, alpha=alpha, performance=Performance(channels_last=True))
    ...     for alpha in (0.001, 0.1)
    ... )
    >>> with share_votes(sure, unsure):
    ...     counts = [each.certificates(np.full((1, 1, 2, 2), 0.5), n=1000, seed=0).count[0] for each in (sure, unsure)]
    >>> bool(counts[0] == counts[1])
    True
    """
    if not estimators:
        raise ValueError("estimators must hold at least one")
    for estimator in estimators:
        if not isinstance(estimator, PyTorchSmoothedClassifier):
            raise TypeError(f"estimators must be PyTorchSmoothedClassifier, got {type(estimator).__name__}")
        if not estimator.performance.freezes:
            raise ValueError(
                "performance must make a frozen copy of the network, such as Performance(channels_last=True), so that "
                f"votes can be shared; got {estimator.performance!r}"
            )
    common = Voters(4 * len(estimators), keeping=True) if voters is None else voters
    try:
        for estimator in estimators:
            estimator._voters.append(common)
        yield
    finally:
        for estimator in estimators:
            estimator._voters.remove(common)
        common.forget()
