"""ART's own smoothing classifiers as rows of a benchmark: trained and certified by ART's code, attacked as all others.

ART's certificates of randomized smoothing are sound where there is no preprocessing, and are drawn from NumPy's global
generator. `PyTorchDeRandomizedSmoothing` is not among them: it certifies patches, and no row of l2 radii can say that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from art.estimators.certification.randomized_smoothing import (
    PyTorchMACER,
    PyTorchRandomizedSmoothing,
    PyTorchSmoothAdv,
    PyTorchSmoothMix,
)
from numpy.typing import NDArray
from torch import Tensor, nn, optim

from art_rs_plugins.benchmark.evasion import global_seeds
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.noise import Gaussian, derive_seed
from art_rs_plugins.smoothing.sampling import strict_votes
from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.rules import OneSided, Rule

if TYPE_CHECKING:
    from art_rs_plugins.benchmark.config import TrainConfig
    from art_rs_plugins.benchmark.data import Dataset

__all__ = ["TRAINED_BY_ART", "ArtSmoothing", "baseline"]


class _Strict(nn.Module):
    """Votes of f as ART's code is to count them: one-hot, with a last class for what is no valid vote.

    ART takes the argmax, which is class 0 for NaN and among ties.
    """

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, noisy: Tensor) -> Tensor:
        logits = self.f(noisy)
        winner, valid = strict_votes(logits)
        place = torch.where(valid, winner, logits.shape[1])
        return torch.zeros((len(logits), logits.shape[1] + 1), device=logits.device).scatter_(1, place[:, None], 1.0)


class ArtSmoothing(PyTorchSmoothedClassifier):
    """The same network, certified by ART's `PyTorchRandomizedSmoothing.certify`; answers and attacks are as of ours.

    Notes
    -----
    *Guarantee.* That of `PyTorchSmoothedClassifier`, except that radii are as ART rounds them, and that noise is drawn
    in float64 from NumPy's global generator, seeded by (seed, index) for each input. ART's code counts, but a vote that
    is not valid counts for no class, as everywhere here.

    *Source.* Cohen et al. (2019), CERTIFY, in ART's code; needs statsmodels, which ART does not declare.
    """

    def _certify(
        self, f: nn.Module, x: Tensor, *, n: int, n0: int, rules: Sequence[Rule], seed: int, indices: NDArray[np.int64]
    ) -> list[Certificates]:
        if list(rules) != [OneSided(self.alpha)]:
            raise ValueError("ART certifies the whole radius by a rule of its own; leave rule, radii and tolerance out")
        if self.noise is not Gaussian:
            raise ValueError(f"noise must be Gaussian, which is all that ART draws, got {self.noise.__name__}")
        theirs = PyTorchRandomizedSmoothing(
            _Strict(f),
            self.loss,
            self.input_shape,
            self.nb_classes + 1,
            channels_first=self.channels_first,
            device_type=self.device_type,
            sample_size=n0,
            scale=self.scale,
            alpha=self.alpha,
        )
        seen: list[NDArray[np.float64]] = []
        count = theirs._prediction_counts

        def remember(*args: Any, **settings: Any) -> NDArray[np.float64]:
            seen.append(count(*args, **settings))
            return seen[-1]

        theirs._prediction_counts = remember
        inputs, radius, abstained = x.cpu().numpy(), np.zeros(len(x)), np.zeros(len(x), dtype=bool)
        for row, index in enumerate(indices.tolist()):
            with global_seeds(derive_seed(seed, index)):
                answer, radius[row : row + 1] = theirs.certify(inputs[row : row + 1], n=n, batch_size=1000)
            abstained[row] = answer[0] == -1
        chosen = np.stack(seen[0::2]).argmax(axis=1)
        abstained |= chosen == self.nb_classes   # what is no valid vote leads
        radius[abstained] = 0.0
        votes = np.stack(seen[1::2]).astype(np.int64)
        rivals = votes.copy()
        np.put_along_axis(rivals, chosen[:, None], 0, axis=1)
        counted = np.take_along_axis(votes, chosen[:, None], axis=1)[:, 0]
        lower = clopper_pearson_lower(counted, n, self.alpha)
        return [
            Certificates(
                prediction=np.minimum(chosen, self.nb_classes - 1),
                radius=radius,
                abstained=abstained,
                p_lower=lower,
                p_upper=1.0 - lower,
                count=counted,
                runner_up_count=rivals.max(axis=1),
                n=np.full(len(x), n),
                n0=np.full(len(x), n0),
                sigma=np.full(len(x), self.scale),
                alpha=np.full(len(x), self.alpha),
                index=indices,
                seed=np.full(len(x), seed),
            )
        ]


def _plain(config: TrainConfig) -> dict[str, Any]:  # noqa: ARG001
    return {}


def _macer(config: TrainConfig) -> dict[str, Any]:
    weight, draws = 12.0 if config.weight is None else config.weight, 16 if config.draws is None else config.draws
    return {"lmbda": weight, "gaussian_samples": draws}


def _smooth_adv(config: TrainConfig) -> dict[str, Any]:
    """One noisy copy: with more ART's code stops. Its attack is in linf and takes `eps` for that."""
    if not config.eps > 0.0:
        raise ValueError(f"eps must be > 0 for art-smoothadv, such as 0.1, got {config.eps}")
    return {"epsilon": config.eps, "num_steps": config.steps, "warmup": max(1, config.warmup)}


def _smooth_mix(config: TrainConfig) -> dict[str, Any]:
    draws = 2 if config.draws is None else config.draws
    return {"num_noise_vec": draws, "num_steps": config.steps, "warmup": max(1, config.warmup)}


TRAINED_BY_ART: Mapping[str, tuple[Callable[..., Any], Callable[[TrainConfig], dict[str, Any]]]] = {
    "art-gaussian": (PyTorchRandomizedSmoothing, _plain),
    "art-macer": (PyTorchMACER, _macer),
    "art-smoothadv": (PyTorchSmoothAdv, _smooth_adv),
    "art-smoothmix": (PyTorchSmoothMix, _smooth_mix),
}
"""Training by ART's classes, by name, each with what it takes of a configuration; defects and all."""


def baseline(config: TrainConfig, network: nn.Module, optimizer: optim.Optimizer, data: Dataset) -> Any:
    """ART's classifier of a configuration whose method is among `TRAINED_BY_ART`, around a network, for its `fit`."""
    family, settings = TRAINED_BY_ART[config.method]
    return family(
        network,
        nn.CrossEntropyLoss(),
        data.x_train.shape[1:],
        data.num_classes,
        optimizer=optimizer,
        clip_values=data.clip_values,
        device_type=config.device,
        scale=config.sigma,
        **settings(config),
    )
