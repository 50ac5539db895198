"""The memory on disk: crashes at every write, threads, restarts and damage, against the promises that were given."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from closed_forms import allowed, certificates
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from art_rs_plugins.estimators.store import Memory, Reply, Ticket
from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.regions import Case, CertifiedRegions, EndlessBudget, SharedBudget

BUDGET = EndlessBudget(0.01)


def remember(path: Path | None, *, shape: tuple[int, ...] = (1,), **changes) -> Memory:
    return Memory(path, **{"shape": shape, "digest": "weights 1", "budget": BUDGET, **changes})


def points(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.float32).reshape(len(rows), -1)


def claims(prediction, radius, indices=None):
    """A sampler that certifies what it is told; class -1 stands for an abstention."""
    prediction, radius = np.atleast_1d(prediction), np.atleast_1d(np.asarray(radius, dtype=np.float64))

    def sample(rows: np.ndarray, alpha: float) -> Certificates:
        given = np.where(prediction < 0, np.nan, radius)
        made = certificates(given, prediction=np.maximum(prediction, 0), alpha=np.full(len(given), alpha),
                            kind="conditional", sigma=0.25 + np.arange(len(given)), seed=np.full(len(given), 2**63 - 1),
                            index=np.arange(len(given)) if indices is None else np.asarray(indices))
        return made[rows]

    return sample


def ask(memory: Memory, x: float, prediction: int, radius: float) -> tuple[int, float, Case]:
    promise = memory.answer(points(x), claims(prediction, radius)).promises[0]
    return promise.prediction, promise.radius, promise.case


def wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


# ---------------------------------------------------------------------- what is answered


def test_answers_carry_the_facts_of_their_records(tmp_path: Path) -> None:
    x = points(0.0, 0.5, 3.0, 9.0)
    with remember(tmp_path / "a.db") as memory:
        first = memory.answer(x[:1], claims(2, 1.0, [40]), indices=[40])
        made = first.certificates
        assert (made.kind, made.norm, made.performance) == ("committed", 2.0, "float32")
        assert (int(made.prediction[0]), float(made.radius[0]), bool(made.abstained[0])) == (2, 1.0, False)
        assert (int(made.index[0]), int(made.count[0]), int(made.n[0]), int(made.n0[0])) == (40, 950, 1000, 100)
        assert float(made.alpha[0]) == BUDGET.level(1)
        sample = claims([0, 0, 1, -1], [1.0, 1.0, 5.0, 0.0], [7, 5, 3, 1])
        reply = memory.answer(x, sample, indices=[7, 5, 3, 1])
        assert [p.case for p in reply.promises] == [Case.REPLAYED, Case.INHERITED, Case.TRIMMED, Case.ABSTAINED]
        found = reply.certificates
        assert found.prediction.tolist() == [2, 2, 1, 0]
        assert found.radius.tolist() == pytest.approx([1.0, 0.5, 2.0, 0.0], rel=1e-8)
        assert found.abstained.tolist() == [False, False, False, True]
        assert found.index.tolist() == [7, 5, 3, 1]
        # the first two are from record 0, the others were sampled as rows 2 and 3
        assert found.sigma.tolist() == [0.25, 0.25, 2.25, 3.25]
        assert found.alpha.tolist() == [BUDGET.level(1)] * 2 + [BUDGET.level(2, 2)] * 2
        assert found.seed.tolist() == [2**63 - 1] * 4
        assert memory.records["raw_radius"].tolist() == [1.0, 5.0]
        assert memory.records["radius"].tolist() == [1.0, found.radius[2]]
        assert (memory.attempts, memory.spent, reply.epoch) == (3, BUDGET.spent(3), 1)
        covered = memory.answer(x[:3], claims([9, 9, 9], [9.0, 9.0, 9.0]))
        assert [p.prediction for p in covered.promises] == [2, 2, 1]
        assert memory.attempts == 3   # nothing was sampled, nothing is spent
        empty = memory.answer(x[:0], claims([], []))
        assert len(empty.certificates) == 0


def test_records_of_a_batch_are_numbered_by_index() -> None:
    x, indices = points(0.0, 10.0, 20.0, 30.0), [4, 9, 1, 6]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        memory, names = remember(None), np.array(indices)[order]
        reply = memory.answer(x[order], claims([0, 1, 2, 0], np.arange(1.0, 5.0), names), indices=names)
        records = [promise.record for promise in reply.promises]
        assert memory.records["index"].tolist() == sorted(indices)
        assert memory.records["index"][records].tolist() == names.tolist()
        assert memory.records["raw_radius"][records].tolist() == [1.0, 2.0, 3.0, 4.0]
        np.testing.assert_array_equal(memory.regions.centres(np.array(records)), x[order])
        memory.close()


def test_the_sampler_is_asked_for_what_is_not_covered_alone() -> None:
    memory, seen = remember(None), []

    def sample(rows: np.ndarray, alpha: float) -> Certificates:
        seen.append((rows.tolist(), alpha))
        return claims([0] * 4, [0.25] * 4)(rows, alpha)

    memory.answer(points(1.0), lambda rows, alpha: claims(0, 0.25)(rows, alpha))
    memory.answer(points(0.0, 1.0, 2.0, 3.0), sample)
    assert seen == [([0, 2, 3], BUDGET.level(2, 3))]
    memory.close()


def test_alpha_is_spent_before_the_first_draw(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    def dies(rows: np.ndarray, alpha: float) -> Certificates:
        raise KeyboardInterrupt

    for attempts in (1, 2, 3):
        with remember(path) as memory:
            with pytest.raises(KeyboardInterrupt):
                memory.answer(points(0.0), dies)
            assert (memory.attempts, len(memory.records)) == (attempts, 0)
    with remember(path) as memory:
        assert ask(memory, 0.0, -1, 0.0)[2] is Case.ABSTAINED   # abstentions count as well
        assert memory.attempts == 4
        assert memory.ticket().alpha == BUDGET.level(5)


def test_what_another_thread_promised_meanwhile_is_kept() -> None:
    memory = remember(None)

    def slow(rows: np.ndarray, alpha: float) -> Certificates:
        assert ask(memory, 0.5, 1, 2.0) == (1, 2.0, Case.NEW)   # no lock is held here
        return claims(0, 1.0)(rows, alpha)

    reply = memory.answer(points(0.0), slow)
    assert (reply.promises[0].prediction, reply.promises[0].case) == (1, Case.INHERITED)
    assert memory.attempts == 2   # what was discarded is spent
    assert reply.certificates.alpha.tolist() == [BUDGET.level(2)]   # the alpha of the record that answers
    memory.close()


def test_tickets_are_good_for_one_commit() -> None:
    memory, x = remember(None), points(0.0, 5.0)
    ticket = memory.ticket()
    made = claims([0, 1], [1.0, 1.0])(np.arange(2), ticket.alpha)
    with pytest.raises(ValueError, match="the ticket is for 1 certificates, got 2"):
        memory.commit(x, made, ticket)
    with pytest.raises(ValueError, match="was not issued by this memory, or was used"):
        memory.commit(x[:1], made[:1], ticket)
    with pytest.raises(ValueError, match="was not issued"):
        memory.commit(x[:1], made[:1], Ticket(9, 1, 0.5))
    for changes, message in (
        ({"alpha": np.full(2, 0.01)}, "certificates may spend alpha="),
        ({"kind": "committed", "alpha": np.zeros(2)}, "certificates must be sampled"),
        ({"performance": "bfloat16", "alpha": np.zeros(2)}, "in bfloat16"),
        ({"norm": 1.0, "alpha": np.zeros(2)}, "norm 1"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.commit(x, certificates([1.0, 1.0], **changes), memory.ticket(2))
    with pytest.raises(ValueError, match="certificates of the inputs"):
        memory.answer(x, lambda rows, alpha: made, indices=[5, 6])
    with pytest.raises(ValueError, match=r"indices must have shape \(2,\)"):
        memory.answer(x, claims([0, 1], [1.0, 1.0]), indices=[5])
    with pytest.raises(ValueError, match="counted from 1"):
        memory.ticket(0)
    with pytest.raises(TypeError, match="integer"):
        memory.ticket(1.5)
    assert len(memory.records) == 0
    memory.close()


def test_an_exhausted_budget_answers_what_it_promised() -> None:
    memory = remember(None, budget=SharedBudget(0.01, 2))
    ask(memory, 0.0, 0, 1.0)
    ask(memory, 5.0, 1, 1.0)
    with pytest.raises(ValueError, match="exceed the budget of 2"):
        ask(memory, 9.0, 1, 1.0)
    assert ask(memory, 0.5, 1, 1.0)[0] == 0
    assert memory.spent == pytest.approx(0.01)
    memory.close()


# ---------------------------------------------------------------------- saved and loaded


def test_a_memory_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.db", np.random.default_rng(0)
    x = rng.uniform(size=(1800, 2, 3)).astype(np.float32)
    with remember(path, shape=(2, 3)) as memory:
        for start in range(0, 1800, 300):   # more than one block of records
            rows = slice(start, start + 300)
            sample = claims(rng.integers(-1, 3, 300), rng.choice([0.0, 0.1, 1.0 / 3.0], 300))
            memory.answer(x[rows], sample, indices=np.arange(300))
        before, facts, spent = memory.consult(x), memory.records.tobytes(), (memory.attempts, memory.spent)
        centres = memory.regions.centres().tobytes()
        assert len(memory.records) > 1000
    for read_only in (True, False):
        with remember(path, shape=(2, 3), read_only=read_only) as memory:
            assert memory.consult(x) == before
            assert memory.records.tobytes() == facts
            assert memory.regions.centres().tobytes() == centres
            assert (memory.attempts, memory.spent) == spent
            assert memory.epoch == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"digest": "weights 2"}, "digest is 'weights 1' there and 'weights 2' here"),
        ({"shape": (2,)}, r"shape is \[1\] there and \[2\] here"),
        ({"budget": SharedBudget(0.01, 100)}, "budget is .*EndlessBudget.* there and .*SharedBudget"),
        ({"budget": EndlessBudget(0.02)}, "budget is"),
        ({"settings": {"sigma": [0.25, 0.5]}}, r"settings is \{\} there"),
        ({"performance": "bfloat16"}, "performance is 'float32' there and 'bfloat16' here"),
    ],
)
def test_another_model_needs_another_epoch(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "a.db"
    with remember(path) as memory:
        ask(memory, 0.0, 0, 1.0)
    for read_only in (False, True):
        with pytest.raises(ValueError, match=message):
            remember(path, read_only=read_only, **changes)
    with remember(path, new_epoch=True, **changes) as memory:
        x = np.zeros((1, *changes.get("shape", (1,))), dtype=np.float32)
        assert memory.consult(x) == [None]
        assert (memory.epoch, memory.attempts, memory.spent) == (2, 0, 0.0)
    with remember(path, **changes) as memory:
        assert (memory.epoch, len(memory.records)) == (2, 0)
    with pytest.raises(ValueError, match="there and"):
        remember(path)
    with sqlite3.connect(path) as raw:   # what was promised before can still be looked up
        kinds = [kind for (kind,) in raw.execute("SELECT kind FROM log ORDER BY number")]
    raw.close()
    assert kinds == ["epoch", "ticket", "record", "epoch"]


def test_a_new_epoch_begins_with_a_new_budget(tmp_path: Path) -> None:
    with remember(tmp_path / "a.db") as memory:
        ask(memory, 0.0, 0, 1.0)
    with remember(tmp_path / "a.db", new_epoch=True) as memory:
        assert ask(memory, 0.0, 1, 2.0) == (1, 2.0, Case.NEW)
        assert memory.records["alpha"].tolist() == [BUDGET.level(1)]
    with remember(tmp_path / "a.db") as memory:
        assert ask(memory, 0.0, 0, 1.0) == (1, 2.0, Case.REPLAYED)
        assert (memory.epoch, memory.attempts) == (2, 1)


DAMAGE = {
    "a radius": ("UPDATE log SET content = substr(content, 1, 60) || x'ff' || substr(content, 62) WHERE number = 3",
                 "entry 3 of the memory is damaged"),
    "a checksum": ("UPDATE log SET crc = crc + 1 WHERE number = 2", "entry 2"),
    "a kind": ("UPDATE log SET kind = 'record' WHERE number = 2", "entry 2"),
    "a ticket": ("UPDATE log SET content = replace(content, ': 1,', ': 0,') WHERE number = 4", "entry 4"),
    "a lost entry": ("DELETE FROM log WHERE number = 3", "entry 4"),
    "a number": ("UPDATE log SET number = 99 WHERE number = 5", "entry 99"),
    "an exchange": ("UPDATE log SET number = CASE number WHEN 3 THEN -3 WHEN 5 THEN 3 ELSE number END", "entry -3"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.db"
    with remember(path) as memory:
        ask(memory, 0.0, 0, 1.0)
        ask(memory, 5.0, 1, 1.0)
    statement, message = DAMAGE[damage]
    raw = sqlite3.connect(path)
    raw.execute(statement)
    raw.commit()
    raw.close()
    with pytest.raises(ValueError, match=message):
        remember(path)
    with pytest.raises(ValueError, match=message):
        remember(path, read_only=True)


def test_promises_that_contradict_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with remember(tmp_path / "a.db") as memory:
        ask(memory, 0.0, 0, 1.0)
        monkeypatch.setattr(CertifiedRegions, "_room", lambda self, rows, apart, label, limit: limit)
        ask(memory, 1.5, 1, 1.0)   # by a library that forgets to trim
        monkeypatch.undo()
    with pytest.raises(ValueError, match="records 0 and 1 promise different classes"):
        remember(tmp_path / "a.db")


def test_files_that_are_no_memory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(ValueError, match="is no memory, or is damaged"):
        remember(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE log (number INTEGER)")
    other.close()
    for read_only in (False, True):
        with pytest.raises(ValueError, match="is a database, but no memory"):
            remember(tmp_path / "other.db", read_only=read_only)
    sqlite3.connect(tmp_path / "empty.db").execute("PRAGMA user_version").connection.close()
    (tmp_path / "empty.db").touch()
    with pytest.raises(ValueError, match="holds no memory"):
        remember(tmp_path / "empty.db", read_only=True)
    with pytest.raises(FileNotFoundError, match="name an existing file"):
        remember(tmp_path / "none.db", read_only=True)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(OSError, match="cannot use the memory"):
        remember(tmp_path / "no" / "folder" / "a.db")
    with pytest.raises(ValueError, match="settings must hold JSON values only"):
        remember(tmp_path / "b.db", settings={"sigma": float("nan")})
    with pytest.raises(TypeError, match="settings must hold JSON values only"):
        remember(tmp_path / "b.db", settings={"sigma": {1}})
    assert not (tmp_path / "b.db").exists()


# ---------------------------------------------------------------------- who may open it


OPEN = """
import sys
from art_rs_plugins.estimators.store import Memory
from art_rs_plugins.theory.regions import EndlessBudget
for read_only in (False, True):
    try:
        Memory(sys.argv[1], shape=(1,), digest="weights 1", budget=EndlessBudget(0.01), read_only=read_only).close()
        print("opened")
    except BlockingIOError as error:
        print("the memory is open elsewhere" in str(error))
