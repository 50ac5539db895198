"""Data-dependent smoothing: sigma chosen for each input, and what can be promised all the same."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from art_rs_plugins.estimators.base import N, PyTorchSmoothedClassifier
from art_rs_plugins.estimators.inputs import warn_if_hopeless
from art_rs_plugins.estimators.modes import Commit, Frozen, Mode, aim, as_given, check_mode
from art_rs_plugins.estimators.preprocessing import ArtTransform
from art_rs_plugins.estimators.store import Memory, Reply
from art_rs_plugins.smoothing.certify import Predictions, certify_all, predict
from art_rs_plugins.smoothing.digest import network_digest, printed
from art_rs_plugins.smoothing.modules import SmoothedModule
from art_rs_plugins.smoothing.noise import Gaussian, check_seed, derive_seed
from art_rs_plugins.smoothing.sampling import check_count, check_indices, evaluating
from art_rs_plugins.smoothing.scales import Conditional, certify_at, certify_frozen, sigma_of
from art_rs_plugins.smoothing.soft import ScaleModule
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.rules import OneSided, Rule

__all__ = ["PyTorchDataDependentSmoothing"]


class PyTorchDataDependentSmoothing(PyTorchSmoothedClassifier):
    """Smoothed classifier whose sigma depends on the input, with the promise that its `mode` can keep.

    As published, sigma is chosen anew for each query and the radius at the chosen sigma is reported. That radius speaks
    of a classifier frozen at this input, while the one that is deployed may choose another sigma, and another class,
    right beside it. Each mode repairs this in its own way, or says that it does not.

    Parameters
    ----------
    *args, **kwargs
        As `PyTorchSmoothedClassifier`. `scale` is the noise level of training, and where a search begins; `noise` is
        Gaussian.
    mode : Mode
        - ``Commit(search, path, budget)``: a memory keeps every promise; order-dependent. Kind ``committed``.
        - ``Frozen(regions)``: a memory that no longer changes, before plain smoothing at `scale`. Kind ``certified``.
        - ``BinnedSigma``, ``ElasticSigma``, ``ExtendedSigma``: a fixed sigma(x), no memory. Kind ``certified``.
        - ``Conditional(search)``: as published. Kind ``conditional``; it promises nothing about what is deployed.

        ``Commit()`` by default, in main memory.

    Raises
    ------
    ValueError, TypeError
        As `PyTorchSmoothedClassifier`, and for another mode or noise. From answers under ``Commit``: if the memory
        belongs to another model or other settings, or is damaged (ValueError), is open elsewhere, or cannot be written
        (OSError). Nothing is answered then but what is stored.

    Notes
    -----
    *Guarantee.* Certificates: that of the mode. `predict` and `predictions` answer with the same classifier. Under
    ``Commit`` they are answers like any other, stored with the radius that their n votes can show: whoever predicts
    first, with few votes, keeps a small radius; certify first. Answers follow from the input in float32. With a `seed`,
    draws differ from attempt to attempt all the same, but somebody who knows it could choose inputs that void alpha.
    Inputs of one call are settled as a set, whatever their order.

    *Cost.* n0 + n passes for each input, and ``search.cost`` under ``Commit`` and ``Conditional``; none where a promise
    of ``Commit`` covers it. ``Certificates.passes`` counts them. A memory keeps all inputs as they are, and whoever may
    ask can fill it; to serve strangers, use `freeze`. Threads may ask one estimator; they certify one after the other.
    It belongs to the weights, preprocessing and settings that it was begun with: after training it refuses to answer.

    *Source.* Alfarra, Bibi, Torr and Ghanem (2022), "Data-Dependent Randomized Smoothing", UAI; see
    `CertifiedRegions` for what differs. Sukenik, Kuvshinov and Guennemann (2022) for a sigma that changes slowly.

    Examples
    --------
    >>> from art_rs_plugins.smoothing.sigma import GridAscent
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> search = GridAscent(points=4, votes=50, iterations=2, draws=16, fresh=100)
    >>> classifier = PyTorchDataDependentSmoothing(
    ...     network, nn.CrossEntropyLoss(), (1, 2, 2), 2, scale=0.5, mode=Commit(search)
    ... )
    >>> classifier.certificates(np.full((1, 1, 2, 2), 0.5), n=1000).kind, classifier.memory.attempts
    ('committed', 1)
    """

    estimator_params = [   # noqa: RUF012 - ART's own convention
        *PyTorchSmoothedClassifier.estimator_params,
        "mode",
    ]

    def __init__(self, *args: Any, mode: Mode | None = None, **kwargs: Any) -> None:
        self._mode = check_mode(Commit() if mode is None else mode)
        self._memory: Memory | None = None
        self._opened_as: Any = None
        self._lock, self._voting = threading.Lock(), threading.Lock()
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------ settings

    @property
    def mode(self) -> Mode:
        """What answers. An open memory stays open until another is asked, or until `close`."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._mode = check_mode(value)
        self.model.certificate = aim(value)

    def _check_params(self) -> None:
        super()._check_params()
        if self.noise is not Gaussian:
            raise ValueError(f"noise must be Gaussian where sigma depends on the input, got {self.noise.__name__}")
        if isinstance(self._mode, Frozen) and self._mode.regions.shape != self.input_shape:
            raise ValueError(f"regions hold inputs of shape {self._mode.regions.shape}, not {self.input_shape}")

    # ------------------------------------------------------------------ the memory

    @property
    def memory(self) -> Memory:
        """The memory of ``Commit``, opened if need be; to read its ``records``, ``attempts``, ``spent`` and ``epoch``.

        Raises
        ------
        ValueError, OSError
            Under another mode, and as answers do.
        """
        facts = self._facts()
        with self._lock:
            if self._memory is not None and self._opened_as[0] != self._mode:
                self._memory.close()
                self._memory = None
            if self._memory is None:
                self._open(facts)
            elif self._opened_as[1] != facts:
                raise ValueError(
                    "the network or its settings have changed since promises were given; restore them, give the mode "
                    "another path, or end those promises with new_epoch()"
                )
            return self._memory   # type: ignore[return-value]   # opened above

    def new_epoch(self) -> None:
        """End all promises, and begin again with an empty memory and a new budget: for another model."""
        facts = self._facts()
        self.close()
        with self._lock:
            self._open(facts, new_epoch=True)

    def freeze(self) -> Frozen:
        """All that is promised by now, as a mode in which nothing is added; while nobody else asks."""
        if self._memory is not None or self._committing().path is None:
            return Frozen(copy.deepcopy(self.memory.regions))
        with self._made(self._facts(), read_only=True) as memory:
            return Frozen(memory.regions)

    def close(self) -> None:
        """Close the memory's file, if it is open, so that it can be opened elsewhere; the next answer opens it again.

        A memory without a file ends here, and with it what it promised.
        """
        with self._lock:
            if self._memory is not None:
                self._memory.close()
            self._memory = None

    def _committing(self) -> Commit:
        if not isinstance(self._mode, Commit):
            raise ValueError(f"there is a memory under Commit alone; mode is {type(self._mode).__name__}")
        return self._mode

    def _facts(self) -> dict[str, Any]:
        """What promises depend on, and what else should not change while they are kept."""
        layers = [layer for layer in self.model.f.modules() if isinstance(layer, ArtTransform)]
        settings = {
            "scale": self.scale,
            "search": printed(self._committing().search),
            "preprocessing": [
                [type(each.operation).__name__, printed(each.limits)]
                + [f"{name}={printed(getattr(each.operation, name, None))}" for name in each.operation.params]
                for each in layers
            ],
        }
        return {"digest": network_digest(self.model.f), "settings": settings, "performance": str(self.performance)}

    def _made(self, facts: dict[str, Any], **how: Any) -> Memory:
        mode = self._committing()
        return Memory(mode.path, shape=self.input_shape, budget=mode.budget, **facts, **how)

    def _open(self, facts: dict[str, Any], **how: Any) -> None:
        self._memory = self._made(facts, **how)
        self._opened_as = self._mode, facts

    # ------------------------------------------------------------------ certificates and predictions

    def reply(
        self,
        x: ArrayLike | Tensor,
        *,
        n: int = N,
        n0: int | None = None,
        rule: Rule | None = None,
        indices: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 128,
    ) -> Reply:
        """Answer b inputs from the memory of ``Commit``, with how each promise came about.

        Parameters
        ----------
        x, n, n0, rule, indices, seed, batch_size
            As in `certificates`.

        Returns
        -------
        Reply
            Its certificates are those of `certificates`.

        Raises
        ------
        ValueError, TypeError, OSError
            As `certificates`, and under another mode.
        """
        inputs, chosen = self._inputs(x, strict=True), self._rule(None) if rule is None else rule
        n0 = self.sample_size if n0 is None else n0
        return self._ask(inputs, chosen, n=n, n0=n0, indices=indices, seed=seed, batch_size=batch_size)

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
        """As in the base class; a memory gives one answer, by one rule."""
        settings: dict[str, Any] = {"n": n, "n0": n0, "indices": indices, "seed": seed, "batch_size": batch_size}
        if not isinstance(self._mode, Commit):
            return super().compare(x, rules, **settings)
        if len(rules) != 1:
            raise ValueError(f"rules must be one under Commit, since a memory gives one answer; got {len(rules)}")
        return [self.reply(x, rule=rules[0], **settings).certificates]

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
        """As in the base class. Under ``Commit`` from the memory first, and stored; `sample_size` draws name the class.

        Raises
        ------
        ValueError, TypeError, OSError
            As in the base class; under ``Commit`` also as `certificates`, and for NaN, which no memory can hold.

        Notes
        -----
        *Guarantee.* Under ``Commit`` that of `Commit`; ``votes`` are those for the class alone, none where the memory
        answered. Elsewhere, the probability of a class other than the classifier's is at most alpha; under
        ``Conditional`` it is the class of the classifier frozen at this input.
        """
        settings: dict[str, Any] = {"indices": indices, "seed": seed, "batch_size": batch_size}
        if not isinstance(self._mode, Commit):
            return super().predictions(x, n=n, alpha=alpha, verbose=verbose, **settings)
        n, alpha = self.sample_size if n is None else check_count(n, "n"), self.alpha if alpha is None else alpha
        warn_if_hopeless(n, alpha)
        reply = self._ask(self._inputs(x), OneSided(alpha), n=n, n0=self.sample_size, **settings)
        found = reply.certificates
        votes = np.zeros((len(found), self.nb_classes), dtype=np.int64)
        drawn = [row for row, promise in enumerate(reply.promises) if promise.is_record or found.abstained[row]]
        votes[drawn, found.prediction[drawn]] = found.count[drawn]
        seeds = found.seed[drawn]
        return Predictions(
            found.prediction, found.abstained, votes, n, alpha, int(seeds[0]) if len(seeds) else check_seed(seed)
        )

    def _ask(
        self, x: Tensor, rule: Rule, *, n: int, n0: int, indices: ArrayLike | None, seed: int | None, batch_size: int
    ) -> Reply:
        """Answer inputs (b, ...) from the memory, and certify those that it does not cover."""
        memory, keys, seed = self.memory, check_indices(indices, len(x)), check_seed(seed)
        passes = np.zeros(len(x), dtype=np.int64)

        def sample(rows: NDArray[np.int64], alpha: float) -> Certificates:
            own = replace(rule, alpha=min(alpha, rule.alpha))   # type: ignore[type-var]
            settings: dict[str, Any] = {"n": n, "n0": n0, "rules": [own], "seed": derive_seed(seed, memory.attempts)}
            with self._voting, evaluating(self.model):   # whoever ends first restores modes
                f = self._voter()
                groups = [rows[part] for part in self._groups(len(rows), batch_size)]
                parts = [self._certify(f, x[g].to(self.device), indices=keys[g], **settings)[0] for g in groups]
            found = replace(Certificates.concatenate(parts), performance=str(self.performance))
            passes[rows] = found.passes
            return found

        reply = memory.answer(as_given(x), sample, indices=keys)
        return replace(reply, certificates=replace(reply.certificates, passes=passes))

    # ------------------------------------------------------------------ what the base class leaves open

    def _smoothed(self, network: nn.Module, sigma: float, **settings: Any) -> SmoothedModule:
        return _Aimed(network, sigma, certificate=aim(self._mode), **settings)

    def _certify(
        self, f: nn.Module, x: Tensor, *, n: int, n0: int, rules: Sequence[Rule], seed: int, indices: NDArray[np.int64]
    ) -> list[Certificates]:
        mode = self._mode
        settings: dict[str, Any] = {"n": n, "n0": n0, "rules": rules, **self._votes(seed, indices)}
        if isinstance(mode, Frozen):
            return [mode.settle(x, each) for each in certify_all(f, x, Gaussian(self.scale), **settings)]
        if not isinstance(mode, Commit | Conditional):
            return certify_at(f, x, mode, **settings)
        return certify_frozen(f, x, mode, start=self.scale, probabilities=self.model.probabilities, **settings)

    def _predict(
        self, f: nn.Module, x: Tensor, *, n: int, alpha: float, seed: int, indices: NDArray[np.int64]
    ) -> Predictions:
        mode = self._mode
        if not isinstance(mode, Frozen):
            draws, start = self._votes(seed, indices), self.scale
            sigma = sigma_of(mode, f, x, start=start, probabilities=self.model.probabilities, **draws)
            return predict(f, x, Gaussian(sigma), n=n, alpha=alpha, **draws)
        covers = mode.covering(x)
        prediction = np.array([-1 if cover is None else cover.prediction for cover in covers], dtype=np.int64)
        abstained, votes = np.zeros(len(x), dtype=bool), np.zeros((len(x), self.nb_classes), dtype=np.int64)
        rows = np.flatnonzero(prediction < 0)
        if len(rows):
            found = predict(f, x[rows], Gaussian(self.scale), n=n, alpha=alpha, **self._votes(seed, indices[rows]))
            prediction[rows], abstained[rows], votes[rows] = found.prediction, found.abstained, found.votes
        return Predictions(prediction, abstained, votes, n, alpha, seed)

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        left = ("_memory", "_opened_as", "_lock", "_voting")   # two copies of a memory would give different promises
        return {name: value for name, value in super().__getstate__().items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory, self._opened_as = None, None
        self._lock, self._voting = threading.Lock(), threading.Lock()
        super().__setstate__(state)


class _Aimed(ScaleModule):
    """What attacks aim at: plain smoothing, where `aim` says nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return SmoothedModule.forward(self, x) if self.certificate is None else super().forward(x)
