"""Records: what is written comes back bit for bit, whatever moment the run was killed at."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from art_rs_plugins.benchmark import writer
from art_rs_plugins.benchmark.files import companion, digest, lock, write_atomic
from art_rs_plugins.benchmark.records import (
    SCHEMA,
    read_manifest,
    read_record,
    rows_digest,
    to_certificates,
    write_parquet,
)
from art_rs_plugins.benchmark.tables import leaderboard
from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.theory.certificates import Certificates, Kind

CONFIG = {"data": "digits", "sigma": 0.25, "n": 1000, "budgets": (0.25, 0.5)}
FACTS = {"device": "cpu", "network_sha256": "ab"}
HEADER = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\tsigma\tp_lower\tp_upper\tcount\trunner_up_count\tn\tn0\talpha\tkind\tseed"
    "\tpasses"
)
COHEN = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    "0\t3\t3\t0.486\t1\t16.6\n"
    "20\t7\t-1\t0.0\t0\t0:00:14.206886\n"
    "40\t4\t6\t1.35\t0\t1:02:03.5\n"
)


def some_certificates(b: int = 5, kind: Kind = "certified") -> tuple[Certificates, NDArray[np.int64]]:
    rng = np.random.default_rng(3)
    abstained = np.arange(b) % 3 == 2
    made = Certificates(
        prediction=np.where(abstained, -1, np.arange(b) % 4),
        radius=np.where(abstained, 0.0, rng.random(b) / 3.0),
        abstained=abstained,
        p_lower=rng.random(b),
        p_upper=rng.random(b),
        count=rng.integers(0, 1000, b),
        runner_up_count=rng.integers(0, 100, b),
        n=np.full(b, 1000),
        n0=np.full(b, 100),
        sigma=np.full(b, 0.1 + 0.2),
        alpha=np.full(b, 0.001),
        index=10 * np.arange(b),
        seed=np.full(b, 2**63 - 1),
        kind=kind,
    )
    return made, np.arange(b) % 2


def write(path: Path, certificates: Certificates, labels: NDArray[np.int64], step: int = 2) -> None:
    """What a run does: append what is not there yet, a few rows at a time."""
    with RecordWriter(path, CONFIG, facts=FACTS) as writer:
        left = [row for row in range(len(labels)) if int(certificates.index[row]) not in writer.done]
        for first in range(0, len(left), step):
            rows = left[first : first + step]
            writer.append(certificates[rows], labels[rows], 0.5)


@pytest.mark.parametrize("kind", ["certified", "exact", "committed", "conditional"])
def test_certificates_come_back_bit_for_bit(tmp_path: Path, kind: Kind) -> None:
    certificates, labels = some_certificates(kind=kind)
    write(tmp_path / "run.tsv", certificates, labels)
    record = read_record(tmp_path / "run.tsv")
    back = to_certificates(record)
    for field in fields(Certificates):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(certificates, field.name), err_msg=field.name)
    assert record.label.tolist() == labels.tolist()
    assert record.correct.tolist() == [
        bool(p == y) for p, y in zip(certificates.prediction, labels, strict=True)
    ]
    assert record.time.tolist() == [0.5] * 5


def test_the_file_is_cohens_with_our_columns_behind(tmp_path: Path) -> None:
    certificates, labels = some_certificates(3)
    write(tmp_path / "run.tsv", certificates, labels)
    lines = (tmp_path / "run.tsv").read_text().splitlines()
    assert lines[0] == HEADER
    first = lines[1].split("\t")
    assert first[:3] == ["0", "0", "0"]
    assert first[3] == repr(float(certificates.radius[0]))
    assert first[6] == "0.30000000000000004"
    assert lines[3].split("\t")[:6] == ["20", "0", "-1", "0.0", "0", "0.5"]


def test_records_from_before_passes_were_counted_are_read(tmp_path: Path) -> None:
    made, labels = some_certificates()
    write(tmp_path / "run.tsv", replace(made, passes=7 * made.n), labels)
    record = read_record(tmp_path / "run.tsv")
    assert leaderboard([record])[0]["passes"] == "7,000"
    assert np.array_equal(to_certificates(record).passes, 7 * made.n)

    lines = (tmp_path / "run.tsv").read_text().splitlines()
    (tmp_path / "run.tsv").write_text("".join(line.rpartition("\t")[0] + "\n" for line in lines))
    old = read_record(tmp_path / "run.tsv")
    assert "passes" not in old.columns
    assert leaderboard([old])[0]["passes"] == "1,100"
    assert np.array_equal(to_certificates(old).passes, made.n + made.n0)
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        write(tmp_path / "run.tsv", made, labels)


def test_cohens_logs_are_read_with_both_clocks(tmp_path: Path) -> None:
    (tmp_path / "sigma_0.50.tsv").write_text(COHEN)
    record = read_record(tmp_path / "sigma_0.50.tsv")
    assert record.name == "sigma_0.50"
    assert record.idx.tolist() == [0, 20, 40]
    assert record.radius.tolist() == [0.486, 0.0, 1.35]
    assert record.correct.tolist() == [True, False, False]
    assert record.abstained.tolist() == [False, True, False]
    assert record.time.tolist() == [16.6, 14.206886, 3723.5]
    assert (record.columns, record.kind, record.manifest) == ({}, None, None)
    with pytest.raises(ValueError, match="lacks the column sigma, p_lower"):
        to_certificates(record)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n", "no rows"),
        ("idx\tlabel\tradius\n1\t2\t3\n", "line 1: no column predict, correct, time"),
        (COHEN.replace("0.486", "0.4x6"), "line 2: radius is '0.4x6'"),
        (COHEN.replace("0.486", "nan"), "line 2: radius is 'nan'"),
        (COHEN.replace("0.486", "-0.5"), "line 2: radius is -0.5"),
        (COHEN.replace("16.6", "0:99:00"), "line 2: time is '0:99:00'"),
        (COHEN.replace("\t3\t3\t", "\t3\t"), "line 2: 5 cells under 6 columns"),
        (COHEN.replace("-1\t0.0", "-1\t0.1"), "line 3: radius is 0.1 with predict -1"),
        (COHEN.replace("1.35\t0", "1.35\t1"), "line 4: correct is 1, but label is 4 and predict is 6"),
        (COHEN.replace("40\t4", "20\t4"), "line 4: idx 20 is on line 3 already"),
        (COHEN.replace("40\t4", f"{2**63}\t4"), "line 4: idx is .* 64 bits"),
        (COHEN.replace("40\t4\t6", "40\t4\t-2"), "line 4: .* predict >= -1"),
    ],
)
def test_a_bad_log_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "log.tsv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_record(tmp_path / "log.tsv")
    assert "log.tsv" in str(caught.value)


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no record at .*log\.tsv"):
        read_record(tmp_path / "log.tsv")


def test_two_kinds_do_not_share_a_record(tmp_path: Path) -> None:
    certificates, labels = some_certificates(4)
    frozen, _ = some_certificates(4, "conditional")
    with RecordWriter(tmp_path / "run.tsv", CONFIG) as writer:
        writer.append(certificates[:2], labels[:2], 0.0)
        with pytest.raises(ValueError, match="holds certified certificates, got conditional ones"):
            writer.append(frozen[2:], labels[2:], 0.0)
    text = (tmp_path / "run.tsv").read_text()
    changed = text.replace("\tcertified\t", "\tconditional\t", 1)
    (tmp_path / "run.tsv").write_text(changed)
    with pytest.raises(ValueError, match="line 3: kind is 'certified', but 'conditional' before"):
        read_record(tmp_path / "run.tsv")


def test_the_manifest_is_there_before_the_first_row(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "deep" / "run.tsv", CONFIG, facts=FACTS):
        manifest = json.loads((tmp_path / "deep" / "run.manifest.json").read_text())
        assert (tmp_path / "deep" / "run.tsv").read_text() == HEADER + "\n"
    assert manifest["config"] == {**CONFIG, "budgets": [0.25, 0.5]}
    assert manifest["device"] == "cpu"
    assert manifest["versions"]["numpy"] == np.__version__
    assert set(manifest["versions"]) >= {"python", "torch", "adversarial-robustness-toolbox", "scipy", "art-rs-plugins"}
    assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == ["run.manifest.json", "run.tsv"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6), step=st.integers(1, 5))
def test_a_killed_run_ends_in_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, cut: int, step: int) -> None:
    folder = tmp_path_factory.mktemp("killed")
    certificates, labels = some_certificates()
    write(folder / "whole.tsv", certificates, labels)
    whole = (folder / "whole.tsv").read_bytes()
    write(folder / "run.tsv", certificates, labels)
    kept = whole[: cut % (len(whole) + 1)]
    (folder / "run.tsv").write_bytes(kept)
    with RecordWriter(folder / "run.tsv", CONFIG, facts=FACTS) as writer:
        assert writer.done == {10 * row for row in range(max(kept.count(b"\n") - 1, 0))}
    write(folder / "run.tsv", certificates, labels, step)
    assert (folder / "run.tsv").read_bytes() == whole


def test_reading_leaves_a_torn_last_line_out_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates, labels)
    data = (tmp_path / "run.tsv").read_bytes()
    (tmp_path / "run.tsv").write_bytes(data[:-4])  # the seed is short by three digits, and still a number
    assert read_record(tmp_path / "run.tsv").idx.tolist() == [0, 10, 20, 30]
    assert "incomplete last line" in caplog.text


def test_a_foreign_log_needs_no_newline_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text(COHEN.rstrip("\n"))
    assert len(read_record(tmp_path / "log.tsv")) == 3


def test_a_damaged_row_in_the_middle_stops_a_resume(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates, labels)
    text = (tmp_path / "run.tsv").read_text()
    (tmp_path / "run.tsv").write_text(text.replace("\n10\t", "\n1x0\t"))
    with pytest.raises(ValueError, match="line 3: idx is '1x0'"), RecordWriter(tmp_path / "run.tsv", CONFIG):
        pass


@pytest.mark.parametrize(
    "config, facts, message",
    [
        ({**CONFIG, "sigma": 0.5}, FACTS, r"config.sigma is 0.25 there and 0.5 here"),
        ({**CONFIG, "extra": None}, FACTS, r"config.extra is 'absent' there and None here"),
        ({"data": "digits", "sigma": 0.25, "n": 1000}, FACTS, r"config.budgets is \[.*\] there and 'absent' here"),
        (CONFIG, {**FACTS, "network_sha256": "cd"}, r"network_sha256 is 'ab' there and 'cd' here"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, config: dict, facts: dict, message: str) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates, labels)
    before = (tmp_path / "run.tsv").read_bytes()
    with pytest.raises(ValueError, match=message) as caught, RecordWriter(tmp_path / "run.tsv", config, facts=facts):
        pass
    assert "another output path, or delete" in str(caught.value)
    assert (tmp_path / "run.tsv").read_bytes() == before


def test_another_command_line_is_the_same_run(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    with RecordWriter(tmp_path / "run.tsv", CONFIG, facts=FACTS, notes={"command": "first"}):
        pass
    write(tmp_path / "run.tsv", certificates, labels)
    with RecordWriter(tmp_path / "run.tsv", CONFIG, facts=FACTS, notes={"command": "second"}) as writer:
        assert writer.done == {0, 10, 20, 30, 40}
    manifest = read_manifest(tmp_path / "run.tsv")
    assert manifest is not None
    assert manifest["command"] == "first"


@pytest.mark.parametrize("package", ["torch", "art-rs-plugins"])
def test_other_versions_are_said_and_both_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, package: str
) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates, labels)
    write(tmp_path / "run.tsv", certificates, labels)
    assert not caplog.records
    beside = tmp_path / "run.manifest.json"
    manifest = json.loads(beside.read_text())
    ours, manifest["versions"][package] = manifest["versions"][package], "0.0.1"
    beside.write_text(json.dumps(manifest))
    write(tmp_path / "run.tsv", certificates, labels)
    assert f"begun with {package} 0.0.1 and goes on with {ours}" in caplog.text


def test_a_new_record_takes_away_the_audit_of_an_old_one(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    (tmp_path / "run.audit.json").write_text("{}")
    write(tmp_path / "run.tsv", certificates, labels)
    assert not (tmp_path / "run.audit.json").exists()
    (tmp_path / "run.audit.json").write_text("{}")
    write(tmp_path / "run.tsv", certificates, labels)  # goes on: the rows are those of the audit
    assert (tmp_path / "run.audit.json").exists()
    (tmp_path / "run.tsv").unlink()
    write(tmp_path / "run.tsv", certificates, labels)
    assert not (tmp_path / "run.audit.json").exists()


def test_the_digest_of_rows_sees_each_of_their_claims(tmp_path: Path) -> None:
    certificates, labels = some_certificates(4)
    write(tmp_path / "run.tsv", certificates, labels)
    record = read_record(tmp_path / "run.tsv")
    first = rows_digest(record)
    assert rows_digest(read_record(tmp_path / "run.tsv")) == first
    assert rows_digest(replace(record, time=record.time + 1)) == first
    for name in ("idx", "label", "predict", "radius"):
        assert rows_digest(replace(record, **{name: getattr(record, name) + 1})) != first
    assert rows_digest(replace(record, kind="exact")) != first


def test_a_folder_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path):
        with pytest.raises(IsADirectoryError, match="cannot write a file over a folder; name a file in it"):
            write_atomic(path, b"")


def test_a_table_without_manifest_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "run.tsv").write_text(COHEN)
    with pytest.raises(ValueError, match=r"no run\.manifest\.json beside it"):
        RecordWriter(tmp_path / "run.tsv", CONFIG).__enter__()
    assert (tmp_path / "run.tsv").read_text() == COHEN


@pytest.mark.parametrize("config", [{"sigma": float("nan")}, {"sigma": np.float32(1)}, {"x": float("inf")}])
def test_what_is_not_json_is_refused(tmp_path: Path, config: dict) -> None:
    with pytest.raises((ValueError, TypeError), match="config must hold JSON values only"):
        RecordWriter(tmp_path / "run.tsv", config)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.manifest.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"run\.manifest\.json is not valid JSON"):
        read_manifest(tmp_path / "run.tsv")


def test_rows_come_once_and_fit(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    with RecordWriter(tmp_path / "run.tsv", CONFIG) as writer:
        writer.append(certificates[:2], labels[:2], [0.1, 0.2])
        with pytest.raises(ValueError, match=r"\{10\} is not new"):
            writer.append(certificates[1:3], labels[1:3], 0.1)
        with pytest.raises(ValueError, match="is not new"):
            writer.append(certificates[[3, 3]], labels[[3, 3]], 0.1)
        with pytest.raises(ValueError, match="labels must be >= 0"):
            writer.append(certificates[2:3], np.array([-1]), 0.1)
        with pytest.raises(ValueError, match="seconds must be finite"):
            writer.append(certificates[2:3], labels[2:3], float("nan"))
    with pytest.raises(ValueError, match="writer is closed"):
        writer.append(certificates[2:3], labels[2:3], 0.1)
    record = read_record(tmp_path / "run.tsv")
    assert (record.idx.tolist(), record.time.tolist()) == ([0, 10], [0.1, 0.2])


def test_a_full_disk_leaves_whole_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates, labels = some_certificates()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RecordWriter(tmp_path / "run.tsv", CONFIG) as writer:
        writer.append(certificates[:2], labels[:2], 0.5)
        before = (tmp_path / "run.tsv").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                writer.append(certificates[2:4], labels[2:4], 0.5)
        assert (tmp_path / "run.tsv").read_bytes() == before
        assert writer.done == {0, 10}
        writer.append(certificates[2:4], labels[2:4], 0.5)
    assert read_record(tmp_path / "run.tsv").idx.tolist() == [0, 10, 20, 30]


def test_a_disk_that_fills_up_in_the_middle_of_a_row_leaves_whole_rows_only(tmp_path: Path) -> None:
    certificates, labels = some_certificates()

    class Full:
        """A file on a disk with room for ten more bytes."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = self.file.write(data[: self.room]), 0
            return taken

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with RecordWriter(tmp_path / "run.tsv", CONFIG) as writer:
        writer.append(certificates[:2], labels[:2], 0.5)
        before, real = (tmp_path / "run.tsv").read_bytes(), writer._file
        writer._file = Full(real)
        with pytest.raises(OSError, match="No space left"):
            writer.append(certificates[2:4], labels[2:4], 0.5)
        assert (tmp_path / "run.tsv").read_bytes() == before
        writer._file = real
        writer.append(certificates[2:4], labels[2:4], 0.5)
    assert read_record(tmp_path / "run.tsv").idx.tolist() == [0, 10, 20, 30]


