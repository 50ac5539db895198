"""Attacks on records, alone and in suites: joined with certificates, kept on disk, and never in one another's way."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Page
from torch import nn

from art_rs_plugins.benchmark import attacked as module
from art_rs_plugins.benchmark import suite as suites
from art_rs_plugins.benchmark.attacked import attack
from art_rs_plugins.benchmark.audits import load_audits
from art_rs_plugins.benchmark.config import AttackConfig, RunConfig, TrainConfig
from art_rs_plugins.benchmark.evasion import find_examples
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.benchmark.nearest import Nearest, load_nearest, nearest_of, save_nearest
from art_rs_plugins.benchmark.records import read_record, to_certificates
from art_rs_plugins.benchmark.runs import certify
from art_rs_plugins.benchmark.training import train
from art_rs_plugins.cli import main

SUITE = """
[run]
data = "digits"
n = 500
examples = "::30"
[train]
epochs = 10
[attack]
budgets = [0.5, 1.5]
steps = 4
[[attacks]]
names = ["fgm", "pgd"]
[[attacks]]
names = ["smoothed-pgd"]
attacked = ":5"
[[cell]]
name = "plain"
train = {}
[[cell]]
name = "conditional"
train = {}
run = { method = "insta-rs", options = { certificate = "conditional", starts = [0.25], draws = 10, evaluations = 2 } }
[[cell]]
name = "own"
train = {}
attacks = [{ names = ["fgm"], attacked = ":3" }]
"""

Finished = tuple[suites.Suite, suites.Done, Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    path = tmp_path_factory.mktemp("attacked") / "suite.toml"
    path.write_text(SUITE)
    suite = suites.read(str(path))
    return suite, suites.run(suite, path.parent / "out"), path.parent / "out"


def test_attacks_join_every_certified_record(finished: Finished) -> None:
    _, done, folder = finished
    assert not done.failed
    plain, conditional, own = done.audits
    assert {name: found.total for name, found in plain.items()} == {"fgm": 12, "pgd": 12, "smoothed-pgd": 5, "all": 12}
    assert conditional is None
    assert {name: found.total for name, found in own.items()} == {"fgm": 3, "all": 3}
    for found in (plain, own):
        assert all(not audit.contradictions for audit in found.values())
        worst = np.max([audit.wrong for audit in found.values() if audit.total == found["all"].total], axis=0)
        assert np.all(found["all"].wrong >= worst)
        assert found["all"].wrong[-1] > 0
    (loaded,), _ = load_audits([done.records[0]])
    assert loaded.keys() == plain.keys()
    assert np.array_equal(loaded["all"].wrong, plain["all"].wrong)
    assert "smoothed-pgd" in (folder / "leaderboard.md").read_text()


def test_the_nearest_examples_are_wrong_and_outside_every_certified_ball(finished: Finished) -> None:
    record = finished[1].records[0]
    (near,) = load_nearest([record])
    moved = (near.adversarial - near.original).reshape(len(near), -1).astype(np.float64)
    assert np.allclose(np.linalg.norm(moved, axis=1), near.distance)
    data, estimator = open_estimator(RunConfig(**record.manifest["config"]))
    assert np.array_equal(near.original, data.x_test[near.index])
    again = estimator.predictions(near.adversarial, n=2_000, seed=9)
    assert np.mean(~again.abstained & (again.prediction != data.y_test[near.index])) > 0.8   # some lie at the boundary
    assert not np.any(~again.abstained & (again.prediction == data.y_test[near.index]))
    certificates = to_certificates(record)
    row = {index: row for row, index in enumerate(record.idx.tolist())}
    radius = np.array([certificates.radius[row[index]] for index in near.index.tolist()])
    right = np.array([record.correct[row[index]] for index in near.index.tolist()])
    assert right.sum() > 3
    assert np.all(near.distance[right] >= radius[right])


def test_attacks_are_taken_from_disk_while_they_are_of_the_same_record(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, done, folder = finished
    ran: list[str] = []

    def remember(kind, *args, **settings):
        ran.append(kind.name)
        return find_examples(kind, *args, **settings)

    monkeypatch.setattr(module, "find_examples", remember)
    again = suites.run(suite, folder)
    assert ran == []
    assert again.audits[0].keys() == done.audits[0].keys()
    assert all(np.array_equal(again.audits[0][name].wrong, done.audits[0][name].wrong) for name in again.audits[0])
    (folder / "plain.pgd.attack.npz").unlink()
    (folder / "plain.smoothed-pgd.attack.npz").write_bytes(b"torn")
    before = (folder / "plain.fgm.attack.npz").read_bytes()
    again = suites.run(suite, folder)
    assert ran == ["pgd", "smoothed-pgd"]
    assert np.array_equal(again.audits[0]["all"].wrong, done.audits[0]["all"].wrong)
    assert (folder / "plain.fgm.attack.npz").read_bytes() == before
    ran.clear()
    group = suite.cells[0].attacks[0]
    attack(folder / "plain.tsv", [replace(group, names=("fgm",), n=300), replace(group, names=("pgd",))])
    assert ran == ["fgm"]
    ran.clear()
    record = folder / "plain.tsv"
    whole = record.read_text()
    record.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    attack(record, [group])
    record.write_text(whole)
    assert ran == ["fgm", "pgd"]
    assert load_nearest([read_record(record)]) == [None]   # of other rows


class Detached(nn.Module):
    """A network that hides its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.detach().flatten(1)).detach()


