"""Long runs: stopped, resumed, divided and streamed, they end in the same rows, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import TEST, X, Y, digits_network, smooth
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from art_rs_plugins import PyTorchDataDependentSmoothing
from art_rs_plugins.benchmark.arrays import ArrayBatches, ArrayFile, NpzBatches, open_folder
from art_rs_plugins.benchmark.attacked import rebuild
from art_rs_plugins.benchmark.config import RunConfig, parse_examples
from art_rs_plugins.benchmark.data import load
from art_rs_plugins.benchmark.files import companion, digest, digest_rows
from art_rs_plugins.benchmark.records import Record, read_record
from art_rs_plugins.benchmark.runs import certify, certify_together
from art_rs_plugins.benchmark.shards import Shard, merge
from art_rs_plugins.benchmark.streams import certify_batches
from art_rs_plugins.cli import main
from art_rs_plugins.estimators.modes import Frozen
from art_rs_plugins.theory.elastic import ElasticSigma

CONFIG = RunConfig(model="support:digits_network", device="cpu", n=300, n0=20, examples=":48", block=100)


def rows(path: Path) -> list[list[str]]:
    """Cells of a record but for the times."""
    return [cells[:5] + cells[6:] for cells in (line.split("\t") for line in path.read_text().splitlines())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run.tsv"
    certify(CONFIG, path)
    return path


# ---------------------------------------------------------------------------------------------- the same bits


def test_batches_and_order_change_no_bit() -> None:
    estimator = smooth(digits_network())
    x, indices = X[:1200], np.arange(1200)
    settings: dict[str, Any] = {"n": 100, "n0": 20, "seed": 3}
    one = estimator.certificates(x, indices=indices, batch_size=64, **settings)
    order = np.random.default_rng([0, 5]).permutation(1200)
    other = estimator.certificates(x[order], indices=indices[order], batch_size=1000, **settings)[np.argsort(order)]
    for name in ("prediction", "radius", "abstained", "count", "runner_up_count", "p_lower", "p_upper", "index"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert len(np.unique(one.count)) > 10


def test_examples_backwards_are_the_same_rows(whole: Path, tmp_path: Path) -> None:
    certify(replace(CONFIG, examples="47::-1"), tmp_path / "back.tsv")
    first, *back = rows(tmp_path / "back.tsv")
    assert [first, *reversed(back)] == rows(whole)


# ---------------------------------------------------------------------------------------------- stopped


class Interrupting(torch.nn.Sequential):
    """Presses Ctrl-C in its `at`-th forward pass, and counts the passes that come after."""

    at: int = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Interrupting.at -= 1
        if Interrupting.at == 0:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def interrupting() -> Interrupting:
    return Interrupting(*digits_network())


@pytest.mark.parametrize("at", [20, 60, 101, 150])
def test_ctrl_c_stops_within_one_pass_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, at: int
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    words = ["certify", "--output", str(tmp_path / "run.tsv"), "--model", "test_runs:interrupting", "--n", "300"]
    words += ["--n0", "20", "--examples", ":48", "--block", "100", "--device", "cpu", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["art-rs", *words])
    monkeypatch.setattr(sys.modules["test_runs"].Interrupting, "at", at)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert "run.tsv, and the same command goes on" in capsys.readouterr().err
    assert sys.modules["test_runs"].Interrupting.at == 0   # no pass came after
    done = rows(tmp_path / "run.tsv")[1:]
    assert len(done) % 16 == 0
    assert len(done) < 48
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    found = rows(tmp_path / "run.tsv")
    assert found[1 : 1 + len(done)] == done
    certify(replace(CONFIG, model="test_runs:interrupting"), tmp_path / "undisturbed.tsv")
    assert found == rows(tmp_path / "undisturbed.tsv")


@pytest.fixture
def lock_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars lock across processes: a child that is killed while it draws one would stop all others for good."""
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)


