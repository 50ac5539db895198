"""The main job on embedded data: train, certify and attack a small network on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from art_rs_plugins.benchmark.attacked import attack
from art_rs_plugins.benchmark.config import AttackConfig, RunConfig, TrainConfig
from art_rs_plugins.benchmark.models import read_training
from art_rs_plugins.benchmark.nearest import Nearest
from art_rs_plugins.benchmark.records import Record, read_record
from art_rs_plugins.benchmark.runs import certify
from art_rs_plugins.benchmark.training import header, train
from art_rs_plugins.theory.audit import Audit

__all__ = ["Demo", "demo", "one_thread"]


@dataclass(frozen=True, slots=True)
class Demo:
    """What `demo` did at one sigma: its record, its audits by attack, and adversarial examples."""

    sigma: float
    record: Record
    audits: dict[str, Audit]
    nearest: Nearest | None


def demo(folder: Path, *, sigmas: Sequence[float] = (0.25, 0.5), verbose: bool = False) -> list[Demo]:
    """Train, certify and attack a small network on scikit-learn's digits, at each sigma.

    Parameters
    ----------
    folder : Path
        Weights, records, manifests and audits go here; a run that was stopped goes on.
    sigmas : sequence of float
        Noise levels.
    verbose : bool
        Show progress bars.
    """
    results = []
    with one_thread():
        for sigma in sigmas:
            weights, record = folder / f"digits_sigma{sigma:g}.safetensors", folder / f"digits_sigma{sigma:g}.tsv"
            config = TrainConfig(sigma=sigma)
            if not weights.exists():
                train(config, weights, verbose=verbose)
            elif read_training(weights) != header(config):
                raise ValueError(f"{weights} was trained otherwise than the demo trains; choose another output folder")
            certify(RunConfig(weights=str(weights), sigma=sigma), record, verbose=verbose)
            done = attack(record, [AttackConfig()], verbose=verbose)
            if done.failed:
                raise ValueError("; ".join(done.failed.values()))
            results.append(Demo(sigma, read_record(record), done.audits, done.nearest))
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for networks so small that several would wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
