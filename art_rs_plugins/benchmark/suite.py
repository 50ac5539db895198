"""A suite of cells on one data set: each trains a network or takes one, certifies it, and lands in one table."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from art_rs_plugins.benchmark.config import RULES, RunConfig, TrainConfig, check_name
from art_rs_plugins.benchmark.files import write_atomic
from art_rs_plugins.benchmark.memory import write_study
from art_rs_plugins.benchmark.methods import REDUCTIONS
from art_rs_plugins.benchmark.models import read_training
from art_rs_plugins.benchmark.records import Record
from art_rs_plugins.benchmark.report import write_leaderboard, write_report
from art_rs_plugins.benchmark.runs import certify_rules
from art_rs_plugins.benchmark.training import header, train

__all__ = ["Cell", "Done", "Suite", "names", "read", "run", "text"]

_HOME = resources.files("art_rs_plugins.benchmark") / "suites"


@dataclass(frozen=True, slots=True)
class Cell:
    """One network under one method: certified by every rule, with the same draws.

    Attributes
    ----------
    name : str
        Of its files and of its rows in the table.
    run : RunConfig
        How it is certified; its weights are those of `training` where there is one.
    rules : tuple of str
        Rules by name; none for the method's own.
    training : TrainConfig or None
        How it is trained first.
    reductions : tuple of str
        Reductions of patches by name, which share their passes; with rules.
    """

    name: str
    run: RunConfig
    rules: tuple[str, ...] = ()
    training: TrainConfig | None = None
    reductions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name):
            raise ValueError(f"name of a cell must be letters, digits, '-', '_' and '.', got {self.name!r}")
        for rule in self.rules:
            check_name(rule, RULES, f"rule of cell {self.name}")
        for reduction in self.reductions:
            check_name(reduction, REDUCTIONS, f"reduction of cell {self.name}")
        if self.reductions and not self.rules:
            raise ValueError(f"reductions of cell {self.name} share their passes under named rules; name rules as well")


@dataclass(frozen=True, slots=True)
class Suite:
    """Cells that are compared: the same data, inputs and seed; read from TOML by `read`."""

    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        titles = [cell.name for cell in self.cells]
        if not titles or len(set(titles)) < len(titles):
            raise ValueError(f"cells must have different names, and be at least one; got {titles}")
        for name in ("data", "examples", "seed"):
            values = {getattr(cell.run, name) for cell in self.cells}
            if len(values) > 1:
                raise ValueError(f"cells must share {name} to be compared, got {sorted(map(str, values))}")


@dataclass(frozen=True, slots=True)
class Done:
    """What a suite came to: its table in Markdown, its records, and the cells that failed, with the reason."""

    table: str
    records: list[Record]
    failed: dict[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """Suites that come with the package."""
    return sorted(item.name.removesuffix(".toml") for item in _HOME.iterdir() if item.name.endswith(".toml"))


def text(suite: str) -> str:
    """TOML of a suite, by its name or its path."""
    if suite in names():
        return (_HOME / f"{suite}.toml").read_text()
    path = Path(suite)
    if not path.is_file():
        check_name(suite, names(), "suite must be the path of a TOML file, or")
    return path.read_text()


def read(suite: str) -> Suite:
    """Suite of this name or path.

    The tables ``[run]`` and ``[train]`` hold what the cells share, each ``[[cell]]`` its ``name``, ``rules``, and what
    it changes: ``run = {...}`` and ``train = {...}``. A cell without ``train`` takes weights as they are. Variables of
    the environment in ``weights`` are filled in.

    Raises
    ------
    ValueError, TypeError
        For TOML that cannot be read, and for unknown or unfit settings; the nearest name is offered.
    """
    try:
        values = tomllib.loads(text(suite))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"suite {suite} is not TOML: {error}") from error
    _check_names(values, ("run", "train", "cell"), "suite")
    cells = []
    for cell in values.get("cell", ()):
        _check_names(cell, ("name", "rules", "reductions", "run", "train"), "cell")
        own = _settings(RunConfig, values.get("run", {}), cell.get("run", {}))
        training = None
        if "train" in cell:
            shared = {name: own[name] for name in own if name in ("data", "model", "sigma", "seed", "device")}
            training = TrainConfig(**_settings(TrainConfig, shared, values.get("train", {}), cell["train"]))
        named = {name: tuple(cell.get(name, ())) for name in ("rules", "reductions")}
        cells.append(Cell(cell.get("name", ""), RunConfig(**own), training=training, **named))
    return Suite(tuple(cells))


def _settings(family: type[RunConfig] | type[TrainConfig], *parts: Mapping[str, Any]) -> dict[str, Any]:
    known = tuple(f.name for f in fields(family))
    for part in parts:
        _check_names(part, known, family.__name__)
    merged = {name: value for part in parts for name, value in part.items()}
    return {name: os.path.expandvars(value) if name == "weights" else value for name, value in merged.items()}


def _check_names(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in values:
        check_name(name, known, f"setting of a {what}")


def run(suite: Suite, output: Path, *, verbose: bool = False) -> Done:
    """Run every cell, going on where an earlier run stopped, and write records, leaderboard and report.

    Parameters
    ----------
    suite : Suite
        What to run.
    output : Path
        Folder: ``<cell>.safetensors``, ``<cell>.<rule>.tsv``, ``leaderboard.md``, ``.csv``, ``.tex``, ``report.html``.
    verbose : bool
        Show progress bars.

    Returns
    -------
    Done
        A cell that fails does not stop the others.

    Raises
    ------
    ValueError
        If no cell could be run.
    """
    records: list[Record] = []
    failed: dict[str, str] = {}
    for cell in suite.cells:
        try:
            records += _run_cell(cell, output, verbose)
        except (ValueError, TypeError, OSError, ImportError) as error:
            failed[cell.name] = str(error)
    if not records:
        raise ValueError("no cell could be run: " + "; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    table = write_leaderboard(records, output / "leaderboard")
    write_report(records, "html", output / "report.html")
    if failed:
        write_atomic(output / "failed.txt", "".join(f"{name}: {why}\n" for name, why in failed.items()).encode())
    return Done(table, records, failed)


def _run_cell(cell: Cell, output: Path, verbose: bool) -> list[Record]:
    config = cell.run
    if cell.training is not None:
        weights = output / f"{cell.name}.safetensors"
        if not weights.exists():
            train(cell.training, weights, verbose=verbose)
        elif read_training(weights) != header(cell.training):
            raise ValueError(f"{weights} was trained otherwise than this suite trains; choose another output folder")
        config = replace(config, weights=str(weights))
    reduced = {
        f"{cell.name}.{name}": replace(config, options={**config.options, "reduction": name})
        for name in cell.reductions
    } or {cell.name: config}
    named = {
        f"{name}.{rule}": replace(each, rule=rule) for name, each in reduced.items() for rule in cell.rules
    } or reduced
    configs, outputs = list(named.values()), [output / f"{name}.tsv" for name in named]
    records = certify_rules(configs, outputs, verbose=verbose)
    study = output / f"{cell.name}.attacker-first.md"
    if config.method == "data-dependent" and config.options.get("mode", "commit") == "commit" and not study.exists():
        write_study(config, study)
    return records
