"""A suite of cells on one data set: each trains a network or takes one, certifies it, and lands in one table."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from art_rs_plugins.benchmark.attacked import KNOWN, Attacked, attack
from art_rs_plugins.benchmark.audits import AUDITED
from art_rs_plugins.benchmark.choosers import ChooserConfig, train_chooser
from art_rs_plugins.benchmark.config import RULES, AttackConfig, RunConfig, TrainConfig, check_name
from art_rs_plugins.benchmark.defences import check_defences
from art_rs_plugins.benchmark.files import write_atomic
from art_rs_plugins.benchmark.memory import write_study
from art_rs_plugins.benchmark.methods import REDUCTIONS
from art_rs_plugins.benchmark.models import read_training
from art_rs_plugins.benchmark.paired import paired
from art_rs_plugins.benchmark.records import Record
from art_rs_plugins.benchmark.report import write_leaderboard, write_report
from art_rs_plugins.benchmark.runs import certify_together, shared_part
from art_rs_plugins.benchmark.thresholds import RADII, Tuning, tune
from art_rs_plugins.benchmark.training import header, train
from art_rs_plugins.theory.audit import Audit

__all__ = ["Cell", "Done", "Suite", "names", "read", "run", "text"]

_HOME = resources.files("art_rs_plugins.benchmark") / "suites"

_EXPECTED = (ValueError, TypeError, OSError, ImportError)
"""What is wrong with one cell, and no reason to give the others up."""


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
    attacks : tuple of AttackConfig
        What its certificates are attacked with, at the same budgets; some attacks may take fewer inputs than others.
        What is not certified or exact is not attacked.
    tuning : Tuning or None
        How the theta of a composition is chosen first.
    chooser : ChooserConfig or None
        How the selector of Insta-RS is trained first.
    """

    name: str
    run: RunConfig
    rules: tuple[str, ...] = ()
    training: TrainConfig | None = None
    reductions: tuple[str, ...] = ()
    attacks: tuple[AttackConfig, ...] = ()
    tuning: Tuning | None = None
    chooser: ChooserConfig | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name):
            raise ValueError(f"name of a cell must be letters, digits, '-', '_' and '.', got {self.name!r}")
        for rule in self.rules:
            check_name(rule, RULES, f"rule of cell {self.name}")
        check_defences(self.run.defences, training=False)
        check_defences(() if self.training is None else self.training.defences, training=True)
        for group in self.attacks:
            for name in group.names:
                check_name(name, KNOWN, f"attack of cell {self.name}")
        for reduction in self.reductions:
            check_name(reduction, REDUCTIONS, f"reduction of cell {self.name}")
        if self.reductions and not self.rules:
            raise ValueError(f"reductions of cell {self.name} share their passes under named rules; name rules as well")
        if self.chooser is not None and self.run.options.get("certificate") != "selector":
            raise ValueError(f"selector of cell {self.name} needs method 'insta-rs' and its certificate 'selector'")
        if self.tuning is not None and self.run.method != "aces":
            raise ValueError(f"tune of cell {self.name} needs method 'aces', got {self.run.method!r}")


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
    """What a suite came to.

    Attributes
    ----------
    table : str
        Leaderboard, in Markdown.
    records : list of Record
        Of every cell, under each of its rules.
    audits : list of dict of Audit, or None
        For each record its audits by attack, with ``"all"`` for the worst of them.
    failed : dict of str
        Cells, and attacks on a record, that failed, with the reason in a sentence.
    """

    table: str
    records: list[Record]
    audits: list[dict[str, Audit] | None]
    failed: dict[str, str]


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

    The tables ``[run]``, ``[train]`` and ``[attack]`` hold what the cells share, each ``[[cell]]`` its ``name``,
    ``rules``, and what it changes: ``run = {...}`` and ``train = {...}``. A cell without ``train`` takes weights as
    they are. Each of ``[[attacks]]`` names attacks, and what they change of ``[attack]``; a cell's own
    ``attacks = [...]`` stand for those, none for ``[]``. Variables of the environment in ``weights`` are filled in.

    Raises
    ------
    ValueError, TypeError
        For TOML that cannot be read, and for unknown or unfit settings; the nearest name is offered.
    """
    try:
        values = tomllib.loads(text(suite))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"suite {suite} is not TOML: {error}") from error
    _check_names(values, ("run", "train", "attack", "attacks", "cell"), "suite")
    cells = []
    for cell in values.get("cell", ()):
        _check_names(cell, ("name", "rules", "reductions", "run", "train", "attacks", "tune", "selector"), "cell")
        own = _settings(RunConfig, values.get("run", {}), cell.get("run", {}))
        training = None
        if "train" in cell:
            shared = {name: own[name] for name in own if name in ("data", "model", "sigma", "seed", "device")}
            training = TrainConfig(**_settings(TrainConfig, shared, values.get("train", {}), cell["train"]))
        named: dict[str, Any] = {name: tuple(cell.get(name, ())) for name in ("rules", "reductions")}
        groups = cell.get("attacks", values.get("attacks", ()))
        attacks = tuple(AttackConfig(**_settings(AttackConfig, values.get("attack", {}), group)) for group in groups)
        before: dict[str, Any] = {
            field: family(**_settings(family, cell[name]))
            for name, field, family in (("tune", "tuning", Tuning), ("selector", "chooser", ChooserConfig))
            if name in cell
        }
        cells.append(
            Cell(cell.get("name", ""), RunConfig(**own), training=training, attacks=attacks, **named, **before)
        )
    return Suite(tuple(cells))


def _settings(family: type[Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    known = tuple(f.name for f in fields(family))
    for part in parts:
        _check_names(part, known, family.__name__)
    merged = {name: value for part in parts for name, value in part.items()}
    return {name: _expanded(value) if name in ("weights", "options") else value for name, value in merged.items()}


def _expanded(value: Any) -> Any:
    """Settings with the variables of the environment filled in."""
    if isinstance(value, dict):
        return {name: _expanded(part) for name, part in value.items()}
    return os.path.expandvars(value) if isinstance(value, str) else value


def _check_names(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in values:
        check_name(name, known, f"setting of a {what}")


def run(suite: Suite, output: Path, *, verbose: bool = False) -> Done:
    """Train, certify and attack every cell, going on where an earlier run stopped; write records, table and report.

    Parameters
    ----------
    suite : Suite
        What to run.
    output : Path
        Folder: ``<cell>.safetensors``, ``<cell>.<rule>.tsv`` with their attacks beside them, ``leaderboard.md``,
        ``.csv``, ``.tex``, ``paired.md`` (differences from the first record), ``report.html``.
    verbose : bool
        Show progress bars.

    Returns
    -------
    Done
        A cell or an attack that fails does not stop the others.

    Raises
    ------
    ValueError
        If no cell could be run.
    """
    records: list[Record] = []
    found: list[Attacked | None] = []
    failed: dict[str, str] = {}
    for cells in _voting_together(suite.cells):
        made = _certified(cells, output, verbose, failed)
        for cell in cells:
            for record in made.get(cell.name, ()):
                records.append(record)
                try:
                    found.append(_attacked(cell, record, verbose))
                except _EXPECTED as error:
                    failed[cell.name] = str(error)
                    found.append(None)
    if not records:
        raise ValueError("no cell could be run: " + "; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    for record, done in zip(records, found, strict=True):
        failed |= {f"{record.name}, {name}": why for name, why in ({} if done is None else done.failed).items()}
    audits = [None if done is None or not done.audits else done.audits for done in found]
    nearest = [None if done is None else done.nearest for done in found]
    table = write_leaderboard(records, output / "leaderboard", audits=audits)
    radii = next((cell.run.radii for cell in suite.cells if cell.run.radii is not None), RADII)
    differences = paired(records, radii)
    if differences is not None:
        title = f"Against {records[0].name}, input by input (standard errors)"
        write_atomic(output / "paired.md", f"{title}:\n\n{differences}".encode())
    extras = [(path.name.removesuffix(".md"), _beside(path)) for path in sorted(output.glob("*.md"))
              if path.name != "leaderboard.md"]   # fmt: skip
    notes = [f"FAILED {name}: {why}" for name, why in failed.items()]
    page = output / "report.html"
    write_report(records, "html", page, audits=audits, nearest=nearest, extras=extras, notes=notes)
    if failed:
        write_atomic(output / "failed.txt", "".join(f"{name}: {why}\n" for name, why in failed.items()).encode())
    else:
        (output / "failed.txt").unlink(missing_ok=True)
    return Done(table, records, audits, failed)


def _beside(path: Path) -> str:
    """Text of a study, and its drawing where there is one."""
    drawing = path.with_suffix(".svg")
    return path.read_text() + ("\n" + drawing.read_text() if drawing.exists() else "")


def _attacked(cell: Cell, record: Record, verbose: bool) -> Attacked | None:
    """What the attacks of a cell came to on one of its records, if there is anything to attack."""
    if not cell.attacks or record.kind not in AUDITED:
        return None
    return attack(record.path, cell.attacks, verbose=verbose)


def _voting_together(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells in groups that share their votes: neighbours that ask one network, with weights that are there already."""
    groups: list[list[Cell]] = []
    for cell in cells:
        if groups and _asks_network(cell) and _asks_network(groups[-1][0]) and (
            shared_part(groups[-1][0].run) == shared_part(cell.run)
        ):   # fmt: skip
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def _asks_network(cell: Cell) -> bool:
    """Whether the votes of a cell are those of its network, given beforehand; a memory asks in its own order."""
    given = cell.training is None and cell.tuning is None and not _remembers(cell)
    return given and cell.run.method in ("smoothing", "insta-rs", "data-dependent")