def killed_at_random(run: Any, path: Path, expected: list[list[str]], kills: int, longest: float) -> int:
    """Kill `run` at random moments and start it again, `kills` times; how often it came to its end meanwhile."""
    rng, ends = np.random.default_rng([7, 11]), 0
    while kills:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)   # of Python 3.12, for a fork beside idle threads
            child = os.fork()
        if not child:
            code = 1
            try:
                run()
                code = 0
            finally:
                os._exit(code)
        time.sleep(rng.random() * longest)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills -= os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if path.exists():   # whatever is whole is right
            lines = path.read_text().split("\n")[:-1]
            assert [cells[:5] + cells[6:] for cells in (line.split("\t") for line in lines)] == expected[: len(lines)]
        if os.WIFEXITED(status):
            assert rows(path) == expected
            path.unlink()
            companion(path, "manifest").unlink()
            ends += 1
    return ends


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("lock_of_this_process")
def test_a_run_killed_at_156_random_moments_loses_and_doubles_nothing(whole: Path, tmp_path: Path) -> None:
    begun = time.perf_counter()
    certify(CONFIG, tmp_path / "timed.tsv")
    seconds = time.perf_counter() - begun
    path = tmp_path / "run.tsv"
    ends = killed_at_random(lambda: certify(CONFIG, path), path, rows(whole), 156, seconds)
    assert ends
    certify(CONFIG, path)
    assert rows(path) == rows(whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("lock_of_this_process")
def test_two_rules_killed_at_40_random_moments_end_alike(tmp_path: Path) -> None:
    configs = [replace(CONFIG, rule=rule) for rule in ("one-sided", "two-sided")]
    expected = certify_together([{tmp_path / "a.tsv": configs[0], tmp_path / "b.tsv": configs[1]}])[0]
    paths, rng = [tmp_path / "one.tsv", tmp_path / "two.tsv"], np.random.default_rng([7, 12])
    for _ in range(40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                certify_together([dict(zip(paths, configs, strict=True))])
            finally:
                os._exit(0)
        time.sleep(rng.random() * 0.5)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    certify_together([dict(zip(paths, configs, strict=True))])
    assert [rows(path) for path in paths] == [rows(record.path) for record in expected]


# ---------------------------------------------------------------------------------------------- shards


@given(
    start=st.none() | st.integers(0, 50), stop=st.none() | st.integers(-5, 60), step=st.none() | st.integers(1, 7),
    count=st.integers(1, 5), total=st.integers(0, 70),
)   # fmt: skip
def test_shards_are_a_partition(start: int | None, stop: int | None, step: int | None, count: int, total: int) -> None:
    examples = ":".join("" if part is None else str(part) for part in (start, stop, step))
    parts = [parse_examples(Shard(number, count).of(examples), total) for number in range(count)]
    assert sorted(np.concatenate(parts)) == parse_examples(examples, total).tolist()


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "0/0"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"shard must be number/count"):
        Shard.parse(text)


@pytest.mark.parametrize("examples", ["-5:", "10:0:-1"])
def test_examples_that_count_backwards_are_not_divided(examples: str) -> None:
    with pytest.raises(ValueError, match="examples must count forwards from 0 or more"):
        Shard(0, 2).of(examples)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("shards")
    return [certify(CONFIG, folder / f"part{number}.tsv", shard=Shard(number, 3)) for number in (2, 0, 1)]


def test_three_shards_merge_into_the_whole(whole: Path, shards: list[Record], tmp_path: Path) -> None:
    assert [len(record) for record in shards] == [16, 16, 16]
    merged = merge(shards, tmp_path / "merged.tsv")
    assert rows(merged.path) == rows(whole)
    known, undivided = merged.manifest or {}, read_record(whole).manifest or {}
    aside = {"created", "command", "shards"}
    assert {name: known[name] for name in known if name not in aside} == {
        name: undivided[name] for name in undivided if name not in aside
    }
    rebuild(merged)   # so an attack finds the classifier behind it
    assert rows(certify(CONFIG, merged.path).path) == rows(whole)


def test_report_merges_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shards: list[Record], tmp_path: Path
) -> None:
    words = ["report", *(str(record.path) for record in shards), "--merge", str(tmp_path / "m.tsv"), "--format", "json"]
    monkeypatch.setattr(sys, "argv", ["art-rs", *words])
    with pytest.raises(SystemExit):
        main()
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["record"], entry["rows"]) == ("m", 48)
    monkeypatch.setattr(sys, "argv", ["art-rs", *words[:3], *words[4:]])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "error: shard 1/3 is missing" in capsys.readouterr().err


