"""The sums that every distance of two activations is made of, over all tokens and over regions of them, in one pass.

Squares of float32 values and differences are exact or rounded once in float64, and cannot overflow it. A sum of n terms
is off by at most n / 8 units in the last place, 2e-12 of it for the logits of a whole vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from harness.fused import kernel

MANY = 1 << 21
"""Values from which on a second core is worth asking: it wakes up in the time that one takes for a third of them."""
SLAB = 1 << 18
"""Values that are brought to another dtype at once."""


@dataclass
class Sums:
    """Of reference r, candidate c and d = c - r, [rows, columns], over some rows; rows: their numbers within the whole.

    by_row [5, rows]: sums of r^2, c^2 and d^2, largest |d| and largest |r|. by_column [2, columns]: sums of r^2 and d^2.
    """

    rows: np.ndarray
    by_row: np.ndarray
    by_column: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether every value of both is finite: a value that is not makes its row's square so."""
        return bool(np.isfinite(self.by_row[:2]).all())


def sums(reference: np.ndarray, candidate: np.ndarray, regions: Sequence[np.ndarray] = ()) -> list[Sums]:
    """Over all rows, then over each region (row numbers). Both [rows, columns] of equal shape and any real dtype.

    Where values are not finite, the sums are not.
    """
    rows, columns = reference.shape
    groups, held = _groups(rows, regions)
    kernel()  # compiled by one thread, not by each
    cores = min(_cores(), rows) if reference.size >= MANY else 1
    by_row, edges = np.zeros((rows, 5)), [rows * part // cores for part in range(cores + 1)]

    def part(start: int, stop: int) -> np.ndarray:
        by_column = np.zeros((2, len(held), columns))
        _add_up(reference[start:stop], candidate[start:stop], groups[start:stop], by_row[start:stop], by_column)
        return by_column

    others = [_pool().submit(part, *edge) for edge in zip(edges[1:-1], edges[2:])] if cores > 1 else []
    by_column = part(0, edges[1])
    for other in others:
        by_column += other.result()
    by_row = np.ascontiguousarray(by_row.T)
    whole = Sums(np.arange(rows), by_row, by_column.sum(axis=1) if len(held) > 1 else by_column[:, 0])
    return [whole, *(Sums(index, by_row[:, index], by_column[:, held[:, number]].sum(axis=1))
                     for number, index in enumerate(regions))]


def _groups(rows: int, regions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that lie in the same regions are one group: group [rows] int64, and which region holds it [groups, regions]."""
    marks = np.zeros(rows, dtype=np.int64)
    if not regions:
        return marks, np.ones((1, 0), dtype=bool)
    for number, index in enumerate(regions):
        marks[index] |= 1 << number
    found, groups = np.unique(marks, return_inverse=True)
    return groups, (found[:, None] >> np.arange(len(regions))) & 1 == 1


def _add_up(reference: np.ndarray, candidate: np.ndarray, groups: np.ndarray, by_row: np.ndarray,
            by_column: np.ndarray) -> None:
    """As `fused.add_up`, of any real dtypes: float16 and float32 as float32, which is exact, all others as float64."""
    kind = np.float32 if {reference.dtype, candidate.dtype} <= {np.dtype(np.float16), np.dtype(np.float32)} else np.float64
    as_they_are = all(array.dtype == kind and array.flags.c_contiguous and array.flags.aligned
                      for array in (reference, candidate))
    step = len(reference) if as_they_are else max(1, SLAB // max(reference.shape[1], 1))
    for start in range(0, len(reference), step):
        rows = slice(start, start + step)
        kernel()(_plain(reference[rows], kind), _plain(candidate[rows], kind), groups[rows], by_row[rows], by_column)


def _plain(array: np.ndarray, kind: type) -> np.ndarray:
    """Of one layout, so that the kernel is compiled for that only."""
    plain = np.require(array, kind, ["C", "A"]).view()
    plain.flags.writeable = False
    return plain


def _cores() -> int:
    """As many as the user lets torch have, or as there are."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0)) \
        if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="sums")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