def test_a_read_only_disk_is_named_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates[:3], labels[:3])
    before = (tmp_path / "run.tsv").read_bytes()
    real = open

    def locked(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "r" not in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(file, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", locked)
        with pytest.raises(OSError, match=r"cannot write here \(Read-only file system\); choose an output path"):
            write(tmp_path / "run.tsv", certificates, labels)
        with pytest.raises(OSError, match=r"cannot write here \(Read-only file system\)"):
            write(tmp_path / "new.tsv", certificates, labels)
    assert (tmp_path / "run.tsv").read_bytes() == before


def test_one_process_writes_a_record_at_a_time(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    with RecordWriter(tmp_path / "run.tsv", CONFIG, facts=FACTS) as writer:
        writer.append(certificates[:2], labels[:2], 0.5)
        before = (tmp_path / "run.tsv").read_bytes()
        with pytest.raises(BlockingIOError, match=r"another process is writing this record.*run\.tsv"):
            write(tmp_path / "run.tsv", certificates, labels)
        assert (tmp_path / "run.tsv").read_bytes() == before
    write(tmp_path / "run.tsv", certificates, labels)
    assert read_record(tmp_path / "run.tsv").idx.tolist() == [0, 10, 20, 30, 40]


def test_whoever_comes_second_leaves_the_manifest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (RecordWriter(tmp_path / "run.tsv", {"name": name}) for name in ("first", "second"))

    def in_between(stream: Any, path: Path) -> None:
        monkeypatch.setattr(writer, "lock", lock)
        first.__enter__()
        lock(stream, path)

    monkeypatch.setattr(writer, "lock", in_between)
    with pytest.raises(BlockingIOError, match="another process"):
        second.__enter__()
    assert read_manifest(tmp_path / "run.tsv")["config"] == {"name": "first"}
    first.__exit__(None, None, None)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    code = (
        "import sys, time; from art_rs_plugins.benchmark.writer import RecordWriter\n"
        f"with RecordWriter(sys.argv[1], {CONFIG!r}, facts={FACTS!r}):\n print('open', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run.tsv")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(BlockingIOError, match="another process"):
            write(tmp_path / "run.tsv", certificates, labels)
        other.kill()
    write(tmp_path / "run.tsv", certificates, labels)
    assert len(read_record(tmp_path / "run.tsv")) == 5


def test_a_disk_that_knows_no_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    write(tmp_path / "run.tsv", *some_certificates())
    assert "run.tsv cannot be locked (Operation not supported); let one process alone write it" in caplog.text


@pytest.mark.parametrize("schema", [SCHEMA + 1, "2", None])
def test_a_manifest_of_a_newer_schema_is_refused(tmp_path: Path, schema: object) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates, labels)
    beside = tmp_path / "run.manifest.json"
    manifest = json.loads(beside.read_text())
    assert manifest["schema"] == SCHEMA
    beside.write_text(json.dumps({**manifest, "schema": schema}))
    message = rf"run\.manifest\.json has schema {schema!r}, and this version of art-rs-plugins reads up to {SCHEMA}"
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path / "run.tsv")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "run.tsv", certificates, labels)
    del manifest["schema"]   # as manifests were before they had one
    beside.write_text(json.dumps(manifest))
    assert len(read_record(tmp_path / "run.tsv")) == 5


