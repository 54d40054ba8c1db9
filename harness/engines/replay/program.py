"""The program of an `.aimodel` as plain records: functions, nodes in order, constants mapped from the file.

The structure is read by Apple's bindings in a child process (`harness.engines.replay.reader`), where damaged bytes can
abort nothing but the child; the bytes of big constants are mapped here, so that an 8 GB program costs no memory.
Composite callees stand in place of their calls, and states are read and written by name: no tokens are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.bundle import PROGRAM, check_asset
from harness.engines.child import running
from harness.engines.mlirb import Blob, read_resources
from harness.engines.program import DTYPES
from harness.errors import HarnessError, within


@dataclass(frozen=True)
class Constant:
    """dtype as the program spells it (`f16`, `si8`, `i1`); `blob` says where the file holds big ones, else None."""

    dtype: str
    shape: tuple[int, ...]
    resource: str | None = None
    blob: Blob | None = None
    _held: Any = field(repr=False, compare=False, default=None)

    @property
    def array(self) -> np.ndarray:
        """The values, read-only; a view into the mapped file where they are big. HarnessError for an unknown dtype."""
        if self._held is None:
            raise HarnessError(f"constants of type {self.dtype} cannot be read", where=self.resource)
        return np.broadcast_to(self._held, self.shape)

    @property
    def size(self) -> int:
        """Count of elements."""
        return math.prod(self.shape)

    @property
    def fill(self) -> float | int | bool | None:
        """The one value that it holds everywhere where the program says so, else None."""
        return self._held.item() if self._held is not None and self._held.size == 1 else None


@dataclass(frozen=True)
class Value:
    """One tensor. dtype as the program spells it; shape with None for a dimension known only when it runs.

    id: unique within its function. name: of an input, an output or a state. constant: what it holds where that is fixed.
    """

    id: int
    dtype: str
    shape: tuple[int | None, ...]
    name: str | None = None
    constant: Constant | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Scope:
    """A call that a node stands in: the composite that it declares, its attributes as printed, and its callee.

    at: number of the call, by which two calls of one callee differ.
    """

    composite: str | None
    attributes: str
    callee: str
    at: int


@dataclass(frozen=True)
class Node:
    """One operation. op: its name without dialect (`broadcasting_add`); attributes as the bindings print them.

    at: its number in program order, calls and what they call included, constants not. `read_handle` takes the state and
    gives its value, `write_handle` takes the state and the value. scope: calls that it stands in, outermost first.
    regions: count of its regions, whose operations are not listed. op_id: the converter's own number, where it is kept.
    """

    op: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    attributes: Mapping[str, str]
    at: int
    scope: tuple[Scope, ...] = ()
    regions: int = 0
    op_id: int | None = None


@dataclass(frozen=True)
class Function:
    """A public function. outputs: name -> value, without states; states: handles, with the type of what they hold.

    names: FX node -> the value that is its output, where the program was converted in DEBUG mode; later outputs of one node
    as `node.1`.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: Mapping[str, Value]
    states: tuple[Value, ...]
    nodes: tuple[Node, ...]
    names: Mapping[str, Value] = field(default_factory=dict)

    def constants(self) -> Iterator[Value]:
        """Constant operands, each once, in order of first use."""
        seen = set()
        for node in self.nodes:
            for value in node.operands:
                if value.constant is not None and value.id not in seen:
                    seen.add(value.id)
                    yield value


@dataclass(frozen=True)
class Program:
    """Functions by name; `main` is the one that every bundle has."""

    asset: Path
    functions: Mapping[str, Function]

    @property
    def main(self) -> Function:
        """The function `main`, or the only one. Raises HarnessError where there is neither."""
        if "main" in self.functions:
            return self.functions["main"]
        if len(self.functions) != 1:
            raise HarnessError(f"its functions are {', '.join(sorted(self.functions)) or 'none'}; there is no main",
                               where=self.asset.name)
        return next(iter(self.functions.values()))


def read_program(asset: Path, timeout_s: float = 300.0, tmp: Path | None = None, *, check: bool = True) -> Program:
    """Read an `.aimodel`. Raises HarnessError for damaged bytes, and Undecided where the reader is missing or dies.

    check: compare the bytes with `main.hash` first, which reads the whole file; a caller that says False does it itself
    before it trusts a result.
    """
    asset = Path(asset).resolve()
    check_asset(asset, bytes_too=check)
    with within(asset.name):
        blobs = read_resources(asset / PROGRAM)
        with running("harness.engines.replay.reader", {"asset": str(asset)}, {}, timeout_s, tmp) as child:
            answer = child.result("program", "Apple's bindings read the program")
        mapped = np.memmap(asset / PROGRAM, dtype=np.uint8, mode="r")
        constants = [_constant(row, answer.arrays.get(f"c{number}"), blobs, mapped)
                     for number, row in enumerate(answer.facts["constants"])]
        return Program(asset, {row["name"]: _function(row, constants) for row in answer.facts["functions"]})


def _constant(row: list[Any], held: np.ndarray | None, blobs: Mapping[str, Blob], mapped: np.ndarray) -> Constant:
    spelled, shape, resource = row[0], tuple(row[1]), row[2]
    dtype, blob = DTYPES.get(spelled), None
    if resource is not None:
        if resource not in blobs:
            raise HarnessError("the program names this resource, the file does not hold it", where=resource)
        blob = blobs[resource]
        if dtype is not None:
            needed = math.prod(shape) * np.dtype(dtype).itemsize
            if blob.size != needed:
                raise HarnessError(f"holds {blob.size} bytes, {spelled}{list(shape)} needs {needed}", where=resource)
            held = mapped[blob.offset:blob.offset + blob.size].view(dtype).reshape(shape)
    elif held is not None:  # one element stands for all; a number travels as an array of one
        held = held.reshape([1] * len(shape) if held.size == 1 else shape)
    return Constant(spelled, shape, resource, blob, held)


def _function(row: Mapping[str, Any], constants: list[Constant]) -> Function:
    values = []
    for number, (dtype, shape, name, constant) in enumerate(row["values"]):
        values.append(Value(number, dtype, tuple(shape), name, None if constant is None else constants[constant]))
    scopes = [Scope(*entry) for entry in row["scopes"]]

    def pick(numbers: list[int], among: list[Any] = values) -> tuple[Any, ...]:
        return tuple(among[number] for number in numbers)

    nodes = tuple(Node(op, pick(operands), pick(results), attributes, at, pick(scope, scopes), *rest)
                  for op, operands, results, attributes, at, scope, *rest in row["nodes"])
    outputs = {name: values[number] for name, number in row["outputs"]}
    names = {name: values[number] for name, number in row["names"].items()}
    return Function(row["name"], pick(row["inputs"]), outputs, pick(row["states"]), nodes, names)