"""


def elsewhere(path: Path) -> list[str]:
    """What another process sees: of an attempt to write, and of one to read."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    path = tmp_path / "with spaces, # and ?.db"
    with remember(path) as memory:
        ask(memory, 0.0, 0, 1.0)
        # nobody can hold a copy that goes stale: not for reading, and not in this process
        assert elsewhere(path) == ["True", "True"]
        for read_only in (False, True):
            with pytest.raises(BlockingIOError, match="open elsewhere"):
                remember(path, read_only=read_only)
        assert ask(memory, 0.5, 1, 1.0)[0] == 0
    with remember(path, read_only=True) as one, remember(path, read_only=True) as two:
        assert one.consult(points(0.5)) == two.consult(points(0.5)) != [None]
        assert elsewhere(path) == ["True", "opened"]
        with pytest.raises(ValueError, match="opened to be read"):
            one.ticket()
        with pytest.raises(ValueError, match="opened to be read"):
            ask(one, 9.0, 0, 1.0)
        assert ask(one, 0.5, 1, 1.0)[0] == 0
    assert elsewhere(path) == ["opened", "opened"]
    with pytest.raises(ValueError, match="opened to be read"):
        remember(path, read_only=True, new_epoch=True)
    with remember(path):   # nothing holds it after a refusal
        pass


