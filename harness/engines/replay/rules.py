"""What a rule of the operation table gets to write one line of torch: operands as text, sizes as numbers, axes in place.

`stack` says which operands may be stacked over steps: one more axis in front of them, where the operation computes each
row alone. A rule writes the same line with and without it; `Emit.lead` is 1 with it, else 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from harness.engines.replay.program import Node, Value
from harness.engines.replay.sizes import FAR, Size, fixed
from harness.errors import HarnessError

EVERY = (0, 1, 2, 3, 4, 5, 6, 7)
INTEGERS = frozenset({"si8", "si16", "si32", "si64", "ui8", "ui16", "ui32", "ui64"})


class Scene(Protocol):
    """What a rule may ask about values; the compiler answers."""

    batch: str
    """The count of stacked steps, as text."""

    def text(self, value: Value) -> str:
        """The tensor in the generated code."""
        ...

    def stored(self, value: Value) -> str:
        """A constant as the file holds it, not yet widened."""
        ...

    def host(self, value: Value) -> np.ndarray | None:
        """Integers computed from shapes, where it holds those."""
        ...

    def is_stacked(self, value: Value) -> bool:
        """Whether it has one row a step in front."""
        ...


@dataclass(frozen=True)
class Emit:
    """One node on its way to a line."""

    node: Node
    scene: Scene
    lead: int = 0

    def text(self, number: int) -> str:
        """Operand as it is."""
        return self.scene.text(self.node.operands[number])

    def spread(self, number: int) -> str:
        """Operand with its stacked axis in front of as many axes as the result has, so that they broadcast together."""
        value, rank = self.node.operands[number], len(self.node.results[0].shape)
        missing = rank - len(value.shape)
        if not self.lead or not self.scene.is_stacked(value) or missing <= 0:
            return self.scene.text(value)
        return f"{self.scene.text(value)}[:{', None' * missing}]"

    def number(self, number: int) -> str:
        """A constant scalar as a number, any other operand spread."""
        value = self.node.operands[number]
        others = [other for place, other in enumerate(self.node.operands) if place != number]
        plain = value.constant is not None and not value.shape and value.constant.fill is not None
        if plain and any(other.constant is None for other in others) and value.dtype != "i1":
            return repr(value.constant.fill)
        return self.spread(number)

    def row(self, number: int) -> str:
        """Operand stacked, be it that all steps share it."""
        value = self.node.operands[number]
        if not self.lead or self.scene.is_stacked(value):
            return self.scene.text(value)
        return f"{self.scene.text(value)}[None].expand({', '.join([self.scene.batch, *['-1'] * len(value.shape)])})"

    def sizes(self, number: int) -> list[Size]:
        """An operand of integers computed from shapes, flat. HarnessError where it is computed from values."""
        host = self.scene.host(self.node.operands[number])
        if host is None:
            raise HarnessError(f"its operand {number} is computed from values, not from shapes")
        return list(host.ravel())

    def integers(self, number: int) -> list[int]:
        """The same where all are known now."""
        found = fixed(np.array(self.sizes(number), dtype=object))
        if found is None:
            raise HarnessError(f"its operand {number} is known only when the program runs")
        return found

    def axes(self, number: int, rank: int | None = None) -> list[int]:
        """Axes counted from the front, the stacked one included; rank: of what they count in, by default operand 0."""
        rank = len(self.node.operands[0].shape) if rank is None else rank
        found = self.integers(number)
        if any(not -rank <= axis < rank for axis in found):
            raise HarnessError(f"its axes {found} do not fit {rank} dimensions")
        return [axis % rank + self.lead for axis in found]

    def axis(self, number: int) -> int:
        """The one axis."""
        return self.axes(number)[0]

    def shape(self, sizes: list[Size]) -> str:
        """A shape as text, with the stacked axis."""
        parts = [self.scene.batch] * self.lead + [str(size) for size in sizes]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def window(self, start: int, end: int, stride: int) -> str:
        """Python's subscript for the slice that three operands describe. Same wrap and clamp, positive strides only."""
        parts = [":"] * self.lead
        for first, last, step in zip(self.sizes(start), self.sizes(end), self.integers(stride), strict=True):
            if step < 1:
                raise HarnessError(f"a stride of {step} is not supported")
            low = "" if first == Size() else str(first)
            high = "" if last == Size(FAR) else str(last)
            parts.append(f"{low}:{high}{f':{step}' if step > 1 else ''}")
        while len(parts) > 1 and parts[-1] == ":":
            parts.pop()
        return ", ".join(parts) or "..."


@dataclass(frozen=True)
class Rule:
    """How one operation becomes a line: an expression, which is a tuple where there are several results.

    stack: operands that may be stacked; others must be the same for all steps. floats: refuse unsigned integers, in
    which torch does not compute.
    """

    write: Callable[[Emit], str]
    stack: tuple[int, ...] = ()
    checked: bool = field(default=False)


def unsigned(node: Node) -> str | None:
    """The type of a result in which torch has no arithmetic."""
    return next((value.dtype for value in node.results if value.dtype in ("ui16", "ui32", "ui64")), None)


Table = Mapping[str, Rule]
