"""The weight audit: find every checkpoint tensor among a program's tables, row by row, without names to go by.

A shipped program names nothing, so tensors are found by content: each expected row votes for the table and offset where
the same row stands. Fused tables (q, k and v in one) are found like single ones, and a tensor with some stale rows is
still found by the others, so that the rows can be named.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

HALF_STEP = 0.5
SLACK = 2.0**-9
"""Relative room for rounding: a scale held in fp16 is off by 2^-11, and so is the product."""
TINY = 1e-12


class Table(Protocol):
    """A table of a program: `harness.engines.program.Weight` is one."""

    shape: tuple[int, ...]
    stored: str
    uses: Sequence[Any]

    def rows(self) -> np.ndarray:
        """As the program computes with it, dequantized."""
        ...


@dataclass(frozen=True)
class Expected:
    """A tensor the program must hold: `value` as it must compute with it, `weight` before quantization (both 2-D or 1-D).

    step: quantization step of every element as our formula gives it, or None where the tensor is stored as it is.
    """

    name: str
    value: np.ndarray
    weight: np.ndarray
    step: np.ndarray | None = None


@dataclass(frozen=True)
class Finding:
    """Where a tensor was found and what is wrong with it: `rows` are the wrong ones; `at` its first use, or None."""

    name: str
    stored: str | None
    wrong: int
    rows: tuple[int, ...]
    reason: str
    at: int | None


def audit(expected: Iterable[Expected], tables: Sequence[Table]) -> tuple[list[Finding], list[Table]]:
    """Findings in the order given, and the tables that hold no expected row."""
    views = [view for table in tables for view in _views(table)]
    index: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for number, view in enumerate(views):
        for row, digest in enumerate(_digests(view.values)):
            index[digest].append((number, row))
    claimed: set[int] = set()
    findings, lost = {}, []
    wanted = list(expected)
    for item in wanted:
        place = _vote(item, views, index)
        if place is None:
            lost.append(item)
            continue
        view, offset = views[place[0]], place[1]
        claimed.add(id(view.table))
        findings[item.name] = _compare(item, view, offset)
    for item in lost:
        near = _nearest(item, [view for view in views if id(view.table) not in claimed])
        if near is None:
            findings[item.name] = Finding(item.name, None, item.value.size, (), "the program holds no such table", None)
        else:
            claimed.add(id(near.table))
            findings[item.name] = _compare(item, near, 0)
    _check_order(findings)
    return [findings[item.name] for item in wanted], [table for table in tables if id(table) not in claimed]


@dataclass(frozen=True)
class _View:
    table: Table
    values: np.ndarray


def _views(table: Table) -> Iterable[_View]:
    """A table as it lies and, where it is a matrix, transposed: a converter may fold the transposition in."""
    values = table.rows()
    squeezed = values.reshape([side for side in values.shape if side != 1] or [1])
    if squeezed.ndim == 1:
        yield _View(table, squeezed[None])
    elif squeezed.ndim == 2:
        yield _View(table, squeezed)
        yield _View(table, squeezed.T)


def _digests(values: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in np.ascontiguousarray(values)]


def _matrix(values: np.ndarray) -> np.ndarray:
    return values[None] if values.ndim == 1 else values


def _vote(item: Expected, views: Sequence[_View], index: Mapping[bytes, list[tuple[int, int]]]) -> tuple[int, int] | None:
    value = _matrix(item.value)
    votes: Counter[tuple[int, int]] = Counter()
    for row, digest in enumerate(_digests(value)):
        for number, place in index.get(digest, ()):
            if place >= row and place - row + len(value) <= len(views[number].values):
                votes[number, place - row] += 1
    return votes.most_common(1)[0][0] if votes else None


def _nearest(item: Expected, views: Sequence[_View]) -> _View | None:
    value = _matrix(item.value).astype(np.float64)
    same = [view for view in views if view.values.shape == value.shape]
    return min(same, key=lambda view: float(np.linalg.norm(np.nan_to_num(view.values.astype(np.float64)) - value)),
               default=None)


def _compare(item: Expected, view: _View, offset: int) -> Finding:
    value, weight = _matrix(item.value), _matrix(item.weight)
    held = view.values[offset:offset + len(value)]
    at, stored = min(use.at for use in view.table.uses), view.table.stored
    codes = " x " in stored
    if codes != (item.step is not None):
        wanted = "as codes with block scales" if item.step is not None else "as it is"
        return Finding(item.name, stored, value.size, (), f"stored as {stored}, the recipe stores it {wanted}", at)
    wrong = held != value
    reason = f"{value.size} values equal"
    if wrong.any() and item.step is not None:
        # Another quantizer may break ties otherwise; what it may not do is leave the grid of the right step.
        near = (np.abs(held.astype(np.float64) - weight)
                <= _matrix(item.step) * HALF_STEP * (1 + SLACK) + SLACK * np.abs(weight.astype(np.float64)))
        steps = held.astype(np.float64) / np.maximum(_matrix(item.step), TINY)
        wrong = wrong & ~(near & (np.abs(steps - np.round(steps)) <= SLACK / 2 * np.abs(steps) + TINY))
        reason = "every value on the grid and within half a quantization step"
    rows = np.flatnonzero(wrong.any(axis=1))
    if len(rows):
        error = np.linalg.norm(held.astype(np.float64) - value) / max(float(np.linalg.norm(value.astype(np.float64))), 1e-30)
        first = tuple(int(part) for part in np.argwhere(wrong)[0])
        reason = f"{int(wrong.sum())} of {value.size} values differ in {len(rows)} of {len(value)} rows, the first at " \
                 f"{list(first)}: {held[first]:.6g} where {value[first]:.6g} is right; relative error {error:.3g}"
    return Finding(item.name, stored, int(wrong.sum()), tuple(int(row) for row in rows[:8]), reason, at)


def _check_order(findings: dict[str, Finding]) -> None:
    """Layers are used one after the other, and each uses its tensors in the order that most layers do.

    So a tensor that stands in another layer's place, or in another role's, is found though its content is right.
    """
    families: dict[str, dict[int, dict[str, Finding]]] = defaultdict(lambda: defaultdict(dict))
    for finding in findings.values():
        match = re.fullmatch(r"(.*\.(?:layers|blocks))\.(\d+)\.(.*)", finding.name)
        if match and finding.at is not None and not finding.wrong:  # where content is wrong, its place is a guess
            families[match[1]][int(match[2])][match[3]] = finding
    for layers in families.values():
        for role in sorted({role for found in layers.values() for role in found}):
            held = [layers[number][role] for number in sorted(layers) if role in layers[number]]
            _misplaced(findings, held, [one.at for one in held], "used where another layer computes")
        orders = {number: [one.name.partition(f".{number}.")[2] for one in sorted(found.values(), key=lambda one: one.at)]
                  for number, found in layers.items()}
        usual = Counter(map(tuple, orders.values())).most_common(1)[0][0]
        for number, order in orders.items():
            if len(order) == len(usual):
                held = [layers[number][role] for role in usual if role in layers[number]]
                _misplaced(findings, held, [one.at for one in held], "used out of the order of the other layers")


def _misplaced(findings: dict[str, Finding], held: Sequence[Finding], places: Sequence[int], reason: str) -> None:
    """Mark what does not stand where sorting would put it."""
    for one, place, right in zip(held, places, sorted(places)):
        if place != right and not findings[one.name].wrong:
            findings[one.name] = replace(one, wrong=1, reason=reason)
