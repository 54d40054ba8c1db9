"""A large trace, laid down in a file without a name: read back array by array, gone with the process that made it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np

from harness.errors import HarnessError
from harness.trace import Trace

LARGE = 64 << 20
"""Bytes of a trace from which on it is not kept in memory."""


class Shelf(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for and not kept. Raises HarnessError where the disk fails."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(prefix="harness-trace-")
            for name, array in arrays.items():
                self._places[name] = self._file.tell(), array.dtype, array.shape
                np.ascontiguousarray(array).tofile(self._file)
            self._file.flush()
        except OSError as error:
            raise HarnessError(f"no room for a trace of {sum(array.nbytes for array in arrays.values()) / 1e6:.0f} MB "
                               f"({error.strerror})", where=tempfile.gettempdir(), fix="set TMPDIR to a larger disk") from error

    def __getitem__(self, name: str) -> np.ndarray:
        offset, dtype, shape = self._places[name]
        array = np.empty(shape, dtype)
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not got:
                raise HarnessError("a trace that was laid down is cut off", where=tempfile.gettempdir())
            done += got
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def laid_down(trace: Trace) -> Trace:
    """The same trace; a large one on a shelf."""
    if sum(array.nbytes for array in trace.arrays.values()) < LARGE:
        return trace
    return Trace(Shelf(trace.arrays), trace.facts)
