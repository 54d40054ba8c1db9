"""Loops over activations, compiled: every sum of the distances of two in float64 while memory is read once, and the sparse
projection of one.

numpy takes such sums in passes over blocks, some ten times as slow as memory is read. numba compiles the loop on first
use, for the processor at hand, and keeps the code where it may write: beside this file, else in the user's cache
(NUMBA_CACHE_DIR), else nowhere. What it keeps is trusted as the interpreter trusts a `.pyc` in the same place; it is
written under another name and renamed, so several processes may compile at once.

Of IEEE arithmetic only the order of sums and fused multiply-add are given up: NaN and infinity go through as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

WIDE = 1 << 14
"""Columns in a tile: their sums, 256 KiB, stay in a core's own cache."""


@cache
def kernel() -> Callable[..., None]:
    """`add_up`, compiled: once two seconds for each machine, and in each process half of one to load numba and the code."""
    def try_out(compiled: Callable[..., None]) -> None:
        for kind in (np.float32, np.float64):
            ones = np.ones((1, 1), kind)
            ones.flags.writeable = False
            compiled(ones, ones, np.zeros(1, np.int64), np.zeros((1, 5)), np.zeros((2, 1, 1)))

    return _compiled(add_up, try_out)


@cache
def scatterer() -> Callable[..., None]:
    """`scatter`, compiled."""
    return _compiled(scatter, lambda made: made(np.ones(1), np.zeros((1, 1), np.uint16), np.zeros((1, 2))))


def _compiled(function: Callable[..., None], try_out: Callable[[Callable[..., None]], None]) -> Callable[..., None]:
    from numba import njit

    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        compiled = njit(cache=True, **settings)(function)
        try_out(compiled)
    except Exception:  # nowhere to keep it, a full disk, a damaged file: then it is compiled anew in each process
        compiled = njit(**settings)(function)
    return compiled


def add_up(reference: np.ndarray, candidate: np.ndarray, groups: np.ndarray, by_row: np.ndarray,
           by_column: np.ndarray) -> None:
    """Add to by_row [rows, 5] and by_column [2, groups, columns], float64; both tensors [rows, columns], one dtype.

    Of reference r, candidate c and d = c - r: by_row holds sums of r^2, c^2 and d^2, then the largest |d| and |r|;
    by_column sums of r^2 and d^2 over the rows of each group; groups [rows] int64.

    Magnitudes are compared as the whole numbers that their bits are, which have the same order: a comparison of floats
    that may be NaN is not vectorized.
    """
    rows, columns = reference.shape
    for start in range(0, columns, WIDE):
        stop = min(start + WIDE, columns)
        for row in range(rows):
            left, right = reference[row, start:stop], candidate[row, start:stop]
            col_rr, col_dd = by_column[0, groups[row], start:stop], by_column[1, groups[row], start:stop]
            rr = cc = dd = 0.0
            most_d = most_r = np.int64(0)
            for column in range(left.shape[0]):
                r, c = np.float64(left[column]), np.float64(right[column])
                d = c - r
                bits_d, bits_r = np.float64(abs(d)).view(np.int64), np.float64(abs(r)).view(np.int64)
                most_d = bits_d if bits_d > most_d else most_d
                most_r = bits_r if bits_r > most_r else most_r
                rr += r * r
                cc += c * c
                dd += d * d
                col_rr[column] += r * r
                col_dd[column] += d * d
            by_row[row, 0] += rr
            by_row[row, 1] += cc
            by_row[row, 2] += dd
            by_row[row, 3] = max(by_row[row, 3], np.int64(most_d).view(np.float64))
            by_row[row, 4] = max(by_row[row, 4], np.int64(most_r).view(np.float64))


def scatter(values: np.ndarray, bits: np.ndarray, tables: np.ndarray) -> None:
    """Add each value to one sum of each table: bits [n, tables] uint16 say which (the lowest) and with which sign (the
    highest); values [n] and tables [tables, 2^m] float64."""
    mask = tables.shape[1] - 1
    for place in range(values.shape[0]):
        value = values[place]
        for number in range(tables.shape[0]):
            word = np.int64(bits[place, number])
            tables[number, word & mask] += -value if word >> 15 else value
