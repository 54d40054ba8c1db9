"""A text diff of two bundles' programs: what changed in ports, structure, constants and weights, and where.

Operations are aligned by what they compute (name, types, attributes), then their operands are compared, so that an
exchanged input shows as such and does not drag along all that follows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from harness.engines.replay.program import Constant, Function, Node, Program, Value, read_program
from harness.engines.replay.show import find_asset
from harness.engines.replay.taps import decoder_taps
from harness.engines.replay.taps_vision import vision_taps
from harness.errors import HarnessError

BLOCK = 1 << 24
"""Elements of two tables that are compared at a time."""
NUMBERED = frozenset({"loc", "op_id"})


@dataclass(frozen=True)
class Difference:
    """kind: port, structure, constant or weight; where: the seam that it helps to compute, or the operation's number."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind:10}{self.where}: {self.what}"


def shown(left: Path, right: Path) -> tuple[str, bool]:
    """What `harness diff` prints of two bundles, and whether their programs are the same."""
    found = differences(*(read_program(find_asset(path)) for path in (left, right)))
    return "\n".join(map(str, found)) or "the programs are the same: ports, structure, constants, weights", not found


def differences(left: Program, right: Program) -> list[Difference]:
    """In program order, function by function. Raises HarnessError for constants of a type that cannot be read."""
    found = [Difference("port", name, f"only in {side.asset.name}") for side, other in ((left, right), (right, left))
             for name in side.functions if name not in other.functions]
    for name, function in left.functions.items():
        if name in right.functions:
            found += _Comparison(function, right.functions[name]).found
    return found


class _Comparison:
    """Two functions of one name."""

    def __init__(self, left: Function, right: Function) -> None:
        self.left, self.right, self.found = left, right, []
        self.where = labels(left)
        self._same: dict[int, int] = {}
        self._seen: set[tuple[int, int]] = set()
        self._ports()
        for one, other in self._aligned():
            self._operands(one, other)
        for name, value in left.outputs.items():
            if name in right.outputs and self._same.get(value.id) != right.outputs[name].id and value.constant is None:
                self._add("structure", None, f"output {name} is another operation's result")

    def _add(self, kind: str, node: Node | None, what: str) -> None:
        self.found.append(Difference(kind, self.where(node) if node else self.left.name, what))

    def _ports(self) -> None:
        for kind, ours, theirs in (("input", _named(self.left.inputs), _named(self.right.inputs)),
                                   ("state", _named(self.left.states), _named(self.right.states)),
                                   ("output", self.left.outputs, self.right.outputs)):
            for name in sorted({*ours, *theirs}):
                before, after = (_type(side[name]) if name in side else "none" for side in (ours, theirs))
                if before != after:
                    self._add("port", None, f"{kind} {name}: {before} -> {after}")
                if name in ours and name in theirs and kind != "output":
                    self._same[ours[name].id] = theirs[name].id

    def _aligned(self) -> Iterator[tuple[Node, Node]]:
        ours, theirs = self.left.nodes, self.right.nodes
        keys = [_key(node) for node in ours], [_key(node) for node in theirs]
        if keys[0] == keys[1]:
            yield from zip(ours, theirs)
            return
        for tag, a, b, c, d in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
            if tag == "equal":
                yield from zip(ours[a:b], theirs[c:d])
                continue
            sides = ("- ", ours[a:b]), ("+ ", theirs[c:d])
            parts = [f"{sign}{_describe(node)}" for sign, nodes in sides for node in nodes]
            self._add("structure", (ours[a:b] or ours[a - 1:a] or ours[:1])[0], "; ".join(parts))
            if a < b and c < d:  # what a changed stretch hands on stands for what it handed on before
                self._same |= {left.id: right.id for left, right in zip(ours[b - 1].results, theirs[d - 1].results)
                               if _type(left) == _type(right)}

    def _operands(self, one: Node, other: Node) -> None:
        self._same |= {left.id: right.id for left, right in zip(one.results, other.results)}
        for number, (left, right) in enumerate(zip(one.operands, other.operands)):
            if left.constant is not None and right.constant is not None:
                self._constants(one, number, left, right)
            elif self._same.get(left.id) != right.id:
                self._add("structure", one, f"{one.op} (operation {one.at}) takes another operand {number}: "
                                            f"{self._origin(self.left, left)} -> {self._origin(self.right, right)}")

    @staticmethod
    def _origin(function: Function, value: Value) -> str:
        if value.constant is not None:
            return f"a constant {_type(value)}"
        maker = next((node for node in function.nodes if value in node.results), None)
        return f"operation {maker.at} ({maker.op})" if maker else f"{value.name}"

    def _constants(self, node: Node, number: int, left: Value, right: Value) -> None:
        if (left.id, right.id) in self._seen:
            return
        self._seen.add((left.id, right.id))
        what = compare(left.constant, right.constant)
        if what is not None:
            floats = left.dtype.startswith(("f", "bf")) or node.op == "blockwise_shift_scale"
            kind = "weight" if floats and left.constant.size > 1 and left.constant.fill is None else "constant"
            meaning = _meaning(self.left, node, number)
            self._add(kind, node, f"{meaning} {what} (operation {node.at}, {node.op})")


