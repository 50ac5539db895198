"""Selectors: what decides, by votes under noise, whether the smoothed classifier answers or the core; their soft form.

Every selector is a fixed function of one noisy copy, so that its smoothed decision has a radius. A score of the clean
input, or one that depends on other inputs, has none and cannot be expressed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from art_rs_plugins.smoothing.modules import SmoothedModule
from art_rs_plugins.smoothing.sampling import strict_votes
from art_rs_plugins.theory.composition import Leading, Threshold, check_tau
from art_rs_plugins.theory.radii import check_sigma
from art_rs_plugins.theory.rules import Rule, Sequential

__all__ = [
    "ComposedModule",
    "ConfidenceSelector",
    "FixedSelector",
    "Gate",
    "JointVotes",
    "Score",
    "ScoreSelector",
    "Selector",
    "core_probability",
    "entropy",
    "log_probabilities",
    "mixed",
]

Score = Callable[[Tensor], Tensor]
"""From log probabilities (m, k) of noisy copies to scores (m,) in [0, 1], each row by itself; low scores certify."""


def entropy(log_p: Tensor) -> Tensor:
    """Entropy of each row of log probabilities (m, k) over ln k: 0 for a certain class, 1 for none. Shape (m,)."""
    return (-(log_p.exp() * log_p).sum(dim=1) / math.log(log_p.shape[1])).clamp(0.0, 1.0)


def core_probability(log_p: Tensor) -> Tensor:
    """Probability of the first of k outputs, which stands for the core: the score of a learned selector. Shape (m,)."""
    return log_p[:, 0].exp()


def log_probabilities(outputs: Tensor, probabilities: bool) -> Tensor:
    """Log probabilities (m, k), float32 at least, of outputs that are logits, or probabilities already."""
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    if probabilities:
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
    return outputs.log_softmax(dim=1)


# ---------------------------------------------------------------------------------------------- selectors


@dataclass(frozen=True, slots=True, eq=False)
class ScoreSelector:
    r"""Certify the inputs whose noisy copies score low: a vote is ``score <= theta``, and a share tau of them decides.

    By default the score is the entropy of the smoothed network's own output for each copy, so that one pass yields the
    class and the selector's vote.

    Parameters
    ----------
    theta : float
        In [0, 1]. At 1 every valid vote says certify. For "always core" see `FixedSelector`: at 0 a saturated softmax
        still passes.
    tau : float
        Share of votes that selects an input, in [0, 1).
    score : callable
        See `Score`: `entropy`, `core_probability`, or any function of your own with values in [0, 1]. Values outside,
        and NaN, are invalid votes.
    network : Module, optional
        Network of raw inputs that the score is taken of; the smoothed network by default.
    sigma : float, optional
        Noise level of `network`; that of the smoothed classifier by default.

    Raises
    ------
    ValueError, TypeError
        For theta outside [0, 1], tau outside [0, 1), a sigma that is not positive or has no network, or a score or
        network of another type.

    Notes
    -----
    *Source.* Horvath et al. (2022), "Robust and accurate - compositional architectures for randomized smoothing": the
    entropy of each noisy copy, hard-voted. Theta means something else for every training: compare at equal accuracy.
    """

    theta: float
    tau: float = 0.5
    score: Score = entropy
    network: nn.Module | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= float(self.theta) <= 1.0:
            raise ValueError(
                f"theta must lie in [0, 1], the range of scores, got {self.theta}; "
                "to select nothing or everything use FixedSelector"
            )
        check_tau(self.tau)
        if not callable(self.score):
            raise TypeError(f"score must be a function of log probabilities (m, k), got {type(self.score).__name__}")
        if self.network is not None and not isinstance(self.network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module of raw inputs, got {type(self.network).__name__}")
        if self.sigma is not None:
            if self.network is None:
                raise ValueError("sigma is that of a network of the selector's own; give network as well, or no sigma")
            object.__setattr__(self, "sigma", float(check_sigma(self.sigma)))

    def rule(self, alpha: float, radii: tuple[float, ...] | None = None) -> Rule:
        """How its votes (b, 2) are certified: the whole radius, or named ones, for which tau must be 1/2."""
        return Sequential(radii, alpha) if radii is not None and self.tau == 0.5 else Threshold(self.tau, alpha)


@dataclass(frozen=True, slots=True)
class ConfidenceSelector:
    """Certify the inputs for which a share tau of the smoothed classifier's votes goes to one class.

    Parameters
    ----------
    tau : float
        In [0, 1). The radius falls short of the smoothed classifier's by sigma Phi^-1(tau).

    Raises
    ------
    ValueError
        For tau outside [0, 1).

    Notes
    -----
    *Source.* See `theory.composition.Leading`.
    """

    tau: float

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def rule(self, alpha: float, radii: tuple[float, ...] | None = None) -> Rule:   # noqa: ARG002 - as of others
        """How the votes (b, k) for the classes are read."""
        return Leading(self.tau, alpha)


@dataclass(frozen=True, slots=True)
class FixedSelector:
    """Certify every input, or none: either branch alone, and the last stage of a chain.

    Parameters
    ----------
    certify : bool
        True always takes the smoothed classifier, False always the core.
    """

    certify: bool

    def __post_init__(self) -> None:
        if not isinstance(self.certify, bool):
            raise TypeError(f"certify must be a bool, got {self.certify!r}")


Selector = ScoreSelector | ConfidenceSelector | FixedSelector


# ---------------------------------------------------------------------------------------------- votes


class JointVotes(nn.Module):
    """One output for each pair of a class and a bin of the score: what is counted is the pair of each noisy copy.

    Parameters
    ----------
    f : Module
        Base classifier in eval mode; (m, ...) to (m, k).
    score : callable
        See `Score`.
    edges : sequence of float, length t
        Ascending; bin i holds the scores in (edges[i - 1], edges[i]], bin t those beyond, and a last one those that are
        not finite or outside [0, 1].
    probabilities : bool
        True if f ends in a softmax.

    Notes
    -----
    Outputs are one-hot, and zero (which is no valid vote) where the class is not valid: so that summing the bins gives
    the very votes of f.
    """

    edges: Tensor

    def __init__(self, f: nn.Module, score: Score, edges: Sequence[float], *, probabilities: bool = False) -> None:
        super().__init__()
        self.f, self.score, self.probabilities = f, score, probabilities
        self.bins = len(edges) + 2
        self.register_buffer("edges", torch.tensor(list(edges), dtype=torch.float32), persistent=False)
        self.eval()

    def forward(self, noisy: Tensor) -> Tensor:
        """Outputs (m, k (t + 2)) of noisy inputs (m, ...), float32."""
        outputs: Tensor = self.f(noisy)
        winner, valid = strict_votes(outputs)
        score = self.score(log_probabilities(outputs, self.probabilities)).float()
        # the smallest edge that the score does not exceed
        place = torch.bucketize(score.contiguous(), self.edges.to(score.device))
        place = torch.where((score >= 0.0) & (score <= 1.0), place, self.bins - 1)
        cells = torch.zeros((len(outputs), outputs.shape[1] * self.bins), device=outputs.device)
        return cells.scatter_(1, (winner * self.bins + place)[:, None], valid.float()[:, None])


# ---------------------------------------------------------------------------------------------- the soft form

_SOFTNESS = 0.05
"""Width of the step ``score <= theta`` in the soft form of a vote."""

_SHARPNESS = 4.0
"""Slope of the soft decision ``p_s >= tau``, in log odds."""

_CERTAIN = 1e4
"""Log odds that stand for a selector that always answers the same."""


class _SoftVote(nn.Module):
    """Differentiable vote (m, 2) of a selector for the core and for certifying."""

    def __init__(self, f: nn.Module, selector: ScoreSelector, probabilities: bool) -> None:
        super().__init__()
        self.f, self.selector, self.probabilities = f, selector, probabilities

    def forward(self, noisy: Tensor) -> Tensor:
        score = self.selector.score(log_probabilities(self.f(noisy), self.probabilities))
        step = (self.selector.theta - score) / _SOFTNESS
        return torch.stack([(-step).sigmoid(), step.sigmoid()], dim=1)


class Gate(nn.Module):
    """Soft decision of a selector, in log odds: positive where it certifies.

    Parameters
    ----------
    selector : Selector
        The selector.
    smoothed : SmoothedModule
        Soft form of the smoothed classifier, whose sigma a selector without its own shares.
    f : Module
        Base classifier that a score is taken of.
    probabilities : bool
        True if f ends in a softmax.
    samples, seed, block
        Of the bank of draws; see `SmoothedModule`.
    """

    def __init__(
        self,
        selector: Selector,
        smoothed: SmoothedModule,
        f: nn.Module,
        *,
        probabilities: bool,
        samples: int,
        seed: int,
        block: int | None,
    ) -> None:
        super().__init__()
        self.selector = selector
        self.votes: SmoothedModule | None = None
        if isinstance(selector, ScoreSelector):
            sigma = smoothed.sigma if selector.sigma is None else selector.sigma
            vote = _SoftVote(f, selector, probabilities)
            self.votes = SmoothedModule(vote, sigma, samples=samples, seed=seed, probabilities=True, block=block)
            self.follows = smoothed if selector.sigma is None else self.votes

    def forward(self, x: Tensor, log_p: Tensor) -> Tensor:
        """Log odds (b,) at inputs x (b, ...), where log_p (b, k) are the smoothed classifier's log probabilities."""
        if isinstance(self.selector, FixedSelector):
            return torch.full((len(x),), _CERTAIN if self.selector.certify else -_CERTAIN, device=x.device)
        if self.votes is None:
            top = log_p.max(dim=1).values.clamp_max(-1e-7)
            odds = top - torch.log(-torch.expm1(top))
        else:
            self.votes.sigma = self.follows.sigma   # it may have been set to another value since
            odds = self.votes(x).diff(dim=1)[:, 0]
        tau = max(self.selector.tau, 1e-30)
        return _SHARPNESS * (odds - math.log(tau / (1.0 - tau)))


