"""The sums that every distance of two activations is made of, in one pass over both, in float64.

Tiles of both are brought to float64 in buffers that stay in a core's own cache, and every sum is taken there, so that
memory is read once; each core has rows of its own. Squares of float32 values and differences are exact or rounded once
in float64, and cannot overflow it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

TILE = 1 << 15
"""Values in a tile: two float64 buffers of 256 KiB."""
WIDE = 1 << 13
"""Columns in a tile."""
MANY = 1 << 19
"""Values from which on a second core is worth asking."""


@dataclass
class Sums:
    """Of reference r, candidate c and d = c - r, [rows, columns]: squares by row and column, and the largest values."""

    row_rr: np.ndarray
    row_cc: np.ndarray
    row_dd: np.ndarray
    col_rr: np.ndarray
    col_dd: np.ndarray
    max_abs: float = -1.0
    max_abs_at: int = 0
    reference_max: float = 0.0

    @classmethod
    def empty(cls, rows: int, columns: int) -> Sums:
        """Zeros."""
        return cls(*(np.zeros(rows) for _ in range(3)), np.zeros(columns), np.zeros(columns))

    @property
    def finite(self) -> bool:
        """Whether every value of both is finite: a value that is not makes its row's square so."""
        return bool(np.isfinite(self.row_rr).all() and np.isfinite(self.row_cc).all())


def sums(reference: np.ndarray, candidate: np.ndarray) -> Sums:
    """Both [rows, columns] of equal shape and any real dtype. Where values are not finite, the sums are not."""
    rows, columns = reference.shape
    cores = min(_cores(), rows) if reference.size >= MANY else 1
    total = Sums.empty(rows, columns)
    edges = [rows * part // cores for part in range(cores + 1)]
    parts = [(start, stop) for start, stop in zip(edges, edges[1:])]
    run = map if cores == 1 else _pool().map
    with np.errstate(invalid="ignore", over="ignore"):
        found = list(run(lambda part: _part(reference[slice(*part)], candidate[slice(*part)]), parts))
    for (start, stop), part in zip(parts, found):
        for name in ("row_rr", "row_cc", "row_dd"):
            getattr(total, name)[start:stop] = getattr(part, name)
        total.col_rr += part.col_rr
        total.col_dd += part.col_dd
        if part.max_abs > total.max_abs:
            total.max_abs, total.max_abs_at = part.max_abs, start * columns + part.max_abs_at
        total.reference_max = max(total.reference_max, part.reference_max)
    return total


def _part(reference: np.ndarray, candidate: np.ndarray) -> Sums:
    """The same on one core."""
    rows, columns = reference.shape
    width = min(columns, WIDE)
    height = max(1, min(rows, TILE // width))
    held, other = np.empty(height * width), np.empty(height * width)
    out, largest, most = Sums.empty(rows, columns), -1.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for row, column, tile in _tiles(rows, columns, height, width):
            shape = (tile[0].stop - row, tile[1].stop - column)
            r, c = (buffer[:shape[0] * shape[1]].reshape(shape) for buffer in (held, other))
            np.copyto(r, reference[tile], casting="unsafe")
            np.copyto(c, candidate[tile], casting="unsafe")
            # Dot products of at most WIDE values, which BLAS takes in one thread, and four times as fast as einsum.
            out.row_cc[tile[0]] += np.matmul(c[:, None, :], c[:, :, None]).ravel()
            np.subtract(c, r, out=c)
            np.multiply(c, c, out=c)
            np.multiply(r, r, out=r)
            out.row_dd[tile[0]] += c.sum(axis=1)
            out.row_rr[tile[0]] += r.sum(axis=1)
            out.col_dd[tile[1]] += c.sum(axis=0)
            out.col_rr[tile[1]] += r.sum(axis=0)
            most = max(most, float(r.max()))
            place = divmod(int(c.argmax()), shape[1])
            if c[place] > largest:
                largest, out.max_abs_at = float(c[place]), (row + place[0]) * columns + column + place[1]
    # The root of a float32 value's square in float64 is that value; of a difference it is right to the last bit or so.
    out.max_abs, out.reference_max = float(np.sqrt(largest)) if largest >= 0 else -1.0, float(np.sqrt(most))
    return out


def _tiles(rows: int, columns: int, height: int, width: int) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield row, column, (slice(row, min(row + height, rows)), slice(column, min(column + width, columns)))


def _cores() -> int:
    """As many as the user lets torch have, or as there are."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0)) \
        if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="sums")
