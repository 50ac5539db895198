"""What ART asks of any smoothed classifier, whether it is one or a composition: answers, gradients, losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from art_rs_plugins.estimators.inputs import as_inputs, as_limits, as_one_hot, check_finite, check_lengths, check_range
from art_rs_plugins.smoothing.sampling import check_count, evaluating

__all__ = ["SmoothedInterface"]

Array = NDArray[Any]


class SmoothedInterface:
    """Methods of ART's classifiers, in its own form, out of a soft ``model`` and of ``predictions``.

    They ask an estimator for what is named here, and for nothing else.
    """

    model: Any
    loss: Any
    device: Any
    input_shape: tuple[int, ...]
    nb_classes: int
    clip_values: Any
    channels_first: bool
    noise: Any
    scale: Any
    predictions: Any
    reduce_labels: Any


    def predict(self, x: Array, batch_size: int = 128, verbose: bool = False, **kwargs: Any) -> Array:
        """Answer with the class of the smoothed classifier, in ART's form.

        Parameters
        ----------
        x : ndarray, shape (b, *input_shape)
            Raw inputs. Under `GridGaussian` the answer is that for the nearest input of 8 bits.
        batch_size : int
            Inputs on the device at a time; changes no bit of the result.
        verbose : bool
            Show a progress bar.
        **kwargs
            ``is_abstain=False`` answers with the leading class where the votes are not clear; ``seed`` reproduces the
            votes. What else ART's callers pass (``training_mode``, ``logits``) has no meaning here.

        Returns
        -------
        ndarray of float64, shape (b, nb_classes)
            One-hot rows, and a row of zeros where abstained. ``argmax`` of that is class 0: attacks that need scores
            take `attack_view`.

        Raises
        ------
        ValueError, TypeError
            For inputs of the wrong shape or type, or a batch_size or seed out of range.

        Notes
        -----
        *Guarantee.* For each input, the probability of a class other than the smoothed classifier's is at most alpha.

        *Source.* Cohen et al. (2019), PREDICT and proposition 1.
        """
        abstains = kwargs.get("is_abstain")
        if abstains is not None and not isinstance(abstains, bool):
            raise ValueError(f"is_abstain must be a bool, got {abstains!r}")
        inputs = self.noise(self.scale).nearest(self._inputs(x))   # attacks of ART ask about whatever they try
        found = self.predictions(inputs, seed=kwargs.get("seed"), batch_size=batch_size, verbose=verbose)
        answers = np.zeros((len(found.prediction), self.nb_classes))
        answered = np.ones_like(found.abstained) if abstains is False else ~found.abstained
        answers[np.arange(len(answers)), found.prediction] = answered
        return answers

    # ------------------------------------------------------------------ gradients

    def loss_gradient(
        self, x: Array | Tensor, y: Array | Tensor, training_mode: bool = False, **kwargs: Any
    ) -> Array | Tensor:
        """Gradient of the loss with respect to the input.

        Parameters
        ----------
        x : ndarray or Tensor, shape (b, *input_shape)
            Raw inputs.
        y : ndarray or Tensor, shape (b,) or (b, nb_classes)
            Class indices, one-hot rows or probabilities.
        training_mode : bool
            True takes one fresh noise draw in place of the bank.
        **kwargs
            ``sampling=False`` takes the base classifier without noise, as ART's ShadowAttack does with its own noise.

        Returns
        -------
        ndarray or Tensor, shape of x
            Of the same kind as x, on its device.

        Raises
        ------
        ValueError, TypeError
            For inputs or labels that do not fit.
        """
        bare = kwargs.get("sampling") is False
        target = self.model.f if bare else self.model
        leaf = self._leaf(x)
        labels = self._labels(y, len(leaf))
        with evaluating(target):
            target.train(training_mode)
            (gradient,) = torch.autograd.grad(self.loss(target(target.lift(leaf) if bare else leaf), labels), leaf)
        return _as_given(gradient, x)

    def class_gradient(
        self,
        x: Array | Tensor,
        label: int | list[int] | Array | None = None,
        training_mode: bool = False,
        **kwargs: Any,
    ) -> Array | Tensor:
        """Gradient of the smoothed classifier's scores (log mean probabilities) with respect to the input.

        Parameters
        ----------
        x : ndarray or Tensor, shape (b, *input_shape)
            Raw inputs.
        label : int or array_like of int, shape (b,), optional
            One class for all inputs, or one for each; every class by default.
        training_mode : bool
            True takes one fresh noise draw in place of the bank.
        **kwargs
            Ignored, as in ART.

        Returns
        -------
        ndarray or Tensor, shape (b, nb_classes or 1, *input_shape)

        Raises
        ------
        ValueError, TypeError
            For inputs that do not fit, or classes out of range.
        """
        leaf = self._leaf(x)
        if label is None:
            wanted = torch.arange(self.nb_classes, device=self.device).expand(len(leaf), -1)
        else:
            given = np.asarray(label)
            if given.dtype.kind not in "iu" or np.any(given < 0) or np.any(given >= self.nb_classes):
                raise ValueError(f"label must be class indices in [0, {self.nb_classes}), got {label}")
            if given.ndim and given.shape != (len(leaf),):
                raise ValueError(f"label must be one class or have shape ({len(leaf)},), got shape {given.shape}")
            chosen = np.broadcast_to(given, (len(leaf),))
            wanted = torch.as_tensor(chosen.astype(np.int64), device=self.device)[:, None]
        with evaluating(self.model):
            self.model.train(training_mode)
            scores = self.model(leaf).gather(1, wanted)
            gradients = [
                torch.autograd.grad(scores[:, column].sum(), leaf, retain_graph=True)[0]
                for column in range(wanted.shape[1])
            ]
        return _as_given(torch.stack(gradients, dim=1), x)

    def compute_loss(
        self, x: Array | Tensor, y: Array | Tensor, reduction: str = "none", **kwargs: Any
    ) -> Array | Tensor:
        """Loss of the smoothed classifier's scores.

        Parameters
        ----------
        x, y
            As in `loss_gradient`.
        reduction : str
            ``"none"``, ``"mean"`` or ``"sum"``, as in PyTorch.
        **kwargs
            Ignored, as in ART.

        Returns
        -------
        ndarray or Tensor
            Shape (b,) for ``"none"``, else a scalar.
        """
        if not hasattr(self.loss, "reduction"):
            raise TypeError(f"loss {type(self.loss).__name__} has no reduction to set; use one of torch.nn")
        tensor, before = isinstance(x, Tensor), self.loss.reduction
        inputs = self._inputs(x, keep_dtype=True).to(self.device)
        labels = self._labels(y, len(inputs))
        self.loss.reduction = reduction
        try:
            with torch.set_grad_enabled(tensor), evaluating(self.model):
                value = self.loss(self.model(inputs), labels)
        finally:
            self.loss.reduction = before
        result: Array | Tensor = value if tensor else value.cpu().numpy()
        return result

    # ------------------------------------------------------------------ what comes in

    def _inputs(self, x: Any, *, strict: bool = False, keep_dtype: bool = False) -> Tensor:
        inputs = as_inputs(x, self.input_shape, keep_dtype=keep_dtype)
        if strict:
            check_finite(inputs)
            check_range(inputs, as_limits(self.clip_values, self.input_shape, self.channels_first))
        return inputs

    def _leaf(self, x: Array | Tensor) -> Tensor:
        return self._inputs(x, keep_dtype=True).to(self.device).detach().clone().requires_grad_()

    def _labels(self, y: Array | Tensor, length: int) -> Tensor:
        rows = as_one_hot(y, self.nb_classes)
        check_lengths(length, len(rows))
        return torch.as_tensor(self.reduce_labels(rows), device=self.device)

    @staticmethod
    def _groups(total: int, batch_size: int) -> list[slice]:
        """Parts of `total` inputs that lie on the device together."""
        size = check_count(batch_size, "batch_size")
        return [slice(start, start + size) for start in range(0, total, size)]


def _as_given(result: Tensor, x: Array | Tensor) -> Array | Tensor:
    """A result of the kind of x: tensor or array."""
    return result.detach() if isinstance(x, Tensor) else result.detach().cpu().numpy()