def edited(record: Record, folder: Path, name: str, **changes: Any) -> Record:
    """A copy of a record whose manifest says something else."""
    path = folder / name
    path.write_bytes(record.path.read_bytes())
    manifest = json.loads(companion(record.path, "manifest").read_text())
    manifest["config"] |= changes.pop("config", {})
    companion(path, "manifest").write_text(json.dumps(manifest | changes))
    return read_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"sigma": 0.5}}, r"not of one run: they differ in config\.sigma"),
        ({"network_sha256": "ab"}, "they differ in network_sha256"),
        ({"device": "another"}, "they differ in device"),
        ({"block": 50}, "they differ in block"),
        ({"further_sha256": "ab"}, "they differ in further_sha256"),
        ({"data_sha256": "ab"}, "made with other inputs than digits holds now"),
        ({"labels_sha256": "ab"}, "made with other labels than digits holds now"),
        ({"network_outputs": 7.0}, "they differ in what the network answers"),
        ({"shard": {"number": 1, "count": 2, "of": ":48"}}, "are not shards of one division"),
        ({"shard": None}, "are not shards of one division"),
        ({"indices_sha256": "ab"}, "is not finished"),
    ],
)
def test_shards_of_other_runs_are_refused(
    shards: list[Record], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if "network_outputs" in change:
        known = shards[2].manifest["network_outputs"]
        change = {"network_outputs": (np.array(known) + change["network_outputs"]).tolist()}
    other = edited(shards[2], tmp_path, "other.tsv", **change)
    with pytest.raises(ValueError, match=message):
        merge([*shards[:2], other], tmp_path / "merged.tsv")
    assert not (tmp_path / "merged.tsv").exists()


def test_an_unfinished_shard_is_refused(shards: list[Record], tmp_path: Path) -> None:
    other = edited(shards[2], tmp_path, "other.tsv")
    lines = other.path.read_text().splitlines(keepends=True)
    other.path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"other\.tsv is not finished: run the command again"):
        merge([*shards[:2], read_record(other.path)], tmp_path / "merged.tsv")


def test_slices_by_hand_merge_without_gaps_or_duplicates(whole: Path, tmp_path: Path) -> None:
    parts = [":16", "16:32", "32:48", "16:48"]
    found = [certify(replace(CONFIG, examples=part), tmp_path / f"{part.replace(':', '_')}.tsv") for part in parts]
    assert rows(merge(found[:3], tmp_path / "whole.tsv").path) == rows(whole)
    manifest = json.loads((tmp_path / "whole.manifest.json").read_text())
    assert manifest["config"]["examples"] == "0:48:1"
    with pytest.raises(ValueError, match="input 16 does not fit between the others: a shard is missing"):
        merge([found[0], found[2]], tmp_path / "gap.tsv")
    with pytest.raises(ValueError, match=r"input 16 is in .*16_32\.tsv and in .*16_48\.tsv; an input counts once"):
        merge([found[0], found[1], found[3]], tmp_path / "twice.tsv")
    with pytest.raises(ValueError, match="output another path than theirs"):
        merge(found[:3], found[0].path)
    companion(found[0].path, "manifest").unlink()
    with pytest.raises(ValueError, match="has no manifest of a run beside it"):
        merge([read_record(found[0].path), *found[1:3]], tmp_path / "bare.tsv")


def test_a_memory_is_not_asked_in_parts(tmp_path: Path) -> None:
    config = replace(CONFIG, method="data-dependent", examples=":8")
    with pytest.raises(ValueError, match="mode 'commit' has one memory"):
        certify(config, tmp_path / "part.tsv", shard=Shard(0, 2))
    with pytest.raises(ValueError, match="mode 'commit' has one memory"):
        certify(config, tmp_path / "far.tsv", workers=lambda task, items: (task(item) for item in items))


