"""Who does the work of a run, this process or others: groups of inputs, and their rows in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier, share_votes
from art_rs_plugins.estimators.data_dependent import PyTorchDataDependentSmoothing
from art_rs_plugins.estimators.modes import Commit
from art_rs_plugins.smoothing.performance import Voters, measure_block
from art_rs_plugins.smoothing.sampling import evaluating
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.rules import Rule

__all__ = [
    "GROUP",
    "HERE",
    "Done",
    "Group",
    "Survey",
    "Task",
    "Together",
    "Workers",
    "device_name",
    "record_groups",
    "refuse_memory",
    "voting_stage",
]

GROUP = 16
"""Inputs between two writes of a record: what a crash can cost."""


class Workers(Protocol):
    """Does a task for each item: like ``map``, lazily, and in the order of the items."""

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        """Yield ``task(item)`` for each item."""
        ...


HERE: Workers = map
"""This process, one item after the other."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Inputs that are certified together: `indices` (b,), `x` (b, ...) and `labels` (b,)."""

    indices: NDArray[np.int64]
    x: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """Certificates of a group, one entry for each rule; labels (b,), seconds in all, and the device that voted."""

    certificates: list[Certificates]
    labels: NDArray[np.int64]
    seconds: float
    device: str


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is done with each group: a pure function of it, so that it may be done anywhere, and again.

    Attributes
    ----------
    estimator : PyTorchSmoothedClassifier
        What certifies.
    settings : dict
        Arguments of its `compare` where there are `rules`, of its `certificates` otherwise; but x and indices.
    rules : tuple of Rule
        Rules that share their draws.
    """

    estimator: PyTorchSmoothedClassifier
    settings: dict[str, Any]
    rules: tuple[Rule, ...] = ()

    def __call__(self, group: Group) -> Done:
        """Certify a group."""
        begun, settings = time.perf_counter(), {**self.settings, "indices": group.indices}
        if self.rules:
            found = self.estimator.compare(group.x, self.rules, **settings)
        else:
            found = [self.estimator.certificates(group.x, **settings)]
        return Done(found, group.labels, time.perf_counter() - begun, device_name(self.estimator))


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """Several tasks about each group, which share their votes where they can; see `share_votes`."""

    tasks: tuple[Task, ...]
    voters: Voters = field(default_factory=lambda: Voters(limit=64, keeping=True))

    def __call__(self, group: Group) -> Done:
        """Do all of them."""
        everyone = (task.estimator for task in self.tasks)
        able = [each for each in everyone if isinstance(each, PyTorchSmoothedClassifier) and each.performance.freezes]
        with share_votes(*able, voters=self.voters) if able else nullcontext():
            parts = [task(group) for task in self.tasks]
        certificates = [each for part in parts for each in part.certificates]
        return replace(parts[0], certificates=certificates, seconds=sum(part.seconds for part in parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, (self.tasks,)   # where it arrives, networks are made ready anew


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """Where a run votes: name of the device, and rows of a forward pass, measured where they are not known."""

    estimator: PyTorchSmoothedClassifier

    def __call__(self, block: int | None) -> tuple[str, int]:
        """Look at the device of this process."""
        voting = voting_stage(self.estimator)
        if block is None:
            with evaluating(voting.model):
                block = measure_block(voting.model.f, voting.input_shape, voting.device)
        return device_name(voting), block


def voting_stage(estimator: PyTorchSmoothedClassifier) -> PyTorchSmoothedClassifier:
    """What fills the forward passes: of a composition its first stage, else the estimator itself."""
    stage: Any = getattr(estimator, "smoothed", None)
    return stage if isinstance(stage, PyTorchSmoothedClassifier) else estimator


def refuse_memory(estimator: PyTorchSmoothedClassifier) -> None:
    """Raise ``ValueError`` for an estimator that must answer in one process and in order."""
    if isinstance(estimator, PyTorchDataDependentSmoothing) and isinstance(estimator.mode, Commit):
        raise ValueError(
            "mode 'commit' has one memory, and what it promises depends on all that it was asked before: certify in "
            "one process and in one piece, or choose another mode"
        )


def device_name(estimator: PyTorchSmoothedClassifier) -> str:
    """Name of the device that votes, as records have it."""
    device = estimator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def record_groups(
    task: Task | Together,
    groups: Iterable[Group],
    writers: Sequence[RecordWriter],
    *,
    total: int,
    workers: Workers = HERE,
    verbose: bool = False,
) -> None:
    """Certify groups and write their rows, in their order; what a record has already is not written again.

    Parameters
    ----------
    task : Task or Together
        What to do with each group.
    groups : iterable of Group
        Taken as workers come free.
    writers : sequence of RecordWriter
        One for each list entry of what the task returns.
    total : int
        Inputs of the whole run, those that are recorded already included.
    workers : Workers
        Who does it.
    verbose : bool
        Show a progress bar with time left, votes per second and abstentions.

    Raises
    ------
    ValueError
        If a worker votes on another device than the record was begun with.
    """
    with _Progress(total, min(len(writer.done) for writer in writers), verbose) as progress:
        for done in workers(task, groups):
            for writer, certificates in zip(writers, done.certificates, strict=True):
                if done.device != writer.device:
                    raise ValueError(
                        f"a worker votes on {done.device}, but {writer.path} was begun on {writer.device}; take "
                        "workers of that kind, or another output path"
                    )
                new = np.array([int(index) not in writer.done for index in certificates.index])
                writer.append(certificates[new], done.labels[new], done.seconds / len(new))
            progress.add(done)


@dataclass(slots=True)
class _Progress:
    """Progress bar over the inputs of a run."""

    total: int
    recorded: int
    verbose: bool
    votes: int = 0
    abstained: int = 0
    begun: float = field(default_factory=time.perf_counter)
    bar: Any = None

    def __enter__(self) -> _Progress:
        self.bar = tqdm(total=self.total, initial=self.recorded, desc="certify", disable=not self.verbose)
        return self

    def add(self, done: Done) -> None:
        """Count a group."""
        self.votes += int(np.max([certificates.passes for certificates in done.certificates], axis=0).sum())
        self.abstained += int(done.certificates[0].abstained.sum())
        self.bar.update(len(done.labels))
        speed = self.votes / (time.perf_counter() - self.begun)
        self.bar.set_postfix_str(f"{speed:,.0f} votes/s, {self.abstained} abstained")

    def __exit__(self, *_: object) -> None:
        self.bar.close()
