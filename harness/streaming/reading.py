"""Reading a checkpoint tensor by tensor into float32, in memory that does not grow with the checkpoint.

Files are read, not mapped: a mapped file that someone truncates kills the process with a bus error, where a short read
is a sentence; and pages of a mapping count as this process's memory until they are unmapped. A tensor goes through a
buffer of a few MiB that stays in the processor's cache, so it is read once and written once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.checkpoint import Checkpoint, safetensors_header
from harness.errors import HarnessError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BUFFER = 4 << 20
"""Bytes read at a time."""
PIECE = 1 << 15
"""Values widened at a time: torch does not start threads for fewer, which would fight those that compute."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, dtype, shape, and byte offset in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class WeightReader:
    """Tensors of a checkpoint as float32. Several threads may read at once.

    Raises HarnessError for a missing or truncated shard, a dtype that is no float, and a file that changes while the
    reader is open.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.root, self._local = checkpoint.root, threading.local()
        self._entries: dict[str, Entry] = {}
        self._handles: dict[Path, int] = {}
        for path in checkpoint.files:
            header = safetensors_header(path)
            base = path.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise HarnessError(f"is stored as {entry['dtype']}, known are {', '.join(DTYPES)}", where=name)
                self._entries[name] = Entry(path, DTYPES[entry["dtype"]], tuple(entry["shape"]),
                                            base + entry["data_offsets"][0])
            self._handles[path] = os.open(path, os.O_RDONLY)
        self._checkpoint = checkpoint

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is stored."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def check(self) -> None:
        """Raises HarnessError where a file was changed since the checkpoint was opened: its digest is of other bytes."""
        self._checkpoint.unchanged()

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        return self._entry(name).dtype

    def fill(self, name: str, target: Tensor, first: int = 0) -> None:
        """Rows first.. of a tensor into `target` (on the CPU, contiguous, as many rows as it has), widened to its dtype."""
        entry = self._entry(name)
        row = int(np.prod(entry.shape[1:], dtype=np.int64))
        size = entry.dtype.itemsize
        flat, place, end = target.view(-1), entry.offset + first * row * size, target.numel()
        if target.dtype == entry.dtype:
            self._read_into(entry, place, memoryview(flat.view(torch.uint8).numpy()))
            return
        for start in range(0, end, BUFFER // size):
            values = self._read(entry, place + start * size, min(BUFFER // size, end - start))
            for piece in range(0, len(values), PIECE):
                part = values[piece:piece + PIECE]
                flat[start + piece:start + piece + len(part)].copy_(part)

    def stored(self, name: str, first: int, count: int) -> Tensor:
        """Values first..first + count of the flattened tensor in its stored dtype; valid until this thread reads again."""
        entry = self._entry(name)
        return self._read(entry, entry.offset + first * entry.dtype.itemsize, count)

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """The named rows [len(ids), ...] float32 of a table."""
        entry = self._entry(name)
        target = torch.empty((len(ids), *entry.shape[1:]), dtype=torch.float32)
        for place, row in enumerate(ids):
            self.fill(name, target[place:place + 1], int(row))
        self.check()
        return target

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise HarnessError("the checkpoint has no such tensor", where=f"{self.root}: {name}")
        return self._entries[name]

    def _read(self, entry: Entry, offset: int, count: int) -> Tensor:
        buffer = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = torch.empty(BUFFER, dtype=torch.uint8)
        view = memoryview(buffer.numpy())[:count * entry.dtype.itemsize]
        self._read_into(entry, offset, view)
        return buffer[:len(view)].view(entry.dtype)

    def _read_into(self, entry: Entry, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._handles[entry.path], [view[done:]], offset + done)
            except OSError as error:
                raise HarnessError(f"cannot be read ({error.strerror})", where=entry.path) from error
            if not got:
                raise HarnessError("ends before its header says: truncated while it was read", where=entry.path,
                                   fix="download the shard again and run the same command to go on")
            done += got

