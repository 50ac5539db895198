"""Files beside one another: written whole or not at all, strict JSON, and digests of what they depend on."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

if sys.platform != "win32":
    import fcntl

__all__ = [
    "check_folder",
    "companion",
    "digest",
    "digest_rows",
    "json_bytes",
    "load_json",
    "lock",
    "make_folder",
    "unwritable",
    "write_atomic",
]

logger = logging.getLogger(__name__)


def companion(path: str | Path, what: str) -> Path:
    """Path of the JSON file that belongs to a record: ``run.tsv`` has ``run.manifest.json`` and ``run.audit.json``."""
    record = Path(path)
    return record.with_name(f"{record.name.removesuffix('.tsv')}.{what}.json")


def digest(value: NDArray[Any] | bytes | str | Path) -> str:
    """SHA-256 in hexadecimal of an array (dtype, shape and values), of bytes, or of the contents of a file.

    Examples
    --------
    >>> digest(b"")[:8]
    'e3b0c442'
    """
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, str | Path):
        with open(value, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if value.dtype.hasobject:
        raise TypeError(f"value has dtype {value.dtype}, whose bytes say nothing; convert it to numbers first")
    header = f"{value.dtype} {value.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(value).tobytes()).hexdigest()


def digest_rows(array: Any, rows: NDArray[np.int64], *, step: int = 256) -> str:
    """Digest of ``array[rows]``, which is read a `step` of rows at a time: for arrays that do not fit into memory."""
    total = hashlib.sha256(f"{array.dtype} {(len(rows), *array.shape[1:])} ".encode())
    for first in range(0, len(rows), step):
        total.update(np.ascontiguousarray(array[rows[first : first + step]]).tobytes())
    return total.hexdigest()


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that it is there in full or not at all; its folder is made if need be.

    Raises
    ------
    OSError
        Where the folder cannot be made or written; the message says what to do.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write a file over a folder; name a file in it", str(target))
    make_folder(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(target: Path) -> None:
    """Make the folder of a file; ``OSError`` that names the file and what to do."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target, error) from error


def unwritable(target: Path, error: OSError) -> OSError:
    """The same error, with the file's name and what to do about it."""
    reason = f"cannot write here ({error.strerror or error}); choose an output path in a folder that you may write to"
    return type(error)(error.errno, reason, str(target))


def lock(stream: BinaryIO, path: Path) -> None:
    """Keep every other process from locking an open file until it is closed, or this process ends.

    Raises
    ------
    BlockingIOError
        If another process has locked it.
    """
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        reason = "another process is writing this record; wait until it ends, or choose another output path"
        raise BlockingIOError(error.errno, reason, str(path)) from error
    except OSError as error:   # some network file systems know no locks
        logger.warning("%s cannot be locked (%s); let one process alone write it", path, error.strerror or error)


def json_bytes(value: Mapping[str, Any], name: str) -> bytes:
    """Strict JSON in UTF-8, or an error that names the argument `name`."""
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must hold JSON values only, and no NaN or infinity: {error}") from error


def load_json(path: Path) -> dict[str, Any]:
    """JSON object in a file; ``ValueError`` that names the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it, or delete it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}; restore or delete it")
    return dict(value)


def check_folder(output: Path) -> None:
    """Make the folder of a file, or raise ``OSError`` that says what stands in the way, before any work is done."""
    if output.is_dir():
        raise IsADirectoryError(f"output {output} is a folder; give the name of a file in it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.parent / f".{output.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"output {output} cannot be written ({error}); choose a folder that can be") from error
