"""What a function does to its states: where a write may be done in place, and which part of a state each access touches.

A value read from a state shares its memory in torch. A `slice_update` of it may write that memory where the value is
the state as it stands, goes nowhere but back into the state, and nothing read before is looked at later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.engines.replay.program import Function, Node, Value
from harness.engines.replay.sizes import FAR, Size

VIEWS = frozenset({"slice", "reshape", "transpose", "expand_dims", "shrink_dims", "broadcast_to", "broadcast_in_dims",
                   "split", "cast"})
"""Operations whose torch result may share its operand's memory."""


@dataclass(frozen=True)
class Access:
    """A read or write of part of a state. bounds: (start, end) of each axis, None for all of it."""

    state: Value
    node: Node
    writes: bool
    bounds: tuple[tuple[Size, Size], ...] | None


def writes_in_place(function: Function, kept: Iterable[int] = ()) -> dict[int, Value]:
    """`at` of each slice_update that may write its state's memory -> that state; kept: ids of values handed out."""
    order = {node.at: place for place, node in enumerate(function.nodes)}
    uses, found = users(function.nodes), {}
    roots, latest = read_values(function), {}
    handed = {*kept, *(value.id for value in function.outputs.values())}
    for node in function.nodes:
        if node.op == "read_handle":
            latest[node.operands[0].id] = node.results[0].id
        elif node.op == "write_handle":
            latest.pop(node.operands[0].id, None)
        elif node.op == "slice_update" and (base := node.operands[0]).id in roots:
            state, result = roots[base.id], node.results[0]
            back = [user for user in uses.get(result.id, ()) if user.op == "write_handle" and user.operands[0].id == state.id]
            if len(uses.get(result.id, ())) == len(back) == 1 and latest.get(state.id) == base.id and \
                    result.id not in handed and not _seen_later(function, state, roots, uses, order, node, handed):
                found[node.at] = state
    return found


def _seen_later(function: Function, state: Value, roots: Mapping[int, Value], uses: Mapping[int, list[Node]],
                order: Mapping[int, int], write: Node, handed: set[int]) -> bool:
    """Whether memory read from `state` before `write` is looked at after it, through whatever views."""
    waiting = [node.results[0] for node in function.nodes[:order[write.at]]
               if node.op == "read_handle" and node.operands[0].id == state.id]
    while waiting:
        value = waiting.pop()
        if value.id in handed:
            return True
        for user in uses.get(value.id, ()):
            if order[user.at] > order[write.at]:
                return True
            if user.op in VIEWS:
                waiting += user.results
    return False


def read_values(function: Function) -> dict[int, Value]:
    """Id of each value read from a state -> that state."""
    return {node.results[0].id: node.operands[0] for node in function.nodes if node.op == "read_handle"}


def users(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    """Id of a value -> nodes that take it, in order."""
    found: dict[int, list[Node]] = {}
    for node in nodes:
        for value in {value.id: value for value in node.operands}.values():
            found.setdefault(value.id, []).append(node)
    return found


def accesses(function: Function, sizes: Mapping[int, np.ndarray], in_place: Mapping[int, Value]) -> list[Access]:
    """Every access of part of a state, in program order; sizes: host values by id, which say where slices begin and end."""
    roots, found = read_values(function), []
    done = {node.results[0].id for node in function.nodes if node.at in in_place}
    for node in function.nodes:
        if node.op == "write_handle":
            if node.operands[1].id not in done:
                found.append(Access(node.operands[0], node, True, None))
            continue
        for number, value in enumerate(node.operands):
            if value.id not in roots or node.op == "get_shape":
                continue
            updates = node.op == "slice_update" and number == 0 and node.at in in_place
            known = (node.op == "slice" and number == 0 or updates) and all(
                part.id in sizes for part in node.operands[1:4])
            bounds = _bounds(node, value, sizes) if known else None
            found.append(Access(roots[value.id], node, updates, bounds))
    return found


def _bounds(node: Node, value: Value, sizes: Mapping[int, np.ndarray]) -> tuple[tuple[Size, Size], ...]:
    starts, ends = (sizes[node.operands[number].id].ravel() for number in (1, 2))
    return tuple((start, Size(length) if end == Size(FAR) and length is not None else end)
                 for start, end, length in zip(starts, ends, value.shape))


def apart(one: Access, other: Access) -> bool:
    """Whether two accesses of one state surely touch different parts of it: on some axis both are known and disjoint."""
    if one.bounds is None or other.bounds is None:
        return False
    for (start, end), (first, last) in zip(one.bounds, other.bounds):
        known = all(size.fixed and int(size) >= 0 for size in (start, end, first, last))
        if known and (int(end) <= int(first) or int(last) <= int(start)):
            return True
    return False
