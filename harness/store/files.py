"""Files that appear whole or not at all, the safetensors format, and the sentences for a disk that fails."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from harness.errors import HarnessError
from harness.store.identity import AGAIN

_TEMPORARY = ".tmp-"
_DTYPES = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64", "uint8": "U8"}


def safe_name(name: Any) -> str:
    """The name, if it is a single plain path component; HarnessError for anything that could leave a directory."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise HarnessError(f"{name!r} cannot name a file", fix="use letters, digits, '.', '_' and '-'")
    return name


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON types atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    with disk_errors(path.parent, len(text)):
        _replace(path, lambda file: file.write(text))


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Write arrays of float32, float64, int32 or int64 atomically; returns dtype, shape and sha256 by name."""
    with disk_errors(path.parent, sum(array.nbytes for array in arrays.values())):
        digests = _replace(path, lambda file: _dump(file, arrays))
    return {name: {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digests[name]}
            for name, array in arrays.items()}


def read_tensors(path: Path, records: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays, each checked against its record. Raises HarnessError naming file and tensor that changed."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise HarnessError(f"the record is damaged or missing ({error})", where=path, fix=AGAIN) from error
    for name, array in arrays.items():
        found = {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": sha256(array)}
        if found != records[name]:
            raise HarnessError("its bytes changed since it was recorded (sha256 differs)", where=f"{path}: {name}",
                               fix=AGAIN)
    return arrays


def sha256(array: np.ndarray) -> str:
    """Digest of the values in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def clean(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    for leftover in folder.rglob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def lock(folder: Path) -> int:
    """Hold a directory for writing; the system lets go of it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise HarnessError("another process is recording into this oracle", where=folder,
                           fix="wait for it, or record elsewhere") from error
    return handle


@contextmanager
def disk_errors(where: Path, needed: int = 0) -> Iterator[None]:
    """Turn the failures of a disk into one sentence; `needed` is the size in bytes of what is being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise HarnessError(f"cannot be written ({error.strerror})", where=where) from error
        free = shutil.disk_usage(next(place for place in (where, *where.absolute().parents) if place.exists())).free
        raise HarnessError(f"no space left on the disk: the next file needs {needed / 2**20:.1f} MiB, "
                           f"{free / 2**20:.1f} MiB are free", where=where,
                           fix="make space (or room for files: `df -i`), or record elsewhere; finished cases are kept") from error


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> Any:
    """Write beside `path`, flush to disk, rename into place; nothing is left where that fails."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def _dump(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The safetensors format (8-byte length, JSON header padded to 8 bytes, data); returns sha256 by name.

    Written here, array by array, because the library's writer holds a second copy of everything.
    """
    header, end = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape),
                        "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    digests = {}
    for name, array in arrays.items():
        whole = np.ascontiguousarray(array)
        digests[name] = sha256(whole)
        file.write(whole.data)
    return digests