def test_an_attack_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "suite.toml"
    text = SUITE[: SUITE.index("[[cell]]")].replace("[train]\nepochs = 10\n", "")
    text = text.replace('"fgm", "pgd"', '"pgd", "hopskipjump"').replace("smoothed-pgd", "square")
    path.write_text(text.replace("n = 500", 'n = 200\nmodel = "test_attacked:Detached"') + '[[cell]]\nname = "dark"\n')
    monkeypatch.setattr(sys, "argv", ["art-rs", "benchmark", str(path), "--output", str(tmp_path / "out"), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert err.count("FAILED") == 1
    assert "FAILED dark, pgd: could not run: " in err
    assert "grad" in err
    found = load_audits([read_record(tmp_path / "out" / "dark.tsv")])[0][0]
    assert set(found) == {"hopskipjump", "square", "all"}
    assert "pgd" in (tmp_path / "out" / "failed.txt").read_text()
    assert "FAILED dark, pgd" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (('"fgm", "pgd"', '"fgm", "pdg"'), "attack of cell plain must be one of .* got 'pdg'; did you mean 'pgd'"),
        (("steps = 4", "step = 4"), "setting of a AttackConfig must be .* did you mean 'steps'"),
        (("[0.5, 1.5]", "[1.5, 0.5]"), "budgets must be ascending"),
        (('"fgm", "pgd"', '"fgm", "fgm"'), "names must be different attacks"),
        (("train = {}", 'train = { defences = ["jepg"] }'), "defence must be one of .* did you mean 'jpeg'"),
        (("train = {}", 'train = {}\nrun = { defences = ["reverse-sigmoid"] }'), "voids the certificate"),
    ],
)
def test_bad_attacks_and_defences_are_named(tmp_path: Path, changes: tuple[str, str], words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(SUITE.replace(*changes, 1))
    with pytest.raises(ValueError, match=words):
        suites.read(str(path))


def test_groups_of_attacks_share_budgets_and_name_each_once(finished: Finished) -> None:
    for groups in (
        [AttackConfig(("fgm",), (0.5,)), AttackConfig(("pgd",), (0.7,))],
        [AttackConfig(("fgm",), (0.5,)), AttackConfig(("fgm",), (0.5,), steps=3)],
        [],
    ):
        with pytest.raises(ValueError, match="groups must name each attack once, at the same budgets"):
            attack(finished[1].records[0].path, groups)


def test_a_planted_false_certificate_is_caught_and_shown(tmp_path: Path, monkeypatch, capsys) -> None:
    """Radii one and a half times too large, written into the record of an honest run."""
    train(TrainConfig(epochs=15), tmp_path / "w.safetensors")
    record = tmp_path / "planted.tsv"
    certify(RunConfig(weights=str(tmp_path / "w.safetensors"), n=100_000, examples="::30"), record)
    groups = [AttackConfig(("pgd", "smoothed-pgd"), (0.5, 0.75, 1.0, 1.25), steps=20)]
    assert not attack(record, groups).audits["all"].contradictions
    page = tmp_path / "report.html"
    monkeypatch.setattr(sys, "argv", ["art-rs", "report", str(record), "--output", str(page)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert 'role="alert"' not in page.read_text()
    header, *lines = record.read_text().splitlines()
    column = header.split("\t").index("radius")
    rows = [line.split("\t") for line in lines]
    for row in rows:
        row[column] = repr(float(row[column]) * 1.5)
    record.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")
    found = attack(record, groups).audits["all"]
    guilty = {case.index for case in found.contradictions}
    assert len(guilty) >= 3
    monkeypatch.setattr(sys, "argv", ["art-rs", "report", str(record), "--output", str(page)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert set(re.findall(r"CONTRADICTION at input (\d+)", capsys.readouterr().err)) == set(map(str, guilty))
    text = page.read_text()
    top = text[: text.index("<h2")]
    assert 'role="alert"' in top
    cells = [data for tag, data in Page(top).text if tag in ("td", "th")]
    assert {cells[at + 1] for at, word in enumerate(cells) if word == "planted"} == set(map(str, guilty))
    (shown,) = load_nearest([read_record(record)])
    assert all(name in text for name in set(shown.attack))


# ---------------------------------------------------------------------------------------------- nearest examples


def near(index: list[int], distance: list[float], name: str) -> Nearest:
    shape = (len(index), 1, 2, 2)
    original = np.zeros(shape, np.float32)
    adversarial = np.full(shape, 0.5, np.float32) * np.array(distance, np.float32)[:, None, None, None]
    return Nearest(np.array(index, np.int64), original, adversarial, np.array(distance), (name,) * len(index))


def test_the_nearest_of_several_attacks_is_chosen_input_by_input(finished: Finished) -> None:
    both = nearest_of([near([3, 7], [0.5, 0.2], "a"), near([1, 3, 7], [0.9, 0.4, 0.3], "b")])
    assert both.index.tolist() == [1, 3, 7]
    assert both.distance.tolist() == [0.9, 0.4, 0.2]
    assert both.attack == ("b", "b", "a")
    assert np.allclose(both.adversarial[:, 0, 0, 0], [0.45, 0.2, 0.1])
    assert nearest_of([near([], [], "a")]) is None
    assert nearest_of([]) is None
    record = replace(finished[1].records[0], path=finished[2] / "other.tsv")
    path = save_nearest(both, record)
    (back,) = load_nearest([record])
    assert back.attack == both.attack
    assert np.array_equal(back.adversarial, both.adversarial)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"other\.nearest\.npz holds no nearest examples"):
        load_nearest([record])