def test_a_memory_has_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = remember(tmp_path / "a.db")
    ask(memory, 0.0, 0, 1.0)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a memory cannot be copied"):
            duplicate(memory)
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        for call in (lambda: memory.consult(points(0.0)), memory.ticket, lambda: ask(memory, 0.0, 0, 1.0)):
            with pytest.raises(RuntimeError, match="does not survive a fork"):
                call()
    assert ask(memory, 0.0, 1, 1.0)[0] == 0
    memory.close()
    memory.close()
    for call in (lambda: memory.consult(points(0.0)), memory.ticket):
        with pytest.raises(ValueError, match="the memory is closed"):
            call()


FORK = """
import os, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_store import ask, remember
memory = remember(sys.argv[1])
ask(memory, 0.0, 0, 1.0)
child = os.fork()
if child == 0:
    try:
        ask(memory, 5.0, 2, 1.0)
    except RuntimeError:
        memory.close()
        del memory
        sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
ask(memory, 5.0, 1, 1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_no_harm_when_it_ends(tmp_path: Path) -> None:
    """SQLite deletes its log when it closes what it takes for the last connection, and the parent writes on into it."""
    command = [sys.executable, "-c", FORK, str(tmp_path / "a.db"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    with remember(tmp_path / "a.db") as memory:
        assert ask(memory, 0.0, 3, 1.0)[0] == 0
        assert ask(memory, 5.0, 3, 1.0)[0] == 1


# ---------------------------------------------------------------------- crashes


def test_every_write_is_on_the_disk_when_it_is_answered(tmp_path: Path) -> None:
    """The write-ahead log is cut off anywhere, as by a crash: what was answered before the cut is still there."""
    path, seen = tmp_path / "a.db", []
    rng = np.random.default_rng(1)
    with remember(path) as memory:
        assert memory._log._connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert memory._log._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        seen.append((wal(path).stat().st_size, 0, 0))
        for _ in range(40):
            x = rng.integers(-30, 30, 3).astype(np.float32)[:, None]
            memory.answer(x, claims(rng.integers(-1, 3, 3), rng.choice([0.0, 0.5, 2.0], 3)))
            seen.append((wal(path).stat().st_size, len(memory.records), memory.attempts))
        whole, records = wal(path).read_bytes(), memory.records.tobytes()
        shutil.copy(path, tmp_path / "main")
        asked = np.arange(-31.0, 31.0, 0.5, dtype=np.float32)[:, None]
        final = memory.consult(asked)
    sizes = [size for size, _, _ in seen]
    assert sizes == sorted(sizes)
    frame, target = 24 + 4096, tmp_path / "b.db"
    cuts = sorted({*range(32, len(whole) + 1, frame), *range(33, len(whole), 7 * frame // 3), *sizes})
    recovered = set()
    for cut in cuts:
        shutil.copy(tmp_path / "main", target)
        torn = whole[:cut] if cut % 2 else whole[:cut] + bytes(rng.integers(0, 256, 500, dtype=np.uint8))
        wal(target).write_bytes(torn)
        with remember(target) as memory:
            kept = memory.records.tobytes()
            assert records.startswith(kept)
            promised = max((entry for entry in seen if entry[0] <= cut), default=(0, 0, 0))
            assert len(memory.records) >= promised[1]
            assert memory.attempts >= promised[2]
            for now, later in zip(memory.consult(asked), final, strict=True):
                assert now is None or (later is not None and now.prediction == later.prediction)
            recovered.add((len(memory.records), memory.attempts))
        wal(target).unlink(missing_ok=True)
    assert len(recovered) > 25
    assert kept == records   # the last cut cuts nothing


class Faulty:
    """A connection whose disk fails at the n-th statement, before or after it took effect."""

    def __init__(self, connection: sqlite3.Connection, fails_at: int, late: bool) -> None:
        self.connection, self.left, self.late = connection, fails_at, late

    def execute(self, *args):
        return self._run(self.connection.execute, *args)

    def executemany(self, *args):
        return self._run(self.connection.executemany, *args)

    def _run(self, statement, *args):
        self.left -= 1
        if self.left == 0 and not self.late:
            raise sqlite3.OperationalError("disk I/O error")
        done = statement(*args)
        if self.left == 0:
            raise sqlite3.OperationalError("database or disk is full")
        return done

    def close(self) -> None:
        self.connection.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fails_at", range(1, 13))
def test_a_disk_that_fails_makes_no_promise(tmp_path: Path, fails_at: int, late: bool) -> None:
    path = tmp_path / "a.db"
    memory = remember(path)
    memory._log._connection = Faulty(memory._log._connection, fails_at, late)
    given: list[tuple[float, int]] = []

    def talk() -> None:
        for x, label in ((0.0, 0), (5.0, 1), (9.0, 2)):   # three statements for a ticket, three for a commit
            given.append((x, ask(memory, x, label, 1.0)[0]))

    with pytest.raises(OSError, match="cannot use the memory"):
        talk()
    assert len(given) == (fails_at - 1) // 6
    # what was promised is answered, and nothing more is promised
    for x, label in given:
        assert memory.consult(points(x))[0].prediction == label
    with pytest.raises(OSError, match="a write failed, so nobody knows"):
        ask(memory, 20.0, 0, 1.0)
    memory.close()
    with remember(path) as memory:
        for x, label in given:
            assert memory.consult(points(x))[0].prediction == label
        assert len(given) <= len(memory.records) <= len(given) + 1
        assert memory.attempts >= len(memory.records)
        ask(memory, 20.0, 0, 1.0)


WORK = """
import sys, threading, time
import numpy as np
from art_rs_plugins.estimators.store import Memory
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.regions import EndlessBudget
memory = Memory(sys.argv[1], shape=(2,), digest="weights 1", budget=EndlessBudget(0.01))
lock = threading.Lock()