def compare(left: Constant, right: Constant) -> str | None:
    """What differs between two constants of one type and shape, in words; None where every bit is the same."""
    if left.fill is not None and right.fill is not None:
        same = np.array_equal(np.asarray(left.fill), np.asarray(right.fill), equal_nan=_floating(left))
        return None if same else f"{left.fill!r} -> {right.fill!r}"
    ours, theirs = left.array, right.array
    total, rows, most, first = 0, set(), 0.0, None
    if not left.size:
        return None
    width = ours[0].size if ours.ndim else 1
    step = max(BLOCK // width, 1)
    for start in range(0, len(ours) if ours.ndim else 1, step):
        one, other = (np.ascontiguousarray(side[start:start + step] if side.ndim else side) for side in (ours, theirs))
        differ = _bits(one) != _bits(other)
        if differ.any():
            total += int(differ.sum())
            places = np.argwhere(differ)
            rows |= {int(place) + start for place in np.unique(places[:, 0])} if ours.ndim else {0}
            with np.errstate(invalid="ignore", over="ignore"):
                gaps = np.abs(one[differ].astype(np.float64) - other[differ].astype(np.float64))
            most = max(most, float(np.nan_to_num(gaps, nan=np.inf).max()))
            if first is None:
                place = tuple(int(part) for part in places[0])
                first = ([place[0] + start, *place[1:]] if place else [], one[place].item(), other[place].item())
    if not total:
        return None
    spread = f" in {len(rows)} of {len(ours)} rows" if ours.ndim > 1 else ""
    return (f"{left.dtype}{list(left.shape)}: {total} of {left.size} values differ{spread}, by at most {most:.6g}, "
            f"the first at {first[0]}: {first[1]!r} -> {first[2]!r}")


def _floating(constant: Constant) -> bool:
    return isinstance(constant.fill, float)


def _bits(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == bool else array.view(f"u{array.dtype.itemsize}")


def labels(function: Function) -> Callable[[Node], str]:
    """Says of a node which seam it helps to compute, where the structure is the port's; else its number."""
    try:
        values = (decoder_taps if function.states else vision_taps)(function).values
    except HarnessError:
        return lambda node: f"operation {node.at}"
    makers = {value.id: node.at for node in function.nodes for value in node.results}
    seams = sorted((makers[value.id], name) for name, value in values.items() if value.id in makers)
    places = [at for at, _ in seams]

    def label(node: Node) -> str:
        place = bisect_left(places, node.at)
        return seams[place][1] if place < len(seams) else "outputs"

    return label


def _key(node: Node) -> tuple[Any, ...]:
    attributes = tuple(sorted((name, text) for name, text in node.attributes.items() if name not in NUMBERED))
    composites = tuple(scope.composite or "" for scope in node.scope)
    operands = tuple((_type(value), value.constant is not None) for value in node.operands)
    return node.op, attributes, composites, operands, tuple(map(_type, node.results))


def _describe(node: Node) -> str:
    settings = "".join(f" {name}={text}" for name, text in sorted(node.attributes.items()) if name not in NUMBERED)
    return f"{node.op}({', '.join(map(_type, node.operands))}){settings} -> {', '.join(map(_type, node.results))}"


def _type(value: Value) -> str:
    return f"{value.dtype}[{', '.join('?' if size is None else str(size) for size in value.shape)}]"


def _named(values: Sequence[Value]) -> Mapping[str, Value]:
    return {value.name: value for value in values}


def _meaning(function: Function, node: Node, number: int) -> str:
    """What a constant is for: eps before rsqrt, a fill, a scale; else which operand it is."""
    name = node.op.removeprefix("broadcasting_")
    if name == "add" and any(user.op == "rsqrt" and node.results[0] in user.operands for user in function.nodes):
        return "eps"
    if name == "blockwise_shift_scale":
        return ("codes", "scales", "offsets of codes", "offsets")[number]
    return {"where": "fill", "mul": "factor"}.get(name, f"operand {number}")