class ComposedModule(nn.Module):
    """A composition as a network: the soft form of the classifier that is certified, for attacks to aim at.

    Always in eval mode: it is not trained, its parts are.

    Parameters
    ----------
    stages : sequence of (Gate, Module)
        Soft selector and soft smoothed classifier of each stage, the latter with log probabilities (b, k).
    core : Module
        Network of raw inputs, (b, ...) to (b, k).
    core_probabilities : bool
        True if the core ends in a softmax.
    """

    def __init__(self, stages: Sequence[tuple[Gate, nn.Module]], core: nn.Module, *, core_probabilities: bool) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gate for gate, _ in stages)
        self.smoothed = nn.ModuleList(smoothed for _, smoothed in stages)
        self.core, self.core_probabilities = core, core_probabilities

    def train(self, mode: bool = True) -> ComposedModule:   # noqa: ARG002 - of nn.Module
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    @property
    def f(self) -> ComposedModule:
        """Itself: without its noise it would be another classifier."""
        return self

    @property
    def base(self) -> ComposedModule:
        """Itself, as its `f`."""
        return self

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log odds (b,) of the first selector, log probabilities (b, k) of its smoothed classifier and of the rest."""
        x = x.to(torch.float32)
        here = rest = log_probabilities(self.core(x), self.core_probabilities)
        odds = torch.zeros(len(x), device=x.device)
        for gate, smoothed in zip(reversed(self.gates), reversed(self.smoothed), strict=True):
            rest = mixed(odds, here, rest)   # of the core alone in the first round
            here = smoothed(x)
            odds = gate(x, here)
        return odds, here, rest

    def forward(self, x: Tensor) -> Tensor:
        """Log probabilities (b, k) of inputs (b, ...)."""
        return mixed(*self.parts(x))


def mixed(odds: Tensor, here: Tensor, rest: Tensor) -> Tensor:
    """Log of the mean of two probabilities (b, k) or (b,), given as logs, weighted by log odds (b,) for the first."""
    odds = odds.view(-1, *[1] * (here.ndim - 1))
    sigmoid = nn.functional.logsigmoid
    return torch.logaddexp(sigmoid(odds) + here, sigmoid(-odds) + rest)