def work(number):
    rng = np.random.default_rng([int(sys.argv[2]), number])

    def sample(rows, alpha):
        time.sleep(rng.exponential(0.002))
        one = np.ones(1, dtype=np.int64)
        return Certificates(
            prediction=rng.integers(0, 3, 1), radius=rng.choice([0.0, 0.7, 3.0], 1), abstained=one < 0,
            p_lower=0.9 * one, p_upper=0.1 * one, count=one, runner_up_count=0 * one, n=one, n0=one, sigma=one,
            alpha=alpha * one, index=0 * one, seed=one, kind="conditional")

    while True:
        x = rng.integers(-30, 30, (1, 2)).astype(np.float32)
        promise = memory.answer(x, sample).promises[0]
        with lock:
            print(x[0, 0], x[0, 1], promise.prediction, promise.radius.hex(), memory.attempts, flush=True)

print("ready", flush=True)
for number in range(4):
    threading.Thread(target=work, args=(number,), daemon=True).start()
time.sleep(60)
"""


def test_a_killed_process_has_kept_what_it_said(tmp_path: Path) -> None:
    path, said, most = tmp_path / "a.db", [], 0
    rng = np.random.default_rng(2)
    for seed in range(3):
        command = [sys.executable, "-c", WORK, str(path), str(seed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3 + 0.3 * rng.random())
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split("\n")[:-1]   # the last one may be torn
        process.wait()
        process.stdout.close()
        assert len(lines) > 10
        for line in lines:
            x, y, prediction, radius, attempts = line.split()
            said.append((np.float32([[float(x), float(y)]]), int(prediction), float.fromhex(radius)))
            most = max(most, int(attempts))
        with remember(path, shape=(2,)) as memory:   # which audits it
            assert memory.attempts >= most
            for point, label, size in said:
                promise = memory.consult(point)[0]
                assert promise is not None
                assert promise.prediction == label
                angle = rng.uniform(0.0, 2.0 * np.pi, 3)
                near = point + size * (1 - 1e-4) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
                found = memory.consult(near.astype(np.float32))
                assert size < 1e-3 or {p.prediction for p in found if p is not None} == {label}
                assert size < 1e-3 or None not in found


# ---------------------------------------------------------------------- threads

Event = tuple[float, float, np.ndarray, Reply]


def broken_promises(history: list[Event]) -> int:
    """Replies that contradict one which had been received before they were asked for."""
    broken = 0
    for _, received, x, earlier in history:
        for asked, _, y, later in history:
            if asked > received:
                first, second = earlier.promises[0], later.promises[0]
                apart = float(np.linalg.norm(x.astype(np.float64) - y))
                if first.record >= 0 and (apart < first.radius or apart == 0.0):
                    broken += second.prediction != first.prediction or second.case is Case.ABSTAINED
    return broken


def crowd(memories: list[Memory], seed: int, queries: int) -> list[Event]:
    """Threads that ask about a small square, where almost everything collides; each thread asks one memory."""
    history: list[Event] = []
    failures: list[BaseException] = []

    def work(number: int) -> None:
        rng = np.random.default_rng([seed, number])
        memory = memories[number % len(memories)]
        try:
            for _ in range(queries):
                x = (rng.integers(-40, 40, (1, 2)) / 8).astype(np.float32)

                def sample(rows: np.ndarray, alpha: float) -> Certificates:
                    time.sleep(rng.exponential(0.002))
                    return claims(rng.integers(-1, 3), rng.choice([0.0, 0.1, 0.4, 1.5]))(rows, alpha)

                asked = time.perf_counter()
                reply = memory.answer(x, sample)
                history.append((asked, time.perf_counter(), x, reply))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return history


def test_threads_see_every_promise_that_was_received(tmp_path: Path) -> None:
    memory = remember(tmp_path / "a.db", shape=(2,))
    history = crowd([memory], 0, 40)
    cases = Counter(promise.case for *_, reply in history for promise in reply.promises)
    assert cases[Case.TRIMMED] > 5
    assert cases[Case.INHERITED] > 50
    assert broken_promises(history) == 0
    sampled = cases[Case.NEW] + cases[Case.TRIMMED] + cases[Case.ABSTAINED]
    assert memory.attempts >= sampled   # and more where a thread came too late
    assert len(memory.records) == cases[Case.NEW] + cases[Case.TRIMMED]
    assert np.all(memory.records["alpha"] <= BUDGET.level(1))
    assert len(set(memory.records["alpha"].tolist())) == len(memory.records)   # each attempt its own share
    memory.close()
    with remember(tmp_path / "a.db", shape=(2,)) as again:   # and the promises are disjoint
        for _, _, x, reply in history:
            if reply.promises[0].record >= 0:
                assert again.consult(x)[0].prediction == reply.promises[0].prediction


def test_two_copies_would_be_caught() -> None:
    replicas = [remember(None, shape=(2,)), remember(None, shape=(2,))]
    assert broken_promises(crowd(replicas, 0, 40)) > 20
    for memory in replicas:
        memory.close()


# ---------------------------------------------------------------------- everything at random

lattice = st.tuples(st.integers(-3, 3), st.integers(-3, 3))


class Restarts(RuleBasedStateMachine):
    """Queries, batches, epochs and restarts; every answer keeps what was promised in its epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(os.environ["PYTEST_STORE"])
        for file in self.folder.iterdir():
            file.unlink()
        self.memory = remember(self.folder / "a.db", shape=(2,))
        self.given: list[tuple[np.ndarray, int, float]] = []
        self.attempts = 0

    @rule(rows=st.lists(st.tuples(lattice, st.integers(-1, 2), st.sampled_from([0.0, 0.5, 1.0, 2.5, 1e300])),
                        min_size=1, max_size=5), together=st.booleans())   # fmt: skip
    def ask(self, rows: list, together: bool) -> None:
        x = np.array([row[0] for row in rows], dtype=np.float32)
        labels, radii = [row[1] for row in rows], [row[2] for row in rows]
        parts = [slice(None)] if together else [slice(i, i + 1) for i in range(len(rows))]
        for part in parts:
            promises = self.memory.answer(x[part], claims(labels[part], radii[part])).promises
            replies = [(y, p.prediction, p.radius) for y, p in zip(x[part], promises, strict=True) if p.record >= 0]
            self.given += replies
            self.check()

    def check(self) -> None:
        for centre, label, radius in self.given:
            for step in (0.0, 1 - 1e-6):
                y = (centre + min(radius, 1e6) * np.array([0.6 * step, -0.8 * step])).astype(np.float32)
                found = self.memory.consult(y[None])[0]
                assert found is not None
                assert found.prediction == label
        assert self.memory.attempts >= self.attempts
        self.attempts = self.memory.attempts

    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        if crash:   # what is on the disk now, without what closing would do
            for name in ("a.db", "a.db-wal"):
                if (self.folder / name).exists():
                    shutil.copy(self.folder / name, self.folder / f"crashed-{name}")
        self.memory.close()
        if crash:
            for name in ("a.db", "a.db-wal"):
                if (self.folder / f"crashed-{name}").exists():
                    (self.folder / f"crashed-{name}").replace(self.folder / name)
        self.memory = remember(self.folder / "a.db", shape=(2,))
        self.check()

    @rule()
    def begin(self) -> None:
        self.memory.close()
        self.memory = remember(self.folder / "a.db", shape=(2,), new_epoch=True)
        self.given, self.attempts = [], 0

    def teardown(self) -> None:
        self.memory.close()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_STORE", str(tmp_path_factory.mktemp("store")))
        yield


