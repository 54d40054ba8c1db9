"""The child process that walks a program with Apple's own bindings; see `harness.engines.replay.program`.

Calls are followed in place. Tokens are checked, then dropped: every access to a state must depend on the access before
it, so that program order is the one order the program allows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness.engines import bindings
from harness.engines.worker import Desk, serve
from harness.errors import HarnessError, within

MOST = 1 << 16
"""More operations than any program has: calls of calls of calls must not unfold without end."""
TOKEN = "!coreai.token"


class Constants:
    """All constants of a module, each once: [dtype, shape, resource], and the values of those inside the code."""

    def __init__(self, ir: Any) -> None:
        self.ir, self.rows, self.arrays = ir, [], {}
        self._known: dict[Any, int] = {}

    def number(self, operation: Any) -> int:
        """Of a `constant` operation."""
        result = operation.results[0]
        if result not in self._known:
            self._known[result] = len(self.rows)
            self._add(operation.attributes["value"], self.ir.RankedTensorType(result.type))
        return self._known[result]

    def _add(self, attribute: Any, kind: Any) -> None:
        dtype, shape, resource = str(kind.element_type), [kind.get_dim_size(axis) for axis in range(kind.rank)], None
        if self.ir.DenseResourceElementsAttr.isinstance(attribute):
            resource = bindings.resource(attribute, f"{dtype}{shape}")
        else:
            values = bindings.dense(self.ir, attribute, dtype, shape)
            if values is not None:
                self.arrays[f"c{len(self.rows)}"] = values
        self.rows.append([dtype, shape, resource])


class Walk:
    """One public function, unfolded: `row` is what `program._function` takes."""

    def __init__(self, ir: Any, handle: Any, graphs: dict[str, Any], constants: Constants, graph: Any) -> None:
        self.ir, self.handle, self.graphs, self.constants = ir, handle, graphs, constants
        self.values: list[list[Any]] = []
        self.nodes: list[list[Any]] = []
        self.scopes: list[list[Any]] = []
        self.names: dict[str, int] = {}
        """FX node -> the value that holds its output; a DEBUG program says so."""
        self._held: dict[int, int] = {}
        self._last: dict[int, Any] = {}
        """State -> the token of its last access, as Token; two states may begin with one token."""
        self._at, self._name = 0, bindings.symbol(graph)
        self.row = self._public(graph)

    def _public(self, graph: Any) -> dict[str, Any]:
        block = _block(graph)
        names = [str(attribute) for attribute in _io_names(self.ir, graph.attributes, "arg_attrs", len(block.arguments))]
        known: dict[Any, Any] = {}
        states, inputs = [], []
        for name, argument in zip(names, block.arguments):
            known[argument] = number = self._value(argument.type, name)
            (states if self.handle.isinstance(argument.type) else inputs).append(number)
        results = self._body(block, known, (), (self._name,))
        names = _io_names(self.ir, graph.attributes, "res_attrs", len(results))
        outputs = [[name, result] for name, result in zip(names, results) if not isinstance(result, Token)]
        kept = {id(result) for result in results if isinstance(result, Token)}
        for state, token in self._last.items():
            if token.written and id(token) not in kept:
                raise HarnessError(f"the last write of state {self.values[state][2]} is not among the outputs, so it may "
                                   "be dropped")
        return {"name": self._name, "inputs": inputs, "states": states, "outputs": outputs, "values": self.values,
                "nodes": self.nodes, "scopes": self.scopes, "names": self.names}

    def _body(self, block: Any, known: dict[Any, Any], scope: tuple[int, ...], stack: tuple[str, ...]) -> list[Any]:
        """Follow a block; what its terminator hands back."""
        for operation in (entry.operation for entry in block.operations):
            name = operation.name.rsplit(".", 1)[-1]
            if name == "constant":
                known[operation.results[0]] = self._constant(operation)
                continue
            operands = [known[operand] for operand in operation.operands]
            if name == "output":
                return operands
            self._at += 1
            if self._at > MOST:
                raise HarnessError(f"its calls unfold to more than {MOST} operations", where=" > ".join(stack))
            if name == "invoke":
                results = self._call(operation, operands, scope, stack)
            elif name in ("create_token", "join_token"):
                results = [Token.joined(operands)]
            elif name in ("read_handle", "write_handle"):
                results = self._access(name, operation, operands, scope)
            else:
                results = self._node(name, operation, operands, scope)
            known.update(zip(operation.results, results, strict=True))
            self.names |= {said: results[place] for said, place in _outputs_named(operation)
                           if place < len(results) and isinstance(results[place], int)}
        raise HarnessError("a graph ends without an output", where=" > ".join(stack))

    def _node(self, name: str, operation: Any, operands: list[Any], scope: tuple[int, ...]) -> list[Any]:
        if any(isinstance(operand, Token) for operand in operands):
            raise HarnessError(f"operation {self._at} ({name}) takes a token")
        results = [self._value(result.type) for result in operation.results]
        attributes = {entry.name: str(entry.attr) for entry in operation.attributes}
        self.nodes.append([name, operands, results, attributes, self._at, list(scope), len(operation.regions),
                           _op_id(operation)])
        return results

    def _access(self, name: str, operation: Any, operands: list[Any], scope: tuple[int, ...]) -> list[Any]:
        *data, token = operands
        state, writes = data[0], name == "write_handle"
        before = self._last.get(state)
        if before is not None and before not in token.chain:
            raise HarnessError(f"operation {self._at} ({name}) does not depend on the access of state "
                               f"{self.values[state][2]} before it, so their order is open")
        results = [] if writes else [self._value(operation.results[0].type)]
        self.nodes.append([name, data, results, {}, self._at, list(scope), 0, _op_id(operation)])
        self._last[state] = after = Token(frozenset(), writes or before is not None and before.written)
        after.chain = token.chain | {after}
        return [*results, after]

    def _call(self, operation: Any, operands: list[Any], scope: tuple[int, ...], stack: tuple[str, ...]) -> list[Any]:
        callee = bindings.called(operation, self.graphs, stack)
        graph = self.graphs[callee]
        self.scopes.append([bindings.composite(graph), bindings.text(graph, "composite_decl"), callee, self._at])
        block = _block(graph)
        if len(block.arguments) != len(operands):
            raise HarnessError(f"graph {callee} takes {len(block.arguments)} arguments, {len(operands)} are given")
        with within(callee):
            return self._body(block, dict(zip(block.arguments, operands)), (*scope, len(self.scopes) - 1),
                              (*stack, callee))

    def _constant(self, operation: Any) -> int:
        number = self.constants.number(operation)
        if number not in self._held:
            dtype, shape, _ = self.constants.rows[number]
            self._held[number] = len(self.values)
            self.values.append([dtype, shape, None, number])
        return self._held[number]

    def _value(self, kind: Any, name: str | None = None) -> int:
        if self.handle.isinstance(kind):
            kind = self.handle(kind).inner_type
        if not self.ir.RankedTensorType.isinstance(kind):
            raise HarnessError(f"operation {self._at}: values of type {kind} are not supported")
        tensor = self.ir.RankedTensorType(kind)
        shape = [None if tensor.is_dynamic_dim(axis) else tensor.get_dim_size(axis) for axis in range(tensor.rank)]
        self.values.append([str(tensor.element_type), shape, name, None])
        return len(self.values) - 1


class Token:
    """The order of accesses: `chain` holds every access that this one comes after, itself included."""

    def __init__(self, chain: frozenset[Token], written: bool) -> None:
        self.chain, self.written = chain, written

    @classmethod
    def joined(cls, tokens: list[Token]) -> Token:
        """What comes after all of `tokens`."""
        return cls(frozenset().union(*(token.chain for token in tokens)), False)


def _block(graph: Any) -> Any:
    blocks = list(graph.regions[0].blocks)
    if len(blocks) != 1:
        raise HarnessError(f"graph {bindings.symbol(graph)} has {len(blocks)} blocks, so its order depends on values")
    return blocks[0]


def _io_names(ir: Any, attributes: Any, which: str, count: int) -> list[str]:
    """`coreai.name` of each argument or result; `arg0`, `arg1` and so on where there is none."""
    listed = list(attributes[which]) if which in attributes else []
    names = []
    for place in range(count):
        entry = ir.DictAttr(listed[place]) if place < len(listed) else {}
        given = "coreai.name" in entry
        names.append(ir.StringAttr(entry["coreai.name"]).value if given else f"{which[:3]}{place}")
    return names


def _op_id(operation: Any) -> int | None:
    """The number that the converter gave an operation: the last one in its location."""
    found = re.findall(r'"op_id": {type = "coreai", value = (\d+)', str(operation.location))
    return int(found[-1]) if found else None


def _outputs_named(operation: Any) -> list[tuple[str, int]]:
    """(FX node, number of the result) for every output of a torch operation that this operation's results are.

    The last metadata of a location are the operation's own; those before belong to what was fused into it.
    """
    own = str(operation.location).rpartition("metadata = [")[2]
    if '"output_maps"' not in own:
        return []
    sources = [re.findall(r'"([^"]+)"', listed) for listed in re.findall(r"identifiers = \[([^\]]*)\]", own)]
    maps = re.findall(r'level = "torch", output = (\d+) : ui32}, target = {level = "coreai", output = (\d+)', own)
    return [(name if number == "0" else f"{name}.{number}", int(target))
            for listed in sources for name in listed for number, target in maps]


def _work(desk: Desk) -> None:
    module = bindings.load(Path(desk.job["asset"]))
    from coreai._compiler import ir
    from coreai._compiler.dialects.coreai import HandleType

    graphs, constants = bindings.graphs(module), Constants(ir)
    rows = []
    for name, graph in graphs.items():
        if "priv" not in graph.attributes:
            with within(name):
                rows.append(Walk(ir, HandleType, graphs, constants, graph).row)
    desk.put("program", constants.arrays, {"functions": rows, "constants": constants.rows})


if __name__ == "__main__":
    serve(_work)
