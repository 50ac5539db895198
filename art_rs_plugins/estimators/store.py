"""A memory on disk: a promise is written and flushed to the disk before it is given.

SQLite holds one append-only log of epochs, tickets and records. Everything is read and checked when it is opened, and
answered from `CertifiedRegions` in main memory after that.
"""

from __future__ import annotations

import ctypes
import errno
import json
import operator
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.regions import Budget, Case, CertifiedRegions, Promise
from art_rs_plugins.theory.search import Rows, as_points

__all__ = ["Log", "Memory", "Reply", "Ticket"]

_FORMAT = 1
_APPLICATION = 0x52534D31   # marks the file as ours
_TABLE = """CREATE TABLE log (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, content BLOB NOT NULL,
    crc INTEGER NOT NULL, written TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)"""

_INTEGERS = ("prediction", "count", "runner_up_count", "n", "n0", "index", "seed")
_REALS = ("radius", "p_lower", "p_upper", "sigma", "alpha")
FACTS = np.dtype([(name, "<i8") for name in _INTEGERS] + [(name, "<f8") for name in (*_REALS, "raw_radius")])
"""Numbers of a record beside its centre; ``radius`` is promised, ``raw_radius`` was certified."""

Entry = tuple[str, bytes]
"""Kind and content of one entry of a log."""