TestRestarts = Restarts.TestCase
TestRestarts.settings = settings(max_examples=20, stateful_step_count=10, deadline=None)


# ---------------------------------------------------------------------- alpha


@pytest.mark.slow
def test_whoever_asks_again_and_again_finds_no_lie() -> None:
    """The class is a tie, so every certificate is a lie; asked until it is certified, within one budget."""
    n, streams, budget = 1000, 400, EndlessBudget(0.05)
    rng = np.random.default_rng(8)

    def lies(level) -> int:
        """Streams in which a false certificate was stored; `level` is what the sampler makes of its alpha."""
        stored = 0
        for _ in range(streams):
            memory = remember(None, budget=budget)

            def sample(rows: np.ndarray, alpha: float) -> Certificates:
                bound = clopper_pearson_lower(rng.binomial(n, 0.5), n, level(alpha))
                return claims(0 if bound > 0.5 else -1, 1.0)(rows, alpha)

            for _ in range(20):
                memory.answer(points(0.0), sample)
            stored += len(memory.records) > 0
            memory.close()
        return stored

    assert lies(lambda alpha: alpha) <= allowed(streams, budget.spent(20))
    assert lies(lambda alpha: budget.level(1)) > allowed(streams, budget.spent(20))   # as if records were counted


def test_the_header_says_what_the_promises_depend_on(tmp_path: Path) -> None:
    settings = {"sigma": {"start": 0.25}, "n": 1000}
    with remember(tmp_path / "a.db", settings=settings):
        pass
    with remember(tmp_path / "a.db", settings={"n": 1000, "sigma": {"start": 0.25}}) as memory:
        assert memory.epoch == 1
    raw = sqlite3.connect(tmp_path / "a.db")
    (content,) = raw.execute("SELECT content FROM log WHERE kind = 'epoch'").fetchone()
    raw.close()
    assert json.loads(content) == {
        "format": 1, "digest": "weights 1", "shape": [1], "performance": "float32", "settings": settings,
        "budget": {"type": "EndlessBudget", "alpha": 0.01},
    }   # fmt: skip
