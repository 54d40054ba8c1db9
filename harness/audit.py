"""The weight audit: find every checkpoint tensor among a program's tables, row by row, without names to go by.

A shipped program names nothing, so tensors are found by content: the beginning of each expected row votes for the table
and offset where the same row begins. Fused tables (q, k and v in one) are found like single ones, and a tensor with some
stale rows is still found by the others, so that the rows can be named. What was found is compared whole, in blocks of
rows: nothing bigger than a block is held, and a program of any size is audited at about the speed of reading it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.tables import Expected, Index, Table, View, views

HALF_STEP = 0.5
SLACK = 2.0**-9
"""Relative room for rounding: a scale held in fp16 is off by 2^-11, and so is the product."""
TINY = 1e-12
BLOCK = 1 << 20
"""Values compared at a time: a few MiB, which a processor's cache holds."""
NAMED = 8
"""Wrong rows that a finding names."""
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Finding:
    """Where a tensor was found and what is wrong with it: `rows` are the wrong ones; `at` its first use, or None."""

    name: str
    stored: str | None
    wrong: int
    rows: tuple[int, ...]
    reason: str
    at: int | None


def audit(expected: Iterable[Expected], tables: Sequence[Table], each: Each = map) -> tuple[list[Finding], list[Table]]:
    """Findings in the order given, and the tables that hold no expected row. `each` maps a function over tensors: a
    thread pool's `map` uses more than one core."""
    wanted = list(expected)
    index = Index([view for table in tables for view in views(table)], each)
    claimed: set[int] = set()
    places: dict[str, tuple[View, int]] = {}
    for item, ballots in zip(wanted, each(index.ballots, wanted)):
        place = index.elect(ballots, claimed)
        if place is not None:
            places[item.name] = place
            claimed.add(id(place[0].table))
    for item in wanted:
        if item.name not in places and (near := _nearest(item, [view for view in index.views
                                                                 if id(view.table) not in claimed])):
            places[item.name] = near, 0
            claimed.add(id(near.table))
    findings = dict(zip((item.name for item in wanted), each(
        lambda item: _compare(item, *places[item.name]) if item.name in places else
        Finding(item.name, None, item.size, (), "the program holds no such table", None), wanted)))
    _check_order(findings)
    return list(findings.values()), [table for table in tables if id(table) not in claimed]


def _nearest(item: Expected, among: Sequence[View]) -> View | None:
    """The view of the tensor's shape whose values are nearest to it."""
    def distance(view: View) -> float:
        return sum(float(np.square(np.nan_to_num(view.rows(start, stop).astype(np.float64)) - item.value(start, stop)).sum())
                   for start, stop in _blocks(item))

    return min((view for view in among if view.shape == item.shape), key=distance, default=None)


def _blocks(item: Expected) -> Iterable[tuple[int, int]]:
    rows, columns = item.shape
    step = max(1, BLOCK // max(columns, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _compare(item: Expected, view: View, offset: int) -> Finding:
    at, stored = min(use.at for use in view.table.uses), view.table.stored
    codes = " x " in stored
    if codes != item.quantized:
        wanted = "as codes with block scales" if item.quantized else "as it is"
        return Finding(item.name, stored, item.size, (), f"stored as {stored}, the recipe stores it {wanted}", at)
    reason = "every value on the grid and within half a quantization step" if codes else f"{item.size} values equal"
    count, rows, first, named = 0, 0, None, []
    exact = True
    for start, stop in _blocks(item):
        if _same(item, view, start, stop, offset):
            continue
        held, value = view.rows(start + offset, stop + offset), item.value(start, stop)
        exact = exact and np.array_equal(held, value)
        wrong = _wrong(item, held, value, start, stop)
        bad = np.flatnonzero(wrong.any(axis=1))
        if len(bad) and first is None:
            row, column = (int(part) for part in np.argwhere(wrong)[0])
            first = [start + row, column], held[row, column], value[row, column]
        count, rows = count + int(wrong.sum()), rows + len(bad)
        named += [start + int(row) for row in bad[:NAMED - len(named)]]
    if first is None:
        return Finding(item.name, stored, 0, (), f"{item.size} values equal" if exact else reason, at)
    place, got, right = first
    reason = f"{count} of {item.size} values differ in {rows} of {item.shape[0]} rows, the first at {place}: " \
             f"{got:.6g} where {right:.6g} is right; relative error {_error(item, view, offset):.3g}"
    return Finding(item.name, stored, count, tuple(named), reason, at)


def _same(item: Expected, view: View, start: int, stop: int, offset: int) -> bool:
    """Whether these rows are stored with the very bits that are expected; False says nothing, they are compared then."""
    if item.quantized:
        held, wanted = view.digits(start + offset, stop + offset), item.digits(start, stop)
        return held is not None and all(map(np.array_equal, held, wanted))
    held, wanted = view.rows(start + offset, stop + offset), item.value(start, stop)
    if held.dtype != wanted.dtype or held.dtype.itemsize != 2:
        return np.array_equal(held, wanted)
    return np.array_equal(held.view(np.uint16), wanted.view(np.uint16))  # numpy compares halves one by one


def _wrong(item: Expected, held: np.ndarray, value: np.ndarray, start: int, stop: int) -> np.ndarray:
    wrong = held != value
    if not item.quantized or not wrong.any():
        return wrong
    # Another quantizer may break ties otherwise; what it may not do is leave the grid of the right step.
    weight, step = item.weight(start, stop), item.step(start, stop)
    near = (np.abs(held.astype(np.float64) - weight)
            <= step * HALF_STEP * (1 + SLACK) + SLACK * np.abs(weight.astype(np.float64)))
    steps = held.astype(np.float64) / np.maximum(step, TINY)
    return wrong & ~(near & (np.abs(steps - np.round(steps)) <= SLACK / 2 * np.abs(steps) + TINY))


def _error(item: Expected, view: View, offset: int) -> float:
    """Relative L2 error of the whole tensor."""
    apart = total = 0.0
    for start, stop in _blocks(item):
        value = item.value(start, stop).astype(np.float64)
        apart += float(np.square(view.rows(start + offset, stop + offset).astype(np.float64) - value).sum())
        total += float(np.square(value).sum())
    return float(np.sqrt(apart) / max(np.sqrt(total), 1e-30))


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