def test_a_worker_on_another_device_is_refused(tmp_path: Path) -> None:
    def elsewhere(task: Any, items: Any) -> Iterator[Any]:
        found = (task(item) for item in items)
        return (done if isinstance(done, tuple) else replace(done, device="another") for done in found)

    with pytest.raises(ValueError, match=r"a worker votes on another, but .*run\.tsv was begun on cpu"):
        certify(CONFIG, tmp_path / "run.tsv", workers=elsewhere)


# ---------------------------------------------------------------------------------------------- streams

STREAM: dict[str, Any] = {"n": 300, "n0": 20, "seed": 0}


def stored(folder: Path) -> tuple[ArrayFile, ArrayFile]:
    np.save(folder / "x.npy", X[TEST][:48])
    np.save(folder / "y.npy", Y[TEST][:48])
    return ArrayFile(folder / "x.npy"), ArrayFile(folder / "y.npy")


def sources(folder: Path) -> dict[str, Any]:
    x, y = X[TEST][:48], Y[TEST][:48]
    for part in range(3):
        np.savez(folder / f"{part}.npz", x=x[16 * part : 16 * part + 16], y=y[16 * part : 16 * part + 16])
    return {
        "list": [(x[:7], y[:7]), (x[7:], y[7:])],
        "loader": DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=9),
        "arrays on disk": ArrayBatches(*stored(folder), size=10),
        "one batch": ArrayBatches(x, y, size=1000),
        "npz": NpzBatches(folder),
    }


@pytest.mark.parametrize("name", ["list", "loader", "arrays on disk", "one batch", "npz"])
def test_streams_of_any_kind_give_the_same_rows(tmp_path: Path, name: str) -> None:
    estimator = smooth(digits_network())
    record = certify_batches(estimator, sources(tmp_path)[name], tmp_path / "run.tsv", **STREAM)
    expected = estimator.certificates(X[TEST][:48], n=300, n0=20, seed=0)
    assert record.idx.tolist() == list(range(48))
    assert np.array_equal(record.radius, expected.radius)
    assert np.array_equal(record.columns["count"], expected.count)
    assert np.array_equal(record.label, Y[TEST][:48])
    assert len(np.unique(expected.count)) > 10


def test_a_stream_goes_on_where_it_stopped_whatever_its_batches(tmp_path: Path) -> None:
    estimator, kinds = smooth(digits_network()), sources(tmp_path)
    certify_batches(estimator, kinds["list"], tmp_path / "run.tsv", **STREAM)
    whole = rows(tmp_path / "run.tsv")
    lines = (tmp_path / "run.tsv").read_text().splitlines(keepends=True)
    for kept, kind in ((5, "loader"), (30, "npz")):
        (tmp_path / "run.tsv").write_text("".join(lines[:kept]) + lines[kept][:9])
        certify_batches(estimator, kinds[kind], tmp_path / "run.tsv", **STREAM)
        assert rows(tmp_path / "run.tsv") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 200}, r"config\.n is 300 there and 200 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"x": 1}, "data_sha256 is"),
        ({"y": 1}, "data_sha256 is"),
        ({"cut": 1}, "data_sha256 is .* inputs is 48 there and 47 here"),
        ({"scale": 0.5}, r"config\.scale is '0.25' there and '0.5' here"),
        ({"network": 1}, "belongs to a network that answers otherwise"),
    ],
)
def test_a_stream_of_other_things_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    x, y = X[TEST][:48].copy(), Y[TEST][:48].copy()
    certify_batches(smooth(digits_network()), [(x, y)], tmp_path / "run.tsv", **STREAM)
    before = (tmp_path / "run.tsv").read_bytes()
    x[7, 0, 0, 0] += 0.25 * ("x" in change)
    y[7] = (y[7] + ("y" in change)) % 10
    estimator = smooth(digits_network(change.get("network", 0)), scale=change.get("scale", 0.25))
    asked = STREAM | {name: change[name] for name in change if name in STREAM}
    last = 47 if "cut" in change else 48
    with pytest.raises(ValueError, match=message):
        certify_batches(estimator, [(x[:last], y[:last])], tmp_path / "run.tsv", **asked)
    assert (tmp_path / "run.tsv").read_bytes() == before


