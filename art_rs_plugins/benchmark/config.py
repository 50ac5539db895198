"""Configurations of training and of certification: frozen, checked, and written into every manifest."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.noise import Gaussian, check_seed
from art_rs_plugins.smoothing.performance import Performance
from art_rs_plugins.smoothing.sampling import check_count
from art_rs_plugins.theory.bounds import check_alpha
from art_rs_plugins.theory.radii import check_sigma
from art_rs_plugins.theory.rules import OneSided, Planned, Rule, Sequential
from art_rs_plugins.theory.two_sided import SequentialTwoSided, TwoSided

__all__ = [
    "NOISES",
    "RULES",
    "AttackConfig",
    "RunConfig",
    "TrainConfig",
    "check_budgets",
    "check_device",
    "check_learning_rate",
    "check_name",
    "parse_examples",
    "parse_options",
]

NOISES: dict[str, type[Gaussian] | type[GridGaussian]] = {"gaussian": Gaussian, "grid": GridGaussian}
"""Noise families by name."""

RULES: dict[str, tuple[type[OneSided] | type[TwoSided], type[Sequential]]] = {
    "one-sided": (OneSided, Sequential),
    "two-sided": (TwoSided, SequentialTwoSided),
}
"""Rules by name: for the whole radius, and for named radii."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run; see `train`. Where a number is None, the method's own default holds."""

    data: str = "digits"
    model: str = "cnn"
    sigma: float = 0.25
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    device: str = "gpu"
    method: str = "gaussian"
    weight: float | None = None
    draws: int | None = None
    eps: float = 0.0
    steps: int = 2
    warmup: int = 0
    weights: str | None = None
    examples: str = "::1"
    defences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "defences", tuple(self.defences))
        check_sigma(self.sigma), check_seed(self.seed), check_device(self.device)
        for name in ("epochs", "batch_size", "steps"):
            check_count(getattr(self, name), name)
        check_count(self.warmup, "warmup", least=0)
        parse_examples(self.examples, 1)
        check_learning_rate(self.learning_rate)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One certification run; see `certify`. Every field changes the result, and all are in the manifest."""

    data: str = "digits"
    model: str = "cnn"
    weights: str | None = None
    sigma: float = 0.25
    n: int = 10_000
    n0: int = 100
    alpha: float = 0.001
    examples: str = "::1"
    seed: int = 0
    device: str = "gpu"
    radii: tuple[float, ...] | None = None
    tolerance: float | None = None
    noise: Literal["gaussian", "grid"] = "gaussian"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    block: int | None = None
    rule: str | None = None
    method: str = "smoothing"
    options: Mapping[str, Any] = field(default_factory=dict)
    defences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "defences", tuple(self.defences))
        check_sigma(self.sigma), check_alpha(self.alpha), check_seed(self.seed), check_device(self.device)
        check_count(self.n, "n"), check_count(self.n0, "n0")
        parse_examples(self.examples, 1)
        if self.radii is not None:
            object.__setattr__(self, "radii", Sequential(tuple(self.radii)).radii)
        if self.tolerance is not None:
            Planned(self.tolerance)
        if self.radii is not None and self.tolerance is not None:
            raise ValueError("radii and tolerance each say how to decide; give one of them")
        check_name(self.noise, NOISES, "noise")
        if self.rule is not None:
            check_name(self.rule, RULES, "rule")
        if self.rule is not None and self.tolerance is not None:
            raise ValueError("rule and tolerance each say how to decide; give one of them")
        self.performance(None)

    def performance(self, block: int | None) -> Performance:
        """How the network votes, with `block` rows where none were asked for."""
        return Performance(self.dtype, self.channels_last, self.compile, block if self.block is None else self.block)

    def decide(self) -> Rule | None:
        """The rule that was named; None where the method has one of its own, or a tolerance says it."""
        if self.rule is None:
            return None
        whole, named = RULES[self.rule]
        return whole(self.alpha) if self.radii is None else named(self.radii, self.alpha)


@dataclass(frozen=True, slots=True)
class AttackConfig:
    """Attacks on one record with the same settings; see `attack`. Every field changes the result."""

    names: tuple[str, ...] = ("pgd", "smoothed-pgd")
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    steps: int = 20
    n: int = 200
    attacked: str = "::1"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("names", "budgets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_seed(self.seed), check_count(self.n, "n"), check_count(self.steps, "steps")
        parse_examples(self.attacked, 1)
        check_budgets(self.budgets)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be different attacks, and at least one, got {list(self.names)}")


def check_learning_rate(value: float) -> float:
    """Return a learning rate that is finite and > 0; ``ValueError`` for another."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"learning_rate must be finite and > 0, got {value}")
    return value


def check_budgets(budgets: Sequence[float]) -> NDArray[np.float64]:
    """Return budgets (e,), ascending and > 0; ``ValueError`` for others."""
    grid = np.asarray(budgets, dtype=np.float64)
    if grid.ndim != 1 or not len(grid) or np.any(~np.isfinite(grid) | (grid <= 0)) or np.any(np.diff(grid) <= 0):
        raise ValueError(f"budgets must be ascending and > 0, in the units of the input, got {list(budgets)}")
    return grid


def check_name(value: str, known: Iterable[str], what: str) -> str:
    """Return a name that is known, or raise ``ValueError`` that lists those that are and offers the nearest."""
    names = list(known)
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(names)}, got {value!r}{hint}")
    return value


def check_device(device: str) -> str:
    """Return ART's name of a device, or say which there are."""
    if device not in ("gpu", "cpu"):
        raise ValueError(f"device must be 'gpu' (falls back to the CPU without CUDA) or 'cpu', got {device!r}")
    return device


def parse_examples(examples: str, total: int) -> NDArray[np.int64]:
    """Indices of ``start:stop:step`` among `total` examples, such as ``"::20"``."""
    parts = examples.split(":")
    try:
        bounds = [int(part) if part else None for part in parts]
        if len(bounds) not in (2, 3):
            raise ValueError
        return np.arange(total)[slice(*bounds)]
    except ValueError:
        raise ValueError(f"examples must be start:stop:step, such as '::20' or ':500', got {examples!r}") from None


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Options out of ``name=value``, where a value is a TOML value, or else text."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"option must be name=value, such as weight=0.1, got {word!r}")
        try:
            options[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[name] = value
    return options
