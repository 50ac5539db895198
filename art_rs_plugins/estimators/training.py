"""How a smoothed classifier is trained, and what it writes: ART's `fit`, losses, adversaries, a sigma for each."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from art import config
from art.data_generators import PyTorchDataGenerator
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from art_rs_plugins.estimators.inputs import as_limits, as_one_hot, check_lengths
from art_rs_plugins.estimators.interface import SmoothedInterface
from art_rs_plugins.estimators.tables import BoundTable, TableMaker
from art_rs_plugins.smoothing.adversary import SmoothAdv
from art_rs_plugins.smoothing.noise import Gaussian, derive_seed
from art_rs_plugins.smoothing.sampling import check_count
from art_rs_plugins.smoothing.sigma_table import SigmaTable
from art_rs_plugins.smoothing.training import Adversary, Epoch, Loss, NoiseSchedule, Scheduler, fit, shuffled

__all__ = ["Trainable", "read_weights", "target_of"]

Array = NDArray[Any]


class Trainable(SmoothedInterface):
    """Training and files of an estimator, and the settings that concern nothing else.

    They ask an estimator for what is named here and in the interface, and for nothing else.
    """

    optimizer: Any
    history_: list[Epoch]
    _table: TableMaker | None
    _bound: BoundTable | None = None
    get_params: Any
    reset: Any
    _augmentations: Any


    @property
    def objective(self) -> Loss | None:
        """What `fit` minimises; the mean of ``loss`` over the noisy copies if None."""
        return self._objective

    @objective.setter
    def objective(self, value: Loss | None) -> None:
        if value is not None and not callable(value):
            raise TypeError(f"objective must be a loss of noisy logits, such as ADRE(), got {type(value).__name__}")
        self._objective = value

    @property
    def draws(self) -> int:
        """Noisy copies of each input in training."""
        return self._draws

    @draws.setter
    def draws(self, value: int) -> None:
        self._draws = check_count(value, "draws")

    @property
    def adversary(self) -> Adversary | None:
        """What moves the inputs of a batch in training."""
        return self._adversary

    @adversary.setter
    def adversary(self, value: Adversary | None) -> None:
        if value is not None and not callable(getattr(value, "attack", None)):
            raise TypeError(f"adversary must have a method attack, such as SmoothAdv(eps), got {type(value).__name__}")
        self._adversary = value

    @property
    def table(self) -> TableMaker | None:
        """What makes the sigma table of training; None trains at `scale`."""
        return self._table

    @table.setter
    def table(self, value: TableMaker | None) -> None:
        if value is not None and not callable(value):
            raise TypeError(
                "table must make a SigmaTable from a number of examples and a sigma, such as SigmaTable itself, got "
                f"{type(value).__name__}"
            )
        self._table = value
        if value is None or self._bound is None or self._bound.make is not value:
            self._bound = None if value is None else BoundTable(value)

    @property
    def table_(self) -> SigmaTable | None:
        """The sigma table, once `fit` has made it."""
        return None if self._bound is None else self._bound.table

    def _training_noise(self) -> Gaussian | NoiseSchedule:
        """Noise of training."""
        return Gaussian(self.scale) if self.table_ is None else self.table_

    def _mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of ART's constructor, over all noisy copies."""
        value: Tensor = self.loss(logits.flatten(0, 1), labels.expand(len(logits), *labels.shape).flatten(0, 1))
        return value

    # ------------------------------------------------------------------ training

    def fit(
        self,
        x: Array,
        y: Array,
        batch_size: int = 128,
        nb_epochs: int = 10,
        training_mode: bool = True,
        drop_last: bool = False,
        scheduler: Scheduler | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        """Train the base network under the noise that certification adds; further calls go on from there.

        Parameters
        ----------
        x : ndarray, shape (b, *input_shape)
            Raw inputs, within clip_values.
        y : ndarray, shape (b,) or (b, nb_classes)
            Class indices, one-hot rows or probabilities.
        batch_size, nb_epochs : int
            Inputs of a batch, passes over the data.
        training_mode : bool
            False keeps the network in eval mode while it is trained.
        drop_last : bool
            Leave out the last batch if it is short.
        scheduler : optional
            Learning-rate schedule of PyTorch, stepped after each epoch.
        verbose : bool
            Show a progress bar with loss and accuracy under noise.
        **kwargs
            Ignored, as in ART.

        Raises
        ------
        ValueError, TypeError
            Without an optimizer; for inputs or labels that do not fit, NaN, or inputs outside clip_values; if the loss
            is not finite. With a table, for another x than that of earlier calls, or a network that ends in a softmax.
        """
        if self._bound is not None:
            self._bind(x, y, self._bound)
        inputs, targets = self._training_batch(x, y)
        if self.table_ is not None and len(inputs) != len(self.table_.sigma):
            raise ValueError(f"augmentation makes {len(inputs)} examples of {len(self.table_.sigma)}, but table has a "
                             "sigma for each of these; leave one of them out")   # fmt: skip
        seed = self._next_seed()
        batches = shuffled(inputs, targets, batch_size=batch_size, seed=seed, drop_last=drop_last)
        self._train(batches, nb_epochs, seed=seed, scheduler=scheduler, train_mode=training_mode, verbose=verbose)

    def _bind(self, x: Any, y: Any, bound: BoundTable) -> None:
        """Make the sigma table, or hold it against the data set that it was made for."""
        inputs = self._inputs(x, strict=True).cpu().numpy()
        check_lengths(len(inputs), len(as_one_hot(y, self.nb_classes)))
        if self.model.probabilities:
            raise ValueError("table needs logits, but the network ends in a softmax; give it without that layer")
        bound.bind(inputs, self.scale)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, verbose: bool = False, **kwargs: Any) -> None:
        """Train on batches of one of ART's generators, under the same noise as `fit`.

        Parameters
        ----------
        generator : DataGenerator
            Of ART; a PyTorchDataGenerator streams its loader. It does not say which example is which, so that a method
            with a sigma for each cannot train on it.
        nb_epochs : int
            Passes over the data.
        verbose : bool
            Show a progress bar.
        **kwargs
            ``scheduler``, as in `fit`.
        """
        if not isinstance(self._training_noise(), Gaussian):
            raise ValueError("fit_generator does not say which example is which, as a sigma for each needs; use fit")

        def batches(_: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            seen = 0
            if isinstance(generator, PyTorchDataGenerator):
                found: Iterable[Any] = generator.iterator
            else:
                found = (generator.get_batch() for _ in range(max(1, generator.size // generator.batch_size)))
            for x, y in found:
                inputs, targets = self._training_batch(x, y)
                yield torch.from_numpy(inputs), torch.from_numpy(targets), torch.arange(seen, seen + len(inputs))
                seen += len(inputs)

        scheduler = kwargs.get("scheduler")
        self._train(
            batches, nb_epochs, seed=self._next_seed(), scheduler=scheduler, train_mode=True, verbose=verbose
        )

    def _train(
        self,
        batches: Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor]]],
        epochs: int,
        *,
        seed: int,
        scheduler: Scheduler | None,
        train_mode: bool,
        verbose: bool,
    ) -> None:
        if self.optimizer is None:
            raise ValueError("optimizer is needed to train, but none was given to the constructor")
        check_count(epochs, "nb_epochs")
        if self.model.probabilities and (self.objective is not None or self.adversary is not None):
            raise ValueError(
                "objective and adversary take logits, but the network ends in a softmax; give it without that layer"
            )
        with tqdm(total=epochs, desc="Epochs", disable=not verbose) as bar:

            def report(epoch: Epoch) -> None:
                bar.set_postfix(loss=f"{epoch.loss:.3f}", noisy_accuracy=f"{epoch.noisy_accuracy:.3f}")
                bar.update()

            self.history_ = fit(
                self.model.f,
                batches,
                optimizer=self.optimizer,
                epochs=epochs,
                scheduler=scheduler,
                train_mode=train_mode,
                seed=seed,
                callback=report,
                noise=self._training_noise(),
                loss=self._mean_loss if self.objective is None else self.objective,
                draws=self.draws,
                adversary=self._bounded_adversary(),
            )

    def _bounded_adversary(self) -> Adversary | None:
        """The adversary, held to clip_values unless it says otherwise itself."""
        limits = as_limits(self.clip_values, self.input_shape, self.channels_first)
        if isinstance(self.adversary, SmoothAdv) and self.adversary.clip_values is None and limits is not None:
            return replace(self.adversary, clip_values=tuple(limit.to(self.device) for limit in limits))
        return self.adversary

    def _next_seed(self) -> int:
        """Seed of one call of `fit`; ART's trainers call it for every batch, and each must meet noise of its own."""
        key = self.model.next_key()
        return derive_seed(key.seed, key.chunk)

    def _training_batch(self, x: Any, y: Any) -> tuple[NDArray[np.float32], Array]:
        """Checked inputs and the labels that the loss takes, after the augmentations of training data."""
        inputs, labels = self._inputs(x, strict=True).cpu().numpy(), as_one_hot(y, self.nb_classes)
        check_lengths(len(inputs), len(labels))
        for operation in self._augmentations:
            inputs, labels = operation(inputs, labels)
        targets = self.reduce_labels(np.asarray(labels, dtype=np.float32))
        return np.asarray(inputs, dtype=np.float32), np.asarray(targets)

    # ------------------------------------------------------------------ copies and files

    def clone_for_refitting(self) -> Self:
        """Copy with the same settings and optimiser, and fresh weights."""
        if self.optimizer is None:
            raise ValueError("optimizer is needed to clone for refitting, but none was given to the constructor")
        if len(self.optimizer.param_groups) > 1:
            raise ValueError("optimizer has several parameter groups, which a clone cannot keep; build it yourself")
        network = copy.deepcopy(self.model.base)
        family = type(self.optimizer)
        accepted = inspect.signature(family.__init__).parameters
        defaults = {name: value for name, value in self.optimizer.defaults.items() if name in accepted}
        settings = {**self.get_params(), "model": network, "optimizer": family(network.parameters(), **defaults)}
        clone = type(self)(**settings)
        clone.reset()
        return clone

    def save(self, filename: str, path: str | None = None) -> None:
        """Write ``filename.model`` and ``.optimizer``, and the sigma table to ``.sigmas`` where there is one.

        Parameters
        ----------
        filename : str
            Name without extension.
        path : str, optional
            Folder; ART's data folder by default.
        """
        target = target_of(filename, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.base.state_dict(), f"{target}.model")
        if self.optimizer is not None:
            torch.save(self.optimizer.state_dict(), f"{target}.optimizer")
        Path(f"{target}.sigmas").unlink(missing_ok=True)   # one of another save would be taken for ours
        if self._bound is not None and self._bound.table is not None:
            torch.save(self._bound.state_dict(), f"{target}.sigmas")

    def load(self, filename: str, path: str | None = None) -> None:
        """Go on with what `save` wrote: weights, and optimiser and sigma table where this estimator has them.

        Parameters
        ----------
        filename, path : str
            As of `save`.

        Raises
        ------
        ValueError, OSError
            For files that are missing, damaged or of another network; nothing is changed then.
        """
        target, network = target_of(filename, path), self.model.base
        weights = read_weights(f"{target}.model", network, self.device)
        optimizer = None if self.optimizer is None else read_state(f"{target}.optimizer", self.device)
        bound = None if self.table is None else BoundTable(self.table)
        if bound is not None and Path(f"{target}.sigmas").exists():   # there is none before the first `fit`
            bound.load_state_dict(read_state(f"{target}.sigmas", self.device), self.scale)
        if optimizer is not None:
            self.optimizer.load_state_dict(optimizer)
        network.load_state_dict(weights)
        self._bound = bound


def target_of(filename: str, path: str | None) -> Path:
    """Where ART's `save` writes, without an extension."""
    return Path(path if path is not None else config.ART_DATA_PATH) / filename


def read_state(path: str, device: torch.device) -> dict[str, Any]:
    """Read a state dict; ``ValueError`` for a file that holds none."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:   # a damaged file raises whatever its bytes suggest
        raise ValueError(f"{path} cannot be read ({error}); save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no state; save it again")
    return found


def read_weights(path: str, network: nn.Module, device: torch.device) -> dict[str, Any]:
    """Read the weights of a network, and leave it as it is; ``ValueError`` for a file that holds those of another."""
    found = read_state(path, device)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    if {name: getattr(value, "shape", None) for name, value in found.items()} != shapes:
        raise ValueError(f"{path} does not fit this network; build the network that it was saved from")
    return found
