"""The child process that walks a program with Apple's own bindings; see `harness.engines.program`.

Only structure is decoded here. Bad bytes abort the bindings, and with them this process only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.engines import bindings
from harness.engines.program import QUANTIZED, Use
from harness.engines.worker import Desk, serve
from harness.errors import HarnessError

VIEWS = {"transpose", "reshape", "cast", "broadcast_to", "broadcast_in_dims", "expand_dims", "shrink_dims", "slice"}
"""Operations that hand a constant on; what consumes their result uses the constant."""
SHAPES = VIEWS | {"concat", "split", "slice_update", "get_shape", "range", "reduce_mean", "softmax",
                  "gather_along_axis"}
"""Operations whose scalar operands are axes, sizes and bounds, not arithmetic."""


@dataclass(frozen=True)
class Origin:
    """A value that is a constant, seen through operations that hand it on."""

    constant: int
    through: tuple[str, ...] = ()


class Walk:
    """Follows the entry point in program order, callees in place."""

    def __init__(self, module: Any) -> None:
        from coreai._compiler import ir

        self.ir = ir
        self.graphs = bindings.graphs(module)
        self.constants: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.attributes: list[dict[str, Any]] = []
        self.codes: dict[int, tuple[int, int, int]] = {}
        self.operations: Counter[str] = Counter()
        self._from: dict[Any, Origin] = {}
        self._at, self._writes, self._key_state = 0, 0, None

    def entry(self) -> None:
        """Walk `main`, or the only public graph."""
        public = [name for name, graph in self.graphs.items() if "private" not in bindings.text(graph, "sym_visibility")]
        public = ["main"] if "main" in public else public
        if len(public) != 1:
            raise HarnessError(f"its graphs are {', '.join(sorted(self.graphs)) or 'none'}; there is no main")
        self._graph(self.graphs[public[0]], None, (public[0],))

    def _graph(self, graph: Any, composite: str | None, stack: tuple[str, ...]) -> None:
        for block in graph.regions[0].blocks:
            for operation in block.operations:
                self._operation(operation.operation, composite, stack)

    def _operation(self, operation: Any, composite: str | None, stack: tuple[str, ...]) -> None:
        name = operation.name.rsplit(".", 1)[-1]
        if name == "constant":
            self._from[operation.results[0]] = Origin(self._constant(operation))
            return
        self._at += 1
        self.operations[name] += 1
        for result in operation.results:
            self._from.pop(result, None)  # of an earlier call of the same callee
        if name == "invoke":
            self._invoke(operation, stack)
            return
        if name == "write_handle":
            self._key_state = self._key_state if self._key_state is not None else operation.operands[0]
            self._writes += operation.operands[0] == self._key_state
        self._settings(operation, name, composite)
        for number, operand in enumerate(operation.operands):
            origin = self._from.get(operand)
            if origin is None:
                continue
            if number == 0 and name in VIEWS | {QUANTIZED} and operation.results:
                self._from[operation.results[0]] = replace(origin, through=(*origin.through, name))
            elif not (name == QUANTIZED or name in VIEWS):
                self._use(origin, operation, name, number, composite)
        if name == QUANTIZED:
            self._quantized(operation)
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    self._operation(inner.operation, composite, stack)

    def _use(self, origin: Origin, operation: Any, name: str, number: int, composite: str | None) -> None:
        row = self.constants[origin.constant]
        row["uses"].append(asdict(Use(name, number, self._at, origin.through, self._writes, composite)))
        held = self.arrays.get(f"c{origin.constant}")
        if held is not None and held.size == 1 and name not in SHAPES:
            self._note(name, composite, _meaning(operation, name, number), held.item())

    def _settings(self, operation: Any, name: str, composite: str | None) -> None:
        if name == "gelu":
            self._note(name, composite, "approximate", "tanh" if "tanh" in bindings.text(operation, "approximate") else "none")

    def _note(self, name: str, composite: str | None, meaning: str, value: Any) -> None:
        self.attributes.append({"op": name, "at": self._at, "writes": self._writes, "composite": composite,
                                "name": meaning, "value": value})

    def _quantized(self, operation: Any) -> None:
        origins = [self._from.get(operand) for operand in operation.operands]
        if len(origins) != 4 or None in origins:
            raise HarnessError(f"operation {self._at} ({QUANTIZED}) takes computed codes or scales, not constants")
        data, *companions = (origin.constant for origin in origins)
        self.codes[data] = tuple(companions)

    def _invoke(self, operation: Any, stack: tuple[str, ...]) -> None:
        callee = bindings.called(operation, self.graphs, stack)
        graph = self.graphs[callee]
        arguments, block = list(operation.operands), graph.regions[0].blocks[0]
        for argument, operand in zip(block.arguments, arguments):
            self._from.pop(argument, None)
            if operand in self._from:
                self._from[argument] = self._from[operand]
        self._graph(graph, bindings.composite(graph) or callee, (*stack, callee))

    def _constant(self, operation: Any) -> int:
        attribute = operation.attributes["value"]
        result = operation.results[0]
        if result in self._from:  # a callee's constant, met again
            return self._from[result].constant
        kind = self.ir.RankedTensorType(result.type)
        index, shape = len(self.constants), [kind.get_dim_size(axis) for axis in range(kind.rank)]
        row = {"index": index, "dtype": str(kind.element_type), "shape": shape, "resource": None, "uses": []}
        if self.ir.DenseResourceElementsAttr.isinstance(attribute):
            row["resource"] = bindings.resource(attribute, f"{row['dtype']}{shape}")
        else:
            values = bindings.dense(self.ir, attribute, row["dtype"], shape)
            if values is not None:
                self.arrays[f"c{index}"] = values
        self.constants.append(row)
        return index


def _meaning(operation: Any, name: str, number: int) -> str:
    consumers = {use.owner.name.rsplit(".", 1)[-1] for result in operation.results for use in result.uses}
    if name == "broadcasting_add" and "rsqrt" in consumers:
        return "eps"
    if name == "broadcasting_where":
        return "fill"
    return "scale" if name == "broadcasting_mul" else f"operand {number}"


def _work(desk: Desk) -> None:
    module = bindings.load(Path(desk.job["asset"]))  # held: its values are compared with each other all along
    walk = Walk(module)
    walk.entry()
    used = {index for row in walk.codes.values() for index in row}
    order, rank = _ordered(walk.constants, used)
    arrays = {f"c{rank[old]}": walk.arrays[f"c{old}"] for old in rank if f"c{old}" in walk.arrays}
    desk.put("program", arrays, {
        "constants": [{**row, "index": rank[row["index"]]} for row in order], "attributes": walk.attributes,
        "operations": walk.operations,
        "codes": {rank[data]: [rank[index] for index in row] for data, row in walk.codes.items()}})


def _ordered(constants: list[dict[str, Any]], companions: set[int]) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Constants by first use, then those that nothing computes with; and the new number of each."""
    last = float("inf")
    order = sorted(constants, key=lambda row: (row["uses"][0]["at"] if row["uses"] else last,
                                               row["index"] not in companions, row["index"]))
    return order, {row["index"]: place for place, row in enumerate(order)}


if __name__ == "__main__":
    serve(_work)
