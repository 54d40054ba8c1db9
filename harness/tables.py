"""Tables of a program and tensors that are expected in it, in rows; and the index that finds one among the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

HEAD = 64
"""Columns of a row that it is found by."""
COMMON = 8
"""A row that begins like more than so many others says nothing of where its tensor lies."""
SLAB = 1 << 22
"""Values read at a time while rows are indexed."""
ASKED = 64
"""Rows of a tensor that are asked first where it lies. Reading the beginning of a row reads a page of the file: asking
all of them reads a checkpoint twice."""
Digits = tuple[np.ndarray, np.ndarray]
"""Codes int8 [rows, columns] and scales fp16 [rows, columns / block]."""


class Table(Protocol):
    """A table of a program: `harness.engines.program.Weight` is one."""

    shape: tuple[int, ...]
    stored: str
    uses: Sequence[Any]

    def rows(self, start: int = 0, stop: int | None = None, columns: int | None = None) -> np.ndarray:
        """Rows of axis 0 as the program computes with them, dequantized; the first `columns` of the last axis."""
        ...

    def digits(self, start: int, stop: int) -> Digits | None:
        """The same rows as they are stored, where these are int8 codes with block scales and no offsets."""
        ...


@dataclass(frozen=True)
class Expected:
    """A tensor [rows, columns] that the program must hold; a vector is one row. Rows are made when asked for.

    value: rows start .. stop (first `columns`) as the program must compute with them. Where it is stored as codes:
    weight: the same before quantization; step: the quantization step of every element as our formula gives it; digits:
    codes and scales.
    """

    name: str
    shape: tuple[int, int]
    value: Callable[..., np.ndarray]
    weight: Callable[[int, int], np.ndarray] | None = None
    step: Callable[[int, int], np.ndarray] | None = None
    digits: Callable[[int, int], Digits] | None = None

    @property
    def quantized(self) -> bool:
        """Whether it is stored as codes with block scales."""
        return self.step is not None

    @property
    def size(self) -> int:
        """Count of values."""
        return self.shape[0] * self.shape[1]


class View:
    """A table as a matrix: as it lies (a kernel of a convolution with one row a channel that it makes) or, where a converter
    folds the transposition in, transposed."""

    def __init__(self, table: Table, transposed: bool = False) -> None:
        self.table, self.transposed = table, transposed
        sides = [side for side in table.shape if side != 1] or [1]
        lies = (1, *sides) if len(sides) == 1 else (sides[0], math.prod(sides[1:]))
        self.shape: tuple[int, ...] = lies[::-1] if transposed else lies
        self._plain = not transposed and tuple(table.shape) == lies

    @cached_property
    def _whole(self) -> np.ndarray:
        """A table that cannot be cut into rows is held."""
        values = self.table.rows().reshape(self.shape[::-1] if self.transposed else self.shape)
        return np.ascontiguousarray(values.T) if self.transposed else values

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop."""
        return self.table.rows(start, stop) if self._plain else self._whole[start:stop]

    def digits(self, start: int, stop: int) -> Digits | None:
        """The same as they are stored, or None."""
        return self.table.digits(start, stop) if self._plain else None

    def heads(self) -> Iterator[np.ndarray]:
        """The first HEAD columns of all rows, in slabs."""
        if self.transposed and tuple(self.table.shape) == self.shape[::-1]:
            yield self.table.rows(0, min(HEAD, self.shape[1])).T
            return
        columns = min(HEAD, self.shape[1])
        step = max(1, SLAB // columns)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield self.table.rows(start, stop, columns) if self._plain else self._whole[start:stop, :columns]


def views(table: Table) -> Iterable[View]:
    """The ways in which a table can hold a tensor."""
    yield View(table)
    if sum(side != 1 for side in table.shape) == 2:
        yield View(table, transposed=True)


class Index:
    """The beginnings of all rows of all views."""

    def __init__(self, among: Sequence[View], each: Callable[..., Iterable[Any]] = map) -> None:
        self.views = list(among)
        found = list(each(lambda view: np.concatenate([_keys(part) for part in view.heads()]), self.views))
        keys = np.concatenate(found) if found else np.empty(0, np.uint64)
        numbers = np.repeat(np.arange(len(found)), [len(part) for part in found])
        rows = np.concatenate([np.arange(len(part)) for part in found]) if found else np.empty(0, np.int64)
        order = np.argsort(keys, kind="stable")
        self._keys, self._numbers, self._rows = keys[order], numbers[order], rows[order]
        self._heights = np.array([view.shape[0] for view in self.views], dtype=np.int64)

    def ballots(self, item: Expected) -> list[tuple[int, int, int]]:
        """(votes, number of the view, offset in it) of the places where rows of the tensor begin, most votes first.

        A few rows are asked first; all of them where most of these few do not agree on one place, or a second place
        comes near it.
        """
        rows = item.shape[0]
        if rows > ASKED:
            few = np.linspace(0, rows - 1, ASKED).astype(int)
            votes = self._votes(np.concatenate([self._beginnings(item, row, row + 1) for row in few]), few, rows)
            if votes and 2 * votes[0][0] > ASKED and (len(votes) == 1 or 4 * votes[1][0] < ASKED):
                return votes
        step = max(1, SLAB // min(HEAD, item.shape[1]))
        keys = [self._beginnings(item, start, min(start + step, rows)) for start in range(0, rows, step)]
        return self._votes(np.concatenate(keys), np.arange(rows), rows)

    @staticmethod
    def _beginnings(item: Expected, start: int, stop: int) -> np.ndarray:
        return _keys(item.value(start, stop, min(HEAD, item.shape[1])))

    def _votes(self, keys: np.ndarray, asked: np.ndarray, rows: int) -> list[tuple[int, int, int]]:
        """Of the rows `asked`, with these keys, of a tensor of `rows`."""
        left, right = np.searchsorted(self._keys, keys, "left"), np.searchsorted(self._keys, keys, "right")
        counts = right - left
        if rows > COMMON:
            counts = np.where(counts > COMMON, 0, counts)
        source = np.repeat(asked, counts)
        places = np.repeat(left - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        numbers, offsets = self._numbers[places], self._rows[places] - source
        fits = (offsets >= 0) & (offsets + rows <= self._heights[numbers])
        pairs, votes = np.unique(np.stack([numbers[fits], offsets[fits]], axis=1), axis=0, return_counts=True)
        return sorted(((int(count), int(number), int(offset)) for (number, offset), count in zip(pairs, votes)),
                      key=lambda ballot: (-ballot[0], ballot[1:]))

    def elect(self, ballots: Sequence[tuple[int, int, int]], claimed: set[int]) -> tuple[View, int] | None:
        """The place with most votes; of equal ones, one whose table no other tensor has."""
        best = [ballot for ballot in ballots if ballot[0] == ballots[0][0]]
        free = [ballot for ballot in best if id(self.views[ballot[1]].table) not in claimed]
        return next(((self.views[number], offset) for _, number, offset in free or best), None)


def _keys(values: np.ndarray) -> np.ndarray:
    """A 64-bit digest of each row's values, whatever float type they are in."""
    plain = np.ascontiguousarray(values, dtype=np.float32) + np.float32(0)  # -0 becomes 0
    words = plain.view(np.uint32).astype(np.uint64)
    # Fixed odd multipliers, one a column; the high half of each product reaches the low one, so that all bits count.
    factors = np.random.default_rng(0).integers(1, 1 << 63, HEAD, dtype=np.uint64)[:words.shape[1]] | np.uint64(1)
    products = words * factors
    return (products ^ (products >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