def test_a_stream_is_not_continued_with_other_promises(tmp_path: Path) -> None:
    def frozen(radius: float) -> PyTorchDataDependentSmoothing:
        made = smooth(digits_network()).certificates(X[:2], n=100, seed=0)
        made = replace(made, radius=np.full(2, radius), abstained=np.zeros(2, dtype=bool))
        mode = Frozen.of(X[:2], made)
        return PyTorchDataDependentSmoothing.from_classifier(smooth(digits_network()), mode=mode)

    batches = [(X[TEST][:4], Y[TEST][:4])]
    certify_batches(frozen(0.1), batches, tmp_path / "run.tsv", **STREAM)
    certify_batches(frozen(0.1), batches, tmp_path / "run.tsv", **STREAM)
    with pytest.raises(ValueError, match=r"config\.mode is"):
        certify_batches(frozen(0.2), batches, tmp_path / "run.tsv", **STREAM)
    nameless = ElasticSigma(lambda x: np.zeros(len(x)), base=0.25, rate=0.1, centre=0.0)
    estimator = PyTorchDataDependentSmoothing.from_classifier(smooth(digits_network()), mode=nameless)
    with pytest.raises(ValueError, match=r"mode holds .* of which nobody can tell later"):
        certify_batches(estimator, batches, tmp_path / "other.tsv", **STREAM)