def _remembers(cell: Cell) -> bool:
    return cell.run.method == "data-dependent" and cell.run.options.get("mode", "commit") == "commit"


def _certified(cells: Sequence[Cell], output: Path, verbose: bool, failed: dict[str, str]) -> dict[str, list[Record]]:
    """Records of cells that share their votes, by name; where one fails, the others are certified without it."""
    prepared: list[tuple[Cell, dict[str, RunConfig]]] = []
    for cell in cells:
        try:
            prepared.append((cell, _prepared(cell, output, verbose)))
        except _EXPECTED as error:
            failed[cell.name] = str(error)
    return _voted(prepared, output, verbose, failed) if prepared else {}


def _voted(
    prepared: Sequence[tuple[Cell, dict[str, RunConfig]]], output: Path, verbose: bool, failed: dict[str, str]
) -> dict[str, list[Record]]:
    """Records of cells that are prepared; one by one where they cannot be certified together."""
    families = [{output / f"{name}.tsv": config for name, config in each.items()} for _, each in prepared]
    try:
        made = dict(zip((cell.name for cell, _ in prepared), certify_together(families, verbose=verbose), strict=True))
        for cell, each in prepared:
            study = output / f"{cell.name}.attacker-first.md"
            if _remembers(cell) and not study.exists():
                write_study(replace(next(iter(each.values())), rule=cell.run.rule), study)
    except _EXPECTED as error:
        if len(prepared) == 1:
            failed[prepared[0][0].name] = str(error)
            return {}
        parts = [_voted([each], output, verbose, failed) for each in prepared]
        return {name: each for part in parts for name, each in part.items()}
    return made


def _prepared(cell: Cell, output: Path, verbose: bool) -> dict[str, RunConfig]:
    """Configurations of a cell by the names of their records, once what they need is trained or chosen."""
    config = cell.run
    if cell.training is not None:
        weights = output / f"{cell.name}.safetensors"
        if not weights.exists():
            train(cell.training, weights, verbose=verbose)
        elif read_training(weights) != header(cell.training):
            raise ValueError(f"{weights} was trained otherwise than this suite trains; choose another output folder")
        config = replace(config, weights=str(weights))
    if cell.chooser is not None:
        config = train_chooser(config, cell.chooser, output / f"{cell.name}.selector.safetensors")
    if cell.tuning is not None:
        theta = tune(config, cell.tuning, output / cell.name, verbose=verbose)
        config = replace(config, options={**config.options, "theta": theta})
    reduced = {
        f"{cell.name}.{name}": replace(config, options={**config.options, "reduction": name})
        for name in cell.reductions
    } or {cell.name: config}
    return {
        f"{name}.{rule}": replace(each, rule=rule) for name, each in reduced.items() for rule in cell.rules
    } or reduced