def test_a_torn_last_row_is_cut_off_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates, labels)
    whole = (tmp_path / "run.tsv").read_bytes()
    (tmp_path / "run.tsv").write_bytes(whole[:-7])
    write(tmp_path / "run.tsv", certificates, labels)
    assert "run.tsv: cut off an incomplete last line; its input is certified again" in caplog.text
    assert (tmp_path / "run.tsv").read_bytes() == whole


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run.tsv", tmp_path / "file" / "deep" / "run.tsv"):
        with pytest.raises(OSError, match="choose an output path in a folder that you may write to") as caught:
            RecordWriter(path, CONFIG).__enter__()
        assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="choose an output path"):
        RecordWriter(tmp_path / "locked" / "run.tsv", CONFIG).__enter__()


def test_a_failed_atomic_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="cannot write here"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_only_l2_radii_are_recorded(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    with RecordWriter(tmp_path / "run.tsv", CONFIG) as writer:
        with pytest.raises(ValueError, match=r"a record holds l2 radii, got certificates in norm 1\.0"):
            writer.append(replace(certificates, norm=1.0), labels, 0.0)
        writer.append(certificates[[]], labels[[]], 0.0)
    assert (tmp_path / "run.tsv").read_text() == HEADER + "\n"


def test_a_table_of_another_version_is_not_continued(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run.tsv", CONFIG):
        pass
    (tmp_path / "run.tsv").write_text(COHEN)
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        RecordWriter(tmp_path / "run.tsv", CONFIG).__enter__()


def test_a_kind_that_does_not_exist_is_named(tmp_path: Path) -> None:
    certificates, labels = some_certificates()
    write(tmp_path / "run.tsv", certificates, labels)
    (tmp_path / "run.tsv").write_text((tmp_path / "run.tsv").read_text().replace("\tcertified\t", "\tproved\t"))
    with pytest.raises(ValueError, match="line 2: kind is 'proved'"):
        read_record(tmp_path / "run.tsv")


def test_a_manifest_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.manifest\.json must hold a JSON object, got list"):
        read_manifest(tmp_path / "run.tsv")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'art-rs-plugins\[tables\]'"):
        write_parquet([], tmp_path / "rows.parquet")


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest(b"abc") == digest(tmp_path / "file") == digest(str(tmp_path / "file"))
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest(array) == hashlib.sha256(b"float32 (2, 3) " + array.tobytes()).hexdigest()
    assert digest(array) == digest(np.asfortranarray(array))
    assert len({digest(array), digest(array.reshape(3, 2)), digest(array.view(np.int32)), digest(-array)}) == 4
    with pytest.raises(TypeError, match="dtype object"):
        digest(np.array([None]))


def test_companions_keep_the_dots_of_a_name() -> None:
    assert companion("a/sigma_0.50.tsv", "manifest") == Path("a/sigma_0.50.manifest.json")
    assert companion("a/sigma_0.50", "audit") == Path("a/sigma_0.50.audit.json")


def test_parquet_holds_every_row_and_column(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra `tables`) is not installed")
    certificates, labels = some_certificates(kind="conditional")
    write(tmp_path / "ours.tsv", certificates, labels)
    (tmp_path / "theirs.tsv").write_text(COHEN)
    write_parquet([read_record(tmp_path / "ours.tsv"), read_record(tmp_path / "theirs.tsv")], tmp_path / "all.parquet")
    table = parquet.read_table(tmp_path / "all.parquet")
    columns = table.to_pydict()
    assert columns["record"] == ["ours"] * 5 + ["theirs"] * 3
    assert columns["radius"] == [*certificates.radius.tolist(), 0.486, 0.0, 1.35]
    assert columns["kind"] == ["conditional"] * 5 + [None] * 3
    assert columns["seed"] == [2**63 - 1] * 5 + [None] * 3
    manifests = json.loads(table.schema.metadata[b"manifests"])
    assert manifests["ours"]["config"]["sigma"] == 0.25
    assert manifests["theirs"] is None