def test_batches_that_change_between_readings_are_refused(tmp_path: Path) -> None:
    x, y = torch.from_numpy(X[TEST][:48]), torch.from_numpy(Y[TEST][:48])
    mixed = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(x, y), batch_size=9, shuffle=True, generator=mixed)
    with pytest.raises(ValueError, match=r"batches are others when they are read again, from input \d on"):
        certify_batches(smooth(digits_network()), loader, tmp_path / "run.tsv", **STREAM)

    class Shrinking:
        left = 3

        def __iter__(self) -> Iterator[Any]:
            Shrinking.left -= 1
            return iter([(x[:9], y[:9])] * 1 + [(x[9:18], y[9:18])] * (Shrinking.left - 1))

    with pytest.raises(ValueError, match="batches held 18 inputs when they were first read, and now 9"):
        certify_batches(smooth(digits_network()), Shrinking(), tmp_path / "less.tsv", **STREAM)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (iter([(X[:4], Y[:4])]), TypeError, "batches must be readable twice, got an iterator"),
        ([X[:4]], TypeError, "batch 0 must be a pair of inputs and labels, got ndarray"),
        ([(X[:4], Y[:3])], ValueError, r"batch 0 must have class indices of shape \(4,\), got shape \(3,\)"),
        ([(X[:4], Y[:4].astype(float))], ValueError, "got shape .* of dtype float64"),
        ([], ValueError, "batches must hold at least one input"),
    ],
)
def test_what_is_no_batches_is_refused(tmp_path: Path, batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        certify_batches(smooth(digits_network()), batches, tmp_path / "run.tsv", **STREAM)
    assert not (tmp_path / "run.tsv").exists()


def test_files_that_are_no_arrays_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file at .*x\.npy"):
        ArrayFile(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_text("x")
    with pytest.raises(ValueError, match=r"x\.npy is no \.npy of numbers"):
        ArrayFile(tmp_path / "x.npy")
    np.save(tmp_path / "text.npy", np.array(["one"]))
    with pytest.raises(ValueError, match=r"text\.npy is no \.npy of numbers, but of <U3"):
        ArrayFile(tmp_path / "text.npy")
    with pytest.raises(FileNotFoundError, match=r"no \.npz file in"):
        NpzBatches(tmp_path)
    np.savez(tmp_path / "a.npz", x=X[:2])
    with pytest.raises(ValueError, match=r"a\.npz lacks the array x or y"):
        list(NpzBatches(tmp_path))
    with pytest.raises(ValueError, match="x and y must have the same length, got 3 and 2"):
        ArrayBatches(X[:3], Y[:2])


def folder_of(path: Path, x: Any = None, y: Any = None) -> Path:
    np.save(path / "x_test.npy", X[TEST][:60] if x is None else x)
    np.save(path / "y_test.npy", Y[TEST][:60] if y is None else y)
    return path


def test_a_data_set_on_disk_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    data = open_folder(folder_of(tmp_path))
    assert (data.num_classes, data.clip_values, len(data.x_test)) == (10, (0.0, 1.0), 60)
    chosen = np.array([3, 50, 4])
    np.testing.assert_array_equal(data.x_test[chosen], X[TEST][chosen])
    assert digest_rows(data.x_test, chosen) == digest_rows(X[TEST], chosen) == digest(X[TEST][chosen])
    other = open_folder(folder_of(tmp_path, x=(X[TEST][:60] * 16).astype(np.uint8)))
    assert other.clip_values == (0.0, 16.0)
    assert other.x_test[:2].dtype == other.x_test.dtype == np.float32


def test_a_run_over_a_data_set_on_disk_has_the_rows_of_one_in_memory(whole: Path, tmp_path: Path) -> None:
    expected = load("digits")
    folder = folder_of(tmp_path, expected.x_test, expected.y_test)
    config = replace(CONFIG, data=str(folder))
    parts = [certify(config, tmp_path / f"{number}.tsv", shard=Shard(number, 2)) for number in range(2)]
    assert rows(merge(parts, tmp_path / "run.tsv").path) == rows(whole)
    expected.x_test[5, 0, 3, 3] += 0.5
    folder_of(tmp_path, expected.x_test, expected.y_test)
    with pytest.raises(ValueError, match="was made with other inputs than"):
        merge(parts, tmp_path / "again.tsv")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.where(np.arange(60)[:, None] == 7, np.nan, 0.5)}, ValueError, r"x_test\.npy must be finite"),
        ({"x": X[TEST][:59]}, ValueError, r"x_test must have shape \(b, \.\.\.\) and y_test shape \(b,\)"),
        ({"y": Y[TEST][:60] - 1}, ValueError, "y_test must be class indices in"),
        ({"y": np.zeros(60, dtype=np.int64)}, ValueError, "of at least two classes"),
        ({"y": Y[TEST][:60] + 0.5}, TypeError, "y_test must be integers"),
    ],
)
def test_a_data_set_on_disk_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_folder(folder_of(tmp_path, **change))


PEAK = """
import sys
from pathlib import Path
import numpy as np
from torch import nn
from art_rs_plugins import PyTorchSmoothedClassifier
from art_rs_plugins.benchmark.arrays import ArrayBatches, ArrayFile
from art_rs_plugins.benchmark.streams import certify_batches

folder, rows, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
estimator = PyTorchSmoothedClassifier(network, nn.CrossEntropyLoss(), (3, 32, 32), 2, scale=0.25, device_type="cpu")
x = ArrayFile(folder / "x.npy")
x = (x[:] if how == "loaded" else x)[:rows] if rows < len(x) else x
batches = ArrayBatches(x, np.zeros(rows, dtype=np.int64))
certify_batches(estimator, batches, folder / f"{rows}{how}.tsv", n=11, n0=1)
# of this process alone: getrusage begins with the peak of the one that started it
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_inputs(tmp_path: Path) -> None:
    """600 MB of inputs on disk, a hundred times as many as in the small run; what loads them is caught."""
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (50_000, 3, 32, 32))   # zeros, that take no room
    peaks = {}
    for count, how in ((500, "mapped"), (50_000, "mapped"), (500, "loaded")):
        run = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path), str(count), how]
        found = subprocess.run(run, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        peaks[count, how] = int(found.stdout)
    small = peaks[500, "mapped"]
    assert peaks[50_000, "mapped"] < 1.5 * small
    assert peaks[500, "loaded"] > 1.5 * small
