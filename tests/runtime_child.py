"""Small Core AI programs, written as text, on Apple's runtime: one child process that compiles and runs what it is sent.

Bad programs and bad inputs can abort the runtime; then `Died` is raised and the next call starts another child.

`python runtime_child.py FD` is the child. A message is a line of JSON, then the bytes of its arrays one after the other.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harness.engines.replay import reader
from harness.engines.replay.program import Function, _constant, _function

DTYPES = {"f16": "float16", "f32": "float32", "si8": "int8", "ui8": "uint8", "si16": "int16", "si32": "int32",
          "ui32": "uint32", "i1": "bool"}
"""Element types of the dialect and numpy's names of them."""

FUNCTIONAL = ("sigmoid", "silu", "relu")
"""Operations that the dialect spells with a function type."""


class Refused(Exception):
    """The runtime or the compiler raised: its first line."""


class Died(Exception):
    """The child process died."""


def tensor(dtype: str, shape: tuple[int | None, ...]) -> str:
    """The dialect's spelling of a tensor type; None is a length left open."""
    return f"tensor<{'x'.join([*('?' if size is None else str(size) for size in shape), dtype])}>"


def program(inputs: Mapping[str, str], body: str, results: Mapping[str, str]) -> str:
    """A module with one graph. inputs: name -> type, `%name` in the body; results: value in the body -> type.

    Outputs are called by the value's name without `%`.
    """
    arguments = ", ".join(f'%{name}: {kind} {{coreai.name = "{name}"}}' for name, kind in inputs.items())
    returned = ", ".join(f'{kind} {{coreai.name = "{name[1:]}"}}' for name, kind in results.items())
    return (f"coreai.graph @main({arguments}) -> ({returned}) {{\n{body}\n"
            f"coreai.output {', '.join(results)} : {', '.join(results.values())}\n}}")


def unary(name: str, dtype: str, shape: tuple[int, ...], attributes: str = "", result: str | None = None) -> str:
    """`%y = name %a` on one tensor."""
    taken, given = tensor(dtype, shape), tensor(result or dtype, shape)
    kinds = f"({taken}) -> {given}" if name in FUNCTIONAL else f"{taken} {'to' if name == 'cast' else '->'} {given}"
    return program({"a": taken}, f"%y = coreai.{name} %a {attributes} : {kinds}", {"%y": given})


def binary(name: str, dtype: str, left: tuple[int, ...], right: tuple[int, ...], shape: tuple[int, ...],
           result: str | None = None) -> str:
    """`%y = decomposable.broadcasting_name %a, %b`."""
    a, b, y = tensor(dtype, left), tensor(dtype, right), tensor(result or dtype, shape)
    body = f"%y = coreai.decomposable.broadcasting_{name} %a, %b : ({a}, {b}) -> {y}"
    return program({"a": a, "b": b}, body, {"%y": y})


def along(name: str, dtype: str, shape: tuple[int, ...], axes: int | list[int], result: tuple[int, ...]) -> str:
    """`%y = name %a, axes`."""
    a, y = tensor(dtype, shape), tensor(dtype, result)
    x = tensor("si32", () if isinstance(axes, int) else (len(axes),))
    body = f"%x = coreai.constant dense<{axes}> : {x}\n%y = coreai.{name} %a, %x : ({a}, {x}) -> {y}"
    return program({"a": a}, body, {"%y": y})


class Runtime:
    """The parent's side. `run` keeps the last compiled programs, so that one text costs one compilation."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._stream: BinaryIO | None = None

    def run(self, text: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises Refused where the program or its inputs are refused, Died where the child dies."""
        return self._ask({"text": text}, arrays)[1]

    def read(self, text: str) -> Function:
        """`main` as our reader sees it. Raises as `run` does, and Refused where the reader refuses."""
        head, arrays = self._ask({"text": text, "read": True}, {})
        constants = [_constant(row, arrays.get(f"c{number}"), {}, np.empty(0))
                     for number, row in enumerate(head["facts"]["constants"])]
        return _function(head["facts"]["functions"][0], constants)

    def _ask(self, head: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        stream = self._started()
        try:
            _send(stream, head, arrays)
            head, outputs = _receive(stream)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            code = self._process.wait()
            self.close()
            raise Died(f"exit code {code}") from error
        if "error" in head:
            raise Refused(head["error"])
        return head, outputs

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._stream.close()
            self._process.kill()
            self._process.wait()
        self._process = self._stream = None

    def _started(self) -> BinaryIO:
        if self._process is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())],
                                                 pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with ours:
                self._stream = ours.makefile("rwb")
        return self._stream


def _send(stream: BinaryIO, head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    table = {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}
    stream.write(json.dumps({**head, "arrays": table}).encode() + b"\n")
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).tobytes())
    stream.flush()


def _receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head, arrays = json.loads(line), {}
    for name, (dtype, shape) in head.pop("arrays").items():
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        data = stream.read(count)
        if len(data) != count:
            raise EOFError
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return head, arrays


class _Server:
    """The child's side."""

    def __init__(self, stream: BinaryIO, folder: Path) -> None:
        from coreai.authoring.context import Context

        self.stream, self.folder = stream, folder
        self.context = Context()._mlir_context
        self.compiled: dict[str, Any] = {}
        self.count = 0

    async def serve(self) -> None:
        while True:
            try:
                head, arrays = _receive(self.stream)
            except EOFError:
                return
            try:
                if head.get("read"):
                    _send(self.stream, *self._read(head["text"]))
                else:
                    _send(self.stream, {}, await self._run(head["text"], arrays))
            except Exception as error:  # whatever is raised is the answer
                _send(self.stream, {"error": str(error).strip()}, {})

    async def _run(self, text: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from coreai.runtime import NDArray

        if text not in self.compiled:
            if len(self.compiled) > 64:
                self.compiled.clear()
            self.compiled[text] = await self._compile(text)
        _, function = self.compiled[text]
        out = await function(inputs={name: NDArray(np.array(array)) for name, array in arrays.items()})
        return {name: value.numpy() for name, value in out.items()}

    def _read(self, text: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `reader` hands to its parent: facts and arrays."""
        found: list[Any] = []
        _, path = self._saved(text)

        class Desk:
            job = {"asset": path}

            @staticmethod
            def put(name: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
                found.extend(({"facts": facts}, arrays))

        reader._work(Desk())
        return tuple(found)

    def _saved(self, text: str) -> tuple[Any, Path]:
        from coreai._compiler import ir
        from coreai.authoring.asset import AIProgram

        self.count += 1
        path = self.folder / f"{self.count}.aimodel"
        with self.context:
            return AIProgram._from_mlir_module(ir.Module.parse(text)).save_asset(path), path

    async def _compile(self, text: str) -> Any:
        from coreai.runtime import AIModel

        asset, path = self._saved(text)
        compiled = path.with_suffix(".aimodelx")
        compiled.mkdir()
        asset._write_odix(compiled)
        model = await AIModel.load(compiled)
        return model, model.load_function("main")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root, socket.socket(fileno=int(sys.argv[1])) as channel:
        asyncio.run(_Server(channel.makefile("rwb"), Path(root)).serve())
