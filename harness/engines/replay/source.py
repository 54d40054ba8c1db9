"""The text of a compiled function: straight-line torch, one line a node, with loops over steps in layer-major order.

`load(A, R, W, device)` computes what is the same for every call; `main(A, R, W, S, device, inputs...)` is a call. A is the
arithmetic, R holds constants as stored, W as computed with, S the states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from harness.engines.replay.ops import TABLE
from harness.engines.replay.padding import Newest, newest
from harness.engines.replay.plan import PRODUCTS, Block, Kind, Plan
from harness.engines.replay.program import Node, Value
from harness.engines.replay.rules import Emit
from harness.engines.replay.sizes import names
from harness.errors import HarnessError, within

BIG = 1 << 22
"""Elements above which a constant is widened where it is used, not once and for all."""
BIG_STEP = 1 << 12
"""Elements of a value above which the text lets go of it after its last use."""
Label = Callable[[Node], str]


class Writer:
    """Satisfies `rules.Scene`. taps: values handed out besides the outputs. label: what a remark says of a node, besides
    its number and type. padded: see `padding`. After `write`, `stored` and `wide` hold the constants that R and W must."""

    batch = "B"

    def __init__(self, plan: Plan, taps: Mapping[str, Value], label: Label = lambda node: "", *,
                 padded: bool = False) -> None:
        self.plan, self.taps, self.label, self.padded = plan, taps, label, padded
        self.stored_constants: dict[int, Value] = {}
        self.wide_constants: dict[int, Value] = {}
        self._inputs = {value.id for value in plan.function.inputs}
        self._handed = {value.id for value in (*taps.values(), *plan.function.outputs.values())}
        self._block: Block | None = None
        self._home = {value.id: number for number, block in enumerate(plan.blocks) for node in block.nodes
                      for value in node.results}
        self._in_place = {node.results[0].id for node in plan.function.nodes if node.at in plan.in_place}
        self._named: set[str] = set()
        self._until = {value.id: number for number, block in enumerate(plan.blocks) for node in block.nodes
                       for value in plan.needs(node)}
        self._dying = self._last_uses()

    # What a rule asks.

    def text(self, value: Value) -> str:
        """See `rules.Scene`."""
        if value.constant is not None:
            return self._constant(value)
        if value.id in self.plan.sizes:
            return self._sizes(value)
        kind, inside = self.plan.kinds[value.id], self._block is not None and self._block.loop
        if kind is Kind.FIXED:
            return f"W[{value.id}]"
        name = value.name if value.id in self._inputs else f"v{value.id}"
        if not inside or kind is Kind.SHARED:
            return name
        if kind is Kind.STACKED or value.id in self._inputs:
            return f"{name}[p]"
        return name if self.plan.blocks[self._home[value.id]] is self._block else f"l{value.id}[p]"

    def stored(self, value: Value) -> str:
        """See `rules.Scene`."""
        self.stored_constants[value.id] = value
        return f"R[{value.id}]"

    def host(self, value: Value) -> np.ndarray | None:
        """See `rules.Scene`."""
        return self.plan.sizes.get(value.id)

    def is_stacked(self, value: Value) -> bool:
        """See `rules.Scene`."""
        inside = self._block is not None and self._block.loop
        return not inside and self.plan.kinds.get(value.id) in (Kind.STACKED, Kind.LISTED)

    def _constant(self, value: Value) -> str:
        if value.constant.size > BIG:
            return f"A.widen({self.stored(value)})"
        self.wide_constants[value.id] = value
        return f"W[{value.id}]"

    def _sizes(self, value: Value) -> str:
        flat = ", ".join(str(size) for size in self.plan.sizes[value.id].ravel())
        return f'torch.tensor([{flat}], dtype=A.held("{value.dtype}"), device=device).reshape({list(value.shape)})'

    # Lines.

    def write(self) -> str:
        """The module's text. Raises HarnessError for an operand that a rule cannot take, naming the operation."""
        inputs = ", ".join(value.name for value in self.plan.function.inputs)
        lines = ["def load(A, R, W, device):"]
        for node in self.plan.fixed:
            lines += [f"    {line}" for line in self._lines(node)]
        newest = ", newest" if self.padded else ""
        lines += ["    return W", "", "", f"def main(A, R, W, S, device, {inputs}{newest}):"]
        stepped = [value.name for value in self.plan.function.inputs
                   if self.plan.kinds[value.id] in (Kind.STACKED, Kind.LISTED)]
        lines += [f"    B = len({stepped[0]})"] if stepped else []
        for number, block in enumerate(self.plan.blocks):
            self._block = block
            lines += self._loop(number, block) if block.loop else self._straight(block)
        self._block = None
        outputs, taps = (", ".join(f'"{name}": {self.text(value)}' for name, value in part.items())
                         for part in (self.plan.function.outputs, self.taps))
        return "\n".join([*lines, f"    return {{{outputs}}}, {{{taps}}}", ""])

    def _straight(self, block: Block) -> list[str]:
        return [f"    {line}" for node in block.nodes for line in (*self._lines(node), *self._deletions(node))]

    def _loop(self, number: int, block: Block) -> list[str]:
        outer, self._named = self._named, set()
        made = [value for node in block.nodes for value in node.results if self._needed_outside(value, number)]
        body = [line for node in block.nodes for line in self._lines(node)]
        body += [f"l{value.id}.append(v{value.id})" for value in made]
        self._named = outer
        lines = [f"    l{value.id} = []" for value in made] + ["    for p in steps(B, device):"]
        lines += [f"        {line}" for line in body]
        lines += [f"    v{value.id} = torch.stack(l{value.id})" for value in made if None not in value.shape]
        return lines + [f"    {line}" for node in block.nodes for line in self._deletions(node)]

    def _lines(self, node: Node) -> list[str]:
        with within(f"operation {node.at} ({node.op})"):
            line = self._line(node)
        return [*self._lengths(node), f"{line}  # {_remark(node)}{self.label(node)}"] if line else []

    def _lengths(self, node: Node) -> list[str]:
        """Lengths that the node's sizes need and that have no name here yet."""
        wanted = {name for value in node.operands if value.id in self.plan.sizes
                  for name in names(self.plan.sizes[value.id])}
        fresh = sorted(wanted - self._named)
        self._named |= wanted
        return [f"{name} = {self.text(self.plan.scalars[name][0])}.shape[{self.plan.scalars[name][1]}]" for name in fresh]

    def _line(self, node: Node) -> str | None:
        if node.op == "read_handle":
            return f'v{node.results[0].id} = S["{node.operands[0].name}"]'
        if node.op == "write_handle":
            return None if node.operands[1].id in self._in_place else f'put(S["{node.operands[0].name}"], ' \
                                                             f'{self.text(node.operands[1])}, ...)'
        emit = Emit(node, self, int(self.plan.kind(node) is Kind.STACKED))
        if self.padded and node.op in ("slice", "slice_update") and (part := newest(self.plan, node)):
            return self._newest(node, emit, part)
        if node.at in self.plan.in_place:
            state = self.plan.in_place[node.at].name
            return f'put(S["{state}"], {emit.text(4)}, np.s_[{emit.window(1, 2, 3)}])'
        targets = ", ".join(f"W[{value.id}]" if self.plan.kinds[value.id] is Kind.FIXED else f"v{value.id}"
                            for value in node.results)
        if (norm := self.plan.norms.get(node.at)) is not None:
            return f"{targets} = A.rms_norm({self.text(norm.x)}, {self.text(norm.weight)}, {norm.eps!r})"
        if (rows := self.plan.picks.get(node.at)) is not None:
            return f"{targets} = {emit.text(0)}.index_select({emit.axis(2)}, {self.text(rows)}.reshape(-1))"
        table = node.op in PRODUCTS and node.operands[1].id in self.plan.tables
        made = f"linear(A, {emit.spread(0)}, W[{node.operands[1].id}])" if table else TABLE[node.op].write(emit)
        return f"{targets} = {made}"

    def _newest(self, node: Node, emit: Emit, part: Newest) -> str:
        """The newest row, by an index on the device."""
        if node.at in self.plan.in_place:
            state = self.plan.in_place[node.at].name
            return f'S["{state}"][{part.window}].index_copy_({part.axis}, newest, {emit.text(4)})'
        if node.op == "slice_update":
            raise HarnessError("copies a state to change it, which no recorded call can do")
        return f"v{node.results[0].id} = {emit.text(0)}[{part.window}].index_select({part.axis}, newest)"

    # What lives how long.

    def _needed_outside(self, value: Value, number: int) -> bool:
        """Whether a value made in a loop is needed after it."""
        return value.id in self._handed or self._until.get(value.id, number) > number

    def _last_uses(self) -> dict[int, list[str]]:
        """`at` of a node -> names that nothing needs after it."""
        last: dict[int, Node] = {}
        for block in self.plan.blocks:
            for node in block.nodes:
                last |= {value.id: node for value in self.plan.needs(node)}
        found: dict[int, list[str]] = {}
        for block in self.plan.blocks:
            for node in block.nodes:
                for value in node.results:
                    gone = value.id in last and value.id not in self._handed and node.at not in self.plan.in_place
                    if gone and _is_big(value) and self.plan.kinds[value.id] in (Kind.SHARED, Kind.STACKED):
                        found.setdefault(last[value.id].at, []).append(f"v{value.id}")
        return found

    def _deletions(self, node: Node) -> list[str]:
        dying = self._dying.get(node.at)
        return [f"del {', '.join(sorted(set(dying)))}"] if dying else []


def _is_big(value: Value) -> bool:
    """Whether it is worth a line to let go of a value: of unknown length, or of some thousand elements a step."""
    return None in value.shape or math.prod(value.shape) >= BIG_STEP


def _remark(node: Node) -> str:
    kinds = [f"{value.dtype}[{', '.join('?' if size is None else str(size) for size in value.shape)}]"
             for value in node.results]
    within = "".join(f" in {scope.composite or scope.callee}" for scope in node.scope[-1:])
    return " ".join([str(node.at), *kinds]) + within
