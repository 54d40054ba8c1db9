"""In which type a program takes the statistics of its norms and its softmaxes, and what a narrow norm makes of large rows.

A program spells both out, casts included, so their types can be read, inside composite operations as well; there a runtime
may have a kernel of its own, whose types nothing states. What a narrow mean of squares costs is not guessed: the norm is
cut out and run alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from harness.engines.replay.arithmetic import Fp16
from harness.engines.replay.compile import Constants, compiled
from harness.engines.replay.flow import Flow
from harness.engines.replay.program import Function, Node, Value
from harness.engines.replay.seams import by_structure
from harness.errors import HarnessError

CAST = frozenset({"cast"})
NORM, SOFTMAX = "norm", "softmax"
BITS = {"bf16": 8, "f16": 11, "f32": 24, "f64": 53}
"""Significant bits of a type; a sum of squares wants those of float32."""


@dataclass(frozen=True)
class Taken:
    """A norm or a softmax. seam: where; dtype: the narrowest that its statistics pass through, as the program spells it.

    composite: the composite operation that it stands in, or None.
    """

    kind: str
    seam: str
    dtype: str
    composite: str | None = None
    _norm: Norm | None = field(default=None, repr=False, compare=False)

    @property
    def narrow(self) -> bool:
        """Whether that is less than float32."""
        return BITS.get(self.dtype, 0) < BITS["f32"]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """rows [N, width] of a norm -> what it makes of each, before its weight, float32; products in the program's types,
        sums in float32. Raises HarnessError where it cannot be run alone."""
        return self._norm.of(rows)

    @property
    def width(self) -> int:
        """Of the rows that a norm takes. Raises HarnessError where that is no single axis."""
        return self._norm.width

    @property
    def centred(self) -> bool:
        """Whether a norm takes the mean of its row away first, as LayerNorm does."""
        return self._norm.centred


def taken(functions: Mapping[str, Function]) -> list[Taken]:
    """All of `{"decoder": function, "vision": function}`, in order, named by the structure of their program."""
    found = []
    for tower, function in functions.items():
        flow, (places, _, _) = Flow(function), by_structure(tower, function)
        seams = sorted((flow.makers[value.id].at, name) for name, value in places.items() if value.id in flow.makers)
        for node in function.nodes:
            norm = _norm(flow, node)
            if norm is not None:
                found.append(Taken(NORM, _after(node, seams, tower), norm.dtype, _composite(node), norm))
            elif node.op == "softmax":
                context = _after(node, seams, tower)
                seam = context.removesuffix("context") + "softmax" if context.endswith(".context") else context
                found.append(Taken(SOFTMAX, seam, node.results[0].dtype, _composite(node)))
    return found


@dataclass(frozen=True)
class Norm:
    """y = x / sqrt(mean(x^2) + eps), or of x less its mean. nodes: what the root of the mean is made of."""

    flow: Flow
    given: Value
    made: Value
    nodes: tuple[Node, ...]

    @property
    def dtype(self) -> str:
        """The narrowest float on the way from x to the root, x itself apart."""
        source = self.flow.source(self.given).id
        floats = [value.dtype for node in self.nodes for value in node.results
                  if value.dtype in BITS and self.flow.source(value).id != source]
        return min(floats, key=BITS.__getitem__, default=self.given.dtype)

    @property
    def centred(self) -> bool:
        """See `Taken`."""
        return sum(node.op == "reduce_mean" for node in self.nodes) > 1

    @property
    def axis(self) -> int:
        """The one that means are taken over, of what the norm is given."""
        axes = {tuple(node.operands[1].constant.array.ravel().tolist()) for node in self.nodes if node.op == "reduce_mean"
                and node.operands[1].constant is not None and len(node.operands[0].shape) == len(self.given.shape)}
        if len(axes) != 1 or len(next(iter(axes))) != 1:
            raise HarnessError("its mean is not taken over one axis of its input")
        return next(iter(axes))[0] % len(self.given.shape)

    @property
    def width(self) -> int:
        """See `Taken`."""
        size = self.given.shape[self.axis]
        if size is None:
            raise HarnessError("the length of its rows is left open")
        return size

    def of(self, rows: np.ndarray) -> np.ndarray:
        """See `Taken`."""
        given = replace(self.given, name="x")
        nodes = (replace(node, operands=tuple(given if one.id == given.id else one for one in node.operands))
                 for node in self.flow.between(self.made, frozenset({given.id})))
        run = compiled(Function("norm", (given,), {"y": self.made}, (), tuple(nodes)), Constants(Fp16()))
        shape = [1 if length is None else length for length in given.shape]
        kind, found = Fp16().held(given.dtype), []
        for row in rows:
            along = torch.from_numpy(row).reshape([-1 if place == self.axis else 1 for place in range(len(shape))])
            made, _ = run({}, x=along.expand(shape).to(kind).contiguous())
            found.append(made["y"].float().movedim(self.axis, -1).reshape(-1, self.width)[0].numpy())
        return np.stack(found)


def _norm(flow: Flow, node: Node) -> Norm | None:
    """The norm whose product with its root a node is."""
    made = node.results[0] if node.results else None
    if made is None or flow.maker(made) not in ("mul", "divide") or flow.unshaped(made).id != made.id:
        return None
    if flow.normed(made) is None:
        return None
    root, other = sorted(node.operands, key=lambda one: flow.maker(flow.source(one)) not in ("rsqrt", "sqrt"))
    if flow.maker(flow.source(other)) == "sub":
        other = flow.makers[flow.source(other).id].operands[0]
    given = _unscaled(flow, flow.source(other, CAST))
    return Norm(flow, given, made, tuple(flow.between(root, frozenset({given.id}))))


def _unscaled(flow: Flow, value: Value) -> Value:
    """What a value was before it was multiplied by a constant, or by something of its own, as its largest magnitude."""
    while flow.maker(value) in ("mul", "divide"):
        loose = [operand for operand in flow.makers[value.id].operands if not flow.fixed(operand)]
        inner = [one for one in loose if all(other is one or flow.rests_on(other, flow.source(one)) for other in loose)]
        if len(inner) != 1 or inner[0].shape != value.shape:
            break
        value = flow.source(inner[0], CAST)
    return value


def _after(node: Node, seams: list[tuple[int, str]], tower: str) -> str:
    """The seam that a node is on the way to."""
    return next((name for at, name in seams if at >= node.at), f"{tower}, operation {node.at}")


def _composite(node: Node) -> str | None:
    return next((scope.composite for scope in reversed(node.scope) if scope.composite), None)
