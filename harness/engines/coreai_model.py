"""One function of an asset on Apple's runtime: what it takes and gives, and how inner values are read while it runs.

Only child processes import this: bad bytes abort the runtime, and so the process.
"""

from __future__ import annotations

import math
import hashlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import HarnessError, Undecided


@dataclass(frozen=True)
class Port:
    """An input, state or output: dtype as the runtime names it; shape with -1 for a length left open."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size < 0 else str(size) for size in self.shape)}]"


class Capture:
    """Collects the values of some odix operations while a function runs.

    seams: name -> {"id": odix operation, "row": shape of one token's value}.
    """

    def __init__(self, seams: Mapping[str, Mapping[str, Any]]) -> None:
        self.seams = dict(seams)
        self.unread: dict[str, str] = {}
        self._names: dict[int, list[str]] = {}
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in seams}
        for name, entry in seams.items():
            self._names.setdefault(entry["id"], []).append(name)

    def logger(self) -> Any:
        """The runtime's logger for these operations."""
        from coreai.runtime import CompileIdentifiers, IntermediateLogger

        return IntermediateLogger([CompileIdentifiers(identifier, None) for identifier in self._names], self._take)

    def rows(self, tokens: int) -> dict[str, np.ndarray]:
        """[tokens, *row] float32 by seam, [P, *row] for one image.

        A seam whose operation did not answer, or answered another count of values, is left out and stands in `unread`.
        """
        found = {}
        for name, parts in self._parts.items():
            row, whole = self.seams[name]["row"], np.concatenate(parts) if parts else np.empty(0, np.float32)
            per_token = math.prod(row)
            fits = whole.size and whole.size % per_token == 0 and (tokens == 1 or whole.size == tokens * per_token)
            if fits:
                found[name] = whole.reshape(-1, *row)
            else:
                operation = self.seams[name]["id"]
                self.unread[name] = f"operation {operation} answered {whole.size} values for {tokens} tokens"
        return found

    def _take(self, values: list[Any], kind: str, identifiers: Any) -> None:
        from coreai.runtime import NDArray

        if kind != "output" or not values or values[0] is None:
            return
        value = NDArray._wrap(values[0]).numpy()
        for name in self._names.get(identifiers.id, ()):
            # A copy: the runtime uses the buffer again.
            self._parts[name].append(np.array(value, dtype=np.float32).ravel())


class Function:
    """The entry point of a loaded asset."""

    def __init__(self, model: Any, asset: Path) -> None:
        names = list(model.function_names)
        if "main" not in names and len(names) != 1:
            raise HarnessError(f"its functions are {', '.join(names) or 'none'}; there is no main", where=asset)
        self.asset, self._model = asset, model
        self._name = "main" if "main" in names else names[0]
        self._plain = model.load_function(self._name)
        self._logging: dict[int, Any] = {}
        about = self._plain.desc
        self.inputs = {name: _port(about.input_descriptor(name)) for name in about.input_names}
        self.states = {name: _port(about.state_descriptor(name)) for name in about.state_names}
        self.outputs = {name: _port(about.output_descriptor(name)) for name in about.output_names}

    async def __call__(self, inputs: Mapping[str, np.ndarray], prepared: Mapping[str, Any] | None = None,
                       state: dict[str, Any] | None = None, capture: Capture | None = None) -> dict[str, np.ndarray]:
        """Call with `inputs` besides those already `prepared`; `state` is changed in place. Outputs by name."""
        function = self._plain
        if capture is not None and capture.seams:
            if id(capture) not in self._logging:
                self._logging = {id(capture): self._model.load_function(self._name, capture.logger())}
            function = self._logging[id(capture)]
        out = await function(inputs={**(prepared or {}), **self.prepare(inputs)}, state=state or {})
        return {name: value.numpy() for name, value in out.items()}

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Runtime arrays in the declared dtypes. Raises HarnessError where a shape is not the declared one."""
        from coreai.runtime import NDArray

        ready = {}
        for name, value in inputs.items():
            port = self.inputs[name]
            fits = len(value.shape) == len(port.shape) and all(
                want in (-1, have) for want, have in zip(port.shape, value.shape))
            if not fits:
                raise HarnessError(f"is {list(value.shape)}, the asset asks for {port}",
                                   where=f"{self.asset.name}: {name}",
                                   fix="the bundle is for another geometry or image grid")
            ready[name] = NDArray(np.ascontiguousarray(value, dtype=_numpy(port, self.asset)))
        return ready

    def new_states(self, context: int | None) -> dict[str, Any]:
        """Zeroed states; `context` slots where the asset leaves that length open."""
        from coreai.runtime import NDArray

        shapes = {name: tuple(context if size < 0 else size for size in port.shape)
                  for name, port in self.states.items()}
        return {name: NDArray(np.zeros(shapes[name], dtype=_numpy(port, self.asset)))
                for name, port in self.states.items()}


async def load(asset: Path, compute_unit: str) -> tuple[Function, dict[str, Any]]:
    """Load an asset's function and say how long it took, cold (compile and load) and warm (load again).

    Raises Undecided where the runtime is not installed or does not offer the compute unit here.
    """
    started = time.perf_counter()
    try:
        import coreai.runtime as runtime
        from coreai.authoring.asset import AIModelAsset
    except ImportError as error:
        raise Undecided(f"the Core AI runtime cannot be imported ({error})", fix="pip install coreai-core") from error
    options = _specialization(runtime, compute_unit)
    imported = time.perf_counter()
    compiled = asset
    if not runtime._use_os_coreai:  # the packaged runtime loads compiled programs only
        compiled = Path(tempfile.mkdtemp(suffix=".aimodelx"))
        AIModelAsset.load(asset)._write_odix(compiled)
    function = Function(await runtime.AIModel.load(compiled, options), asset)
    cold = time.perf_counter()
    function = Function(await runtime.AIModel.load(compiled, options), asset)
    return function, {"import_s": imported - started, "cold_load_s": cold - imported,
                      "warm_load_s": time.perf_counter() - cold, "compute_unit": compute_unit,
                      "runtime": _version(), "build": _build(), "platform": f"{platform.system()} {platform.machine()}",
                      "python": platform.python_version(), "cpus": os.cpu_count(),
                      "asset_bytes": sum(file.stat().st_size for file in asset.rglob("*") if file.is_file())}


def _specialization(runtime: Any, compute_unit: str) -> Any:
    """Options that choose the compute unit; only macOS with the system's framework has a choice."""
    if compute_unit == "cpu" and sys.platform != "darwin":
        return None
    if not runtime.SpecializationOptions.is_supported():
        raise Undecided(f"compute unit {compute_unit!r} cannot be chosen here",
                        fix="only macOS 27 or later with the system's Core AI framework offers it; on Linux use cpu")
    if compute_unit == "cpu":
        return runtime.SpecializationOptions.cpu_only()
    kind = getattr(runtime.ComputeUnitKind, compute_unit)()
    return runtime.SpecializationOptions.from_preferred_compute_unit_kind(kind)


def _version() -> str:
    from importlib.metadata import version

    return f"coreai-core {version('coreai-core')}"


def _build() -> str | None:
    """sha256 of the installed runtime's file list, in which every file has its own: which build computed this."""
    from importlib.metadata import distribution

    listed = distribution("coreai-core").read_text("RECORD")
    if listed is None:
        return None
    # Byte code is written by whoever imports first; it is no part of the build.
    lines = sorted(line for line in listed.splitlines() if line and "__pycache__" not in line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _port(about: Any) -> Port:
    return Port(about.dtype, tuple(-1 if size is None else int(size) for size in about.shape))


def _numpy(port: Port, asset: Path) -> np.dtype:
    try:
        return np.dtype(port.dtype)
    except TypeError as error:
        raise HarnessError(f"dtype {port.dtype} is not supported", where=asset) from error
