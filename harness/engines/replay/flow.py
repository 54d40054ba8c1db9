"""What depends on what in a function: makers of values, what they rest on, and the patterns that towers are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator

from harness.engines.replay.program import Function, Node, Value

MOVES = frozenset({"reshape", "transpose", "expand_dims", "shrink_dims", "broadcast_to", "broadcast_in_dims", "slice",
                   "split", "gather_along_axis"})
"""Operations that hand on what they are given, in another shape."""
PRODUCTS = frozenset({"batch_matmul", "broadcasting_batch_matmul"})


class Flow:
    """marks of a value: the operations, inputs and states that it rests on, among WATCHED and the function's own."""

    WATCHED = frozenset({"cos", "sin", "softmax", "read_handle"})

    def __init__(self, function: Function) -> None:
        self.function = function
        self.makers = {value.id: node for node in function.nodes for value in node.results}
        self.marks: dict[int, frozenset[str]] = {value.id: frozenset({value.name})
                                                 for value in (*function.inputs, *function.states)}
        for node in function.nodes:
            mine = frozenset().union(*(self.of(operand) for operand in node.operands))
            mine |= {node.op} & self.WATCHED
            self.marks |= {value.id: mine for value in node.results}

    def of(self, value: Value) -> frozenset[str]:
        """Its marks; none for what is fixed."""
        return self.marks.get(value.id, frozenset())

    def fixed(self, value: Value) -> bool:
        """Whether it rests on constants alone (or on shapes)."""
        return not self.of(value)

    def maker(self, value: Value) -> str:
        """Name of the operation that makes it, without `broadcasting_`; "" for an input or a constant."""
        node = self.makers.get(value.id)
        return node.op.removeprefix("broadcasting_") if node else ""

    def path(self, value: Value, through: frozenset[str] = MOVES) -> Iterator[Value]:
        """The value, then what it was before each move, up to its maker."""
        yield value
        while (node := self.makers.get(value.id)) is not None and node.op in through:
            value = node.operands[0]
            yield value

    def source(self, value: Value, through: frozenset[str] = MOVES | {"cast"}) -> Value:
        """What it was before all moves and casts."""
        *_, first = self.path(value, through)
        return first

    def unshaped(self, value: Value) -> Value:
        """What it was before all moves, casts, additions of constants and multiplications with constants."""
        while True:
            value = self.source(value)
            node = self.makers.get(value.id)
            if node is None or self.maker(value) not in ("add", "mul"):
                return value
            loose = [operand for operand in node.operands if not self.fixed(operand)]
            if len(loose) != 1:
                return value
            value = loose[0]

    def rests_on(self, value: Value, other: Value, stop: frozenset[int] = frozenset()) -> bool:
        """Whether `other` is among what `value` was made of, not looking behind the values in `stop`."""
        return other.id in {node_value.id for node in self.between(value, stop | {other.id})
                            for node_value in node.operands} or value.id == other.id

    def between(self, value: Value, stop: frozenset[int]) -> list[Node]:
        """Nodes that `value` is made of, in program order, not looking behind the values in `stop`."""
        found: dict[int, Node] = {}
        waiting = [value]
        while waiting:
            one = waiting.pop()
            node = self.makers.get(one.id)
            if node is None or one.id in stop or node.at in found:
                continue
            found[node.at] = node
            waiting += node.operands
        return [found[at] for at in sorted(found)]

    def linear(self, node: Node) -> bool:
        """A product with a weight."""
        return node.op in PRODUCTS and self.fixed(node.operands[1]) and not self.fixed(node.operands[0])

    def normed(self, value: Value) -> Value | None:
        """What an RMS or layer norm that ends in `value` was given; None where there is no such pattern."""
        node = self.makers.get(self.unshaped(value).id)
        if node is None or node.op.removeprefix("broadcasting_") not in ("mul", "divide"):
            return None
        roots = [operand for operand in node.operands if self.maker(self.source(operand)) in ("rsqrt", "sqrt")]
        others = [operand for operand in node.operands if operand not in roots]
        if len(roots) != 1 or len(others) != 1:
            return None
        given = self.source(others[0])
        if self.maker(given) == "sub":
            given = self.source(self.makers[given.id].operands[0])
        means = [one for one in self.between(roots[0], frozenset({given.id})) if one.op == "reduce_mean"]
        return given if means and self.rests_on(roots[0], given) else None

    def tokens_first(self, value: Value, tokens: int | None, of_cache: bool = False) -> Value | None:
        """Along the moves behind `value`, the first of its count of elements that has the tokens on its leading axis.

        tokens: how many a call takes, None where that is open. One token stands first in every shape.
        """
        size, found = _size(value), None
        for one in self.path(value):
            if _size(one) != size:
                break
            lead = next((length for length in one.shape if length != 1), 1)
            if tokens == 1 or lead == tokens:
                found = one
        return found


def _size(value: Value) -> tuple[int, int]:
    """Product of the known lengths, and count of the open ones."""
    return math.prod(length for length in value.shape if length is not None), value.shape.count(None)