class Log:
    """Append-only log in one SQLite file, with a checksum of each entry and of all before it.

    Parameters
    ----------
    path : path or None
        The file, on a local disk; None keeps the log in main memory, where it ends with the process.
    read_only : bool
        Open an existing log without writing to it.

    Raises
    ------
    BlockingIOError
        If the log is open elsewhere: one writer excludes everybody else, in this process or another.
    FileNotFoundError
        If it is to be read only and is not there.
    ValueError
        If the file is no log, or is damaged.
    OSError
        If it cannot be opened or written.

    Notes
    -----
    *Guarantee.* When `append` returns, its entries are on the disk (WAL mode, synchronous=FULL). After a crash, a log
    holds the entries of all calls that returned, and of no call a part: SQLite drops a torn tail. Later damage is found
    by the checksums, except at the end of SQLite's own ``-wal`` file, where it looks like a torn tail; closing the log
    empties that file, and only then may the log be copied.
    """

    def __init__(self, path: str | Path | None, *, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        if read_only and (path is None or not Path(path).exists()):
            raise FileNotFoundError(errno.ENOENT, "there is no memory to be read; name an existing file", str(path))
        where = ":memory:" if path is None else f"{Path(path).absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        self._crc, self._length, self._process = 0, 0, os.getpid()
        with self._errors():
            self._connection = sqlite3.connect(
                where, uri=path is not None, timeout=0, isolation_level=None, check_same_thread=False
            )
        _OPEN.add(self)
        try:
            with self._errors():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        run = self._connection.execute
        if not self.read_only:
            # Exclusive before anything is read: no other process can hold a copy that goes stale.
            for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "fullfsync=ON"):
                run(f"PRAGMA {setting}")
        run("BEGIN" if self.read_only else "BEGIN IMMEDIATE")
        tables = [name for (name,) in run("SELECT name FROM sqlite_master")]
        if tables and (tables != ["log"] or run("PRAGMA application_id").fetchone()[0] != _APPLICATION):
            raise ValueError(f"{self.path} is a database, but no memory; choose another path")
        if not tables and self.read_only:
            raise ValueError(f"{self.path} holds no memory; it was never opened for writing")
        if not tables:
            run(f"PRAGMA application_id={_APPLICATION}")
            run(_TABLE)
        if not self.read_only:   # a reader keeps its transaction, so that no writer can come after it
            run("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what an error of SQLite means here."""
        try:
            yield
        except sqlite3.Error as error:
            name, text = str(self.path), str(error)
            if "locked" in text:
                what = "the memory is open elsewhere, and a second copy would break promises; close that one, or ask it"
                raise BlockingIOError(errno.EAGAIN, what, name) from error
            if isinstance(error, sqlite3.OperationalError):
                what = f"cannot use the memory ({text}); it needs a local disk that can be written and has space"
                raise OSError(errno.EIO, what, name) from error
            what = f"{name} is no memory, or is damaged ({text}); restore it from a copy, or choose another path"
            raise ValueError(what) from error

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that opened the log, and must leave it alone."""
        return os.getpid() != self._process

    def read(self) -> Iterator[Entry]:
        """Yield all entries in order, each checked; ``ValueError`` at the first that is damaged."""
        self._crc, self._length = 0, 0
        query = "SELECT number, CAST(kind AS BLOB), CAST(content AS BLOB), crc FROM log ORDER BY number"
        with self._errors():
            for number, kind, content, crc in self._connection.execute(query):
                self._length += 1
                self._crc = _checksum(self._crc, kind, content)
                if number != self._length or crc != self._crc:
                    raise ValueError(f"{self.path}: entry {number} of the memory is damaged; restore it from a copy")
                yield kind.decode(), content

    def append(self, entries: Sequence[Entry]) -> None:
        """Write entries, all or none; they are on the disk when it returns. `read` must have come to its end before."""
        crc, rows = self._crc, []
        for number, (kind, content) in enumerate(entries, start=self._length + 1):
            crc = _checksum(crc, kind.encode(), content)
            rows.append((number, kind, content, crc))
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT INTO log (number, kind, content, crc) VALUES (?, ?, ?, ?)", rows)
            self._connection.execute("COMMIT")
        self._crc, self._length = crc, self._length + len(rows)

    def close(self) -> None:
        """Close the file, so that it can be opened elsewhere."""
        if not self.forked:
            self._connection.close()


_OPEN: weakref.WeakSet[Log] = weakref.WeakSet()


def _abandon() -> None:
    """In a forked process: never free the copies of connections, since SQLite would delete the log of the parent."""
    for log in _OPEN:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(log._connection))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon)


def _checksum(crc: int, kind: bytes, content: bytes) -> int:
    return crc32(content, crc32(kind, crc))


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to draw estimation noise for `count` inputs, each certified at failure probability `alpha`."""

    first: int
    count: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What the memory answers for b inputs.

    Attributes
    ----------
    certificates : Certificates
        Of kind ``committed``. Sigma, bounds, votes, alpha and seed are those of the record behind each promise.
    promises : tuple of Promise
        How each came about, and its record.
    epoch : int
        Promises hold within their epoch.
    """

    certificates: Certificates
    promises: tuple[Promise, ...]
    epoch: int


class Memory:
    r"""Keeps promises: every later query inside a ball that was promised is answered with its class.

    Parameters
    ----------
    path : path or None
        File of the memory, made if need be; None for one that ends with the process.
    shape : tuple of int
        Shape of one input.
    digest : str
        Digest of all that decides votes: weights, preprocessing, the network's code.
    budget : Budget
        How alpha is divided among attempts, such as ``EndlessBudget(0.001)``.
    settings : mapping of JSON values, optional
        What else must not change within an epoch.
    performance : str
        How the network computes when it votes; see `Certificates`.
    read_only : bool
        Answer from what is promised already, and promise nothing.
    new_epoch : bool
        End all promises and begin a new epoch, with a new budget: for another model, or other settings.

    Raises
    ------
    ValueError
        If the memory belongs to another model or other settings, is damaged, or holds promises that contradict.
    OSError
        As `Log`.

    Notes
    -----
    *Guarantee.* (1) After a reply (c, r) at x, every query of the same epoch that begins later and is closer to x than
    r is answered c, across crashes and restarts; no probability is involved. (2) With probability at least 1 - alpha of
    the budget, over the draws of all attempts, every record's class is that of the smoothed classifier frozen at the
    record's sigma, everywhere within its raw radius. Inputs may depend on earlier answers, if the noise is fresh, from
    the entropy of the system. *No guarantee:* about queries before the promise, and so against an attacker who asks
    first; that a class is true.

    One process at a time, any number of its threads, no forks. The disk must be local and honest about flushing, and of
    two copies of the file only one may be opened again. Inputs are stored as they are, and nothing is ever deleted:
    whoever may ask can fill it, and place balls.

    *Source.* Alfarra et al. (2022), "Data-Dependent Randomized Smoothing", UAI; see `CertifiedRegions`.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        shape: tuple[int, ...],
        digest: str,
        budget: Budget,
        settings: Mapping[str, Any] | None = None,
        performance: str = "float32",
        read_only: bool = False,
        new_epoch: bool = False,
    ) -> None:
        self._regions, self._facts = CertifiedRegions(shape), Rows(FACTS)
        self._budget, self._performance = budget, performance
        self._lock = threading.Lock()
        self._attempts, self._epoch, self._tickets = 0, 0, set[Ticket]()
        self._closed = self._failed = False
        header = {
            "format": _FORMAT,
            "digest": digest,
            "shape": list(self._regions.shape),
            "budget": {"type": type(budget).__name__, **asdict(budget)},   # type: ignore[call-overload]
            "performance": performance,
            "settings": dict(settings or {}),
        }
        try:
            content = json.dumps(header, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise type(error)(f"settings must hold JSON values only, and no NaN or infinity: {error}") from error
        self._log = Log(path, read_only=read_only)
        try:
            known, records = self._last_epoch()
            if known is None or new_epoch:
                self._begin(content)
            elif json.loads(known) != json.loads(content):
                raise ValueError(_difference(path, json.loads(known), json.loads(content)))
            else:
                self._load(records)
        except BaseException:
            self._log.close()
            raise

    def _last_epoch(self) -> tuple[bytes | None, list[bytes]]:
        """Header and records of the last epoch; None where there is none."""
        header, records = None, list[bytes]()
        for kind, content in self._log.read():
            if kind == "epoch":
                header, records = content, []
                self._epoch, self._attempts = self._epoch + 1, 0
            elif kind == "ticket":
                self._attempts += json.loads(content)["count"]
            else:
                records.append(content)
        return header, records

    def _begin(self, header: bytes) -> None:
        with self._held(writing=True):
            self._log.append([("epoch", header)])
            self._attempts, self._epoch = 0, self._epoch + 1

    def _load(self, records: list[bytes]) -> None:
        """Learn the promises of an epoch, and check that none contradicts another."""
        for start in range(0, len(records), 1000):
            some = records[start : start + 1000]
            facts = np.array([np.frombuffer(content, FACTS, 1)[0] for content in some])
            points = np.stack([np.frombuffer(content, "<f4", offset=FACTS.itemsize) for content in some])
            self._remember(points, facts)
        self._regions.audit()

    def _remember(self, points: NDArray[np.float32], facts: NDArray[Any]) -> None:
        made = [
            Promise(int(fact["prediction"]), float(fact["radius"]), Case.NEW, record)
            for record, fact in enumerate(facts, start=len(self._regions))
        ]
        self._regions.insert(points.reshape(-1, *self._regions.shape), made)
        self._facts.extend(facts)

    # ------------------------------------------------------------------ what it knows

    @property
    def regions(self) -> CertifiedRegions:
        """The balls; to be read only while nobody commits, such as from a memory that is opened to be read."""
        return self._regions

    @property
    def records(self) -> NDArray[Any]:
        """Numbers of all records, shape (M,), with the fields of `FACTS`."""
        return self._facts.all

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 1."""
        return self._epoch

    @property
    def attempts(self) -> int:
        """Attempts that alpha was spent on, in this epoch."""
        return self._attempts

    @property
    def spent(self) -> float:
        """Failure probability that was spent in this epoch."""
        return self._budget.spent(self._attempts) if self._attempts else 0.0

    # ------------------------------------------------------------------ questions

    def consult(self, x: ArrayLike) -> list[Promise | None]:
        """What is promised at b inputs already; None where nothing is. It costs no alpha."""
        with self._held():
            return self._regions.covering(x)

    def ticket(self, count: int = 1) -> Ticket:
        """Take leave to draw estimation noise for `count` inputs; on the disk before it is given.

        Raises
        ------
        ValueError
            If the budget is exhausted, or the memory is read only or closed.
        OSError
            If the disk refuses; nothing further is promised then, until the memory is opened anew.
        """
        with self._held(writing=True):
            first, number = self._attempts + 1, operator.index(count)
            ticket = Ticket(first, number, self._budget.level(first, number))
            with self._writing():
                self._log.append([("ticket", json.dumps(asdict(ticket)).encode())])
                self._attempts += number
            self._tickets.add(ticket)
            return ticket

    def commit(self, x: ArrayLike, certificates: Certificates, ticket: Ticket) -> list[Promise]:
        """Promise what can be promised at b inputs, whose certificates were sampled outside any lock.

        Meanwhile another thread may have promised something: that is kept. See `CertifiedRegions.settle`.

        Parameters
        ----------
        x : array_like of float, shape (b, *shape)
            Inputs, as the network saw them.
        certificates : Certificates
            Of these inputs, with noise that was drawn after `ticket` was taken, at its alpha.
        ticket : Ticket
            Good for one commit.

        Returns
        -------
        list of Promise
            On the disk.

        Raises
        ------
        ValueError, TypeError
            If ticket, x and certificates do not fit, or the memory is read only or closed.
        OSError
            As `ticket`.
        """
        with self._held(writing=True):
            if ticket not in self._tickets:
                raise ValueError(f"{ticket} was not issued by this memory, or was used; take a ticket for each attempt")
            self._tickets.remove(ticket)
            self._check_certificates(certificates, ticket)
            promises = self._regions.settle(x, certificates)
            fresh = [row for row, promise in enumerate(promises) if promise.is_record]
            fresh.sort(key=lambda row: promises[row].record)
            if fresh:
                facts = _facts(certificates)[fresh]
                facts["radius"] = [promises[row].radius for row in fresh]
                points = as_points(x, self._regions.shape)[fresh]
                contents = [facts[i].tobytes() + points[i].astype("<f4").tobytes() for i in range(len(fresh))]
                with self._writing():
                    self._log.append([("record", content) for content in contents])
                    self._remember(points, facts)
            return promises

    def answer(
        self,
        x: ArrayLike,
        sample: Callable[[NDArray[np.int64], float], Certificates],
        *,
        indices: ArrayLike | None = None,
    ) -> Reply:
        """Answer b inputs: from memory where something is promised, and by sampling and a new promise elsewhere.

        Parameters
        ----------
        x : array_like of float, shape (b, *shape)
            Inputs, as the network sees them.
        sample : callable
            ``sample(rows, alpha)`` certifies the inputs at positions `rows`, in l2, each at failure probability
            `alpha`, with noise from fresh entropy, keyed by ``indices[rows]``. It is called at most once, outside any
            lock, and may choose sigma for each input with noise of its own.
        indices : array_like of int, shape (b,), optional
            Index of each input; its position by default.

        Returns
        -------
        Reply

        Raises
        ------
        ValueError, TypeError
            If something does not fit; as `ticket` and `commit`.
        OSError
            As `ticket`.

        Notes
        -----
        *Guarantee.* That of the class. Inputs that come together are settled as a set, whatever their order; for the
        answers of a queue, ask one at a time.
        """
        promises = self.consult(x)
        names = np.arange(len(promises)) if indices is None else np.asarray(indices)
        if names.shape != (len(promises),):
            raise ValueError(f"indices must have shape ({len(promises)},), got {names.shape}")
        facts = np.zeros(len(promises), dtype=FACTS)
        rows = np.flatnonzero([promise is None for promise in promises])
        if len(rows):
            ticket = self.ticket(len(rows))
            sampled = sample(rows, ticket.alpha)
            if not np.array_equal(sampled.index, names[rows]):
                raise ValueError(f"sample must return certificates of the inputs {names[rows]}, got {sampled.index}")
            settled = self.commit(np.asarray(x)[rows], sampled, ticket)
            facts[rows] = _facts(sampled)
            for row, promise in zip(rows, settled, strict=True):
                promises[row] = promise
        return self._reply([promise for promise in promises if promise is not None], facts, names)

    def _reply(self, promises: list[Promise], facts: NDArray[Any], names: NDArray[Any]) -> Reply:
        """What is promised, with the facts of the records behind it; of the certificates where there is none."""
        kept = np.array([promise.record for promise in promises], dtype=np.int64)
        with self._held():
            facts[kept >= 0] = self._facts.all[kept[kept >= 0]]
        facts["prediction"] = [promise.prediction for promise in promises]
        facts["radius"] = [promise.radius for promise in promises]
        facts["index"] = names
        numbers: dict[str, Any] = {name: facts[name] for name in (*_INTEGERS, *_REALS)}
        certificates = Certificates(
            **numbers, abstained=kept < 0, kind="committed", performance=self._performance
        )
        return Reply(certificates, tuple(promises), self._epoch)

    def close(self) -> None:
        """Close the file; the memory answers nothing after that, since another process may then promise something."""
        if not self._log.forked:
            with self._lock:
                self._closed = True
                self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a memory cannot be copied, since two would give different promises; open its path again")

    # ------------------------------------------------------------------ under the lock

    @contextmanager
    def _held(self, *, writing: bool = False) -> Iterator[None]:
        if self._log.forked:   # and the lock may have been held when it was
            raise RuntimeError(
                "a memory does not survive a fork: its copies would give different promises; "
                "open it in one process and ask that one"
            )
        with self._lock:
            if self._closed:
                raise ValueError("the memory is closed; open it again")
            if writing and self._log.read_only:
                raise ValueError("the memory was opened to be read; open it for writing, where nobody else has it")
            if writing and self._failed:
                what = "a write failed, so nobody knows what is on the disk; close the memory and open it again"
                raise OSError(errno.EIO, what, str(self._log.path))
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._failed = True   # unless it ends well
        yield
        self._failed = False

    def _check_certificates(self, certificates: Certificates, ticket: Ticket) -> None:
        if len(certificates) > ticket.count:
            raise ValueError(f"the ticket is for {ticket.count} certificates, got {len(certificates)}")
        if np.any(certificates.alpha > ticket.alpha):
            raise ValueError(f"certificates may spend alpha={ticket.alpha} each, got {certificates.alpha.max()}")
        if certificates.kind == "committed" or certificates.performance != self._performance:
            raise ValueError(
                f"certificates must be sampled, with the network in {self._performance}; "
                f"got {certificates.kind} ones in {certificates.performance}"
            )


def _facts(certificates: Certificates) -> NDArray[Any]:
    facts = np.zeros(len(certificates), dtype=FACTS)
    for name in (*_INTEGERS, *_REALS):
        facts[name] = getattr(certificates, name)
    facts["raw_radius"] = certificates.radius
    return facts


def _difference(path: str | Path | None, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    parts = [f"{name} is {theirs.get(name, 'absent')!r} there and {ours.get(name, 'absent')!r} here" for name in names]
    return (
        f"{path} keeps promises of another model or other settings: {'; '.join(parts)}. "
        "Choose another path, or end those promises by a new epoch"
    )
