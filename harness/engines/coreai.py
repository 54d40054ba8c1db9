"""The engine that runs a bundle on Apple's own Core AI runtime, in a child process.

On Linux the runtime computes on the CPU and accumulates fp16 products in fp16; on macOS the system's framework drives
the compute unit asked for. The engine's name says which.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.bundle import PROGRAM_HASH, check_asset
from harness.cases import FrozenInputs
from harness.checkpoint import read_json
from harness.engines import Request
from harness.engines.child import Child, running
from harness.engines.requests import checked, image_name, promised
from harness.errors import HarnessError, Undecided, within
from harness.geometry import Geometry
from harness.graph.contract import HostInputs
from harness.trace import Trace

UNITS = ("cpu", "gpu", "neural_engine")
INDEX_VERSION = 1
TOWERS = ("decoder", "vision")
Embeds = Callable[[FrozenInputs], tuple[np.ndarray, np.ndarray]]


class CoreAIEngine:
    """Satisfies `harness.engines.Engine`.

    decoder, vision: `.aimodel` directories. grid: the one patch grid (rows, columns) the assets are made for. context:
    slots of the cache, as the bundle's metadata says; the asset's own count is checked too. seam_index: a file made by
    `write_index`; seams it lacks, and all of a program that it was not made for, are not offered. embeds: image and DeepStack embeds [N, h], [3N, h] to use instead of
    the vision asset's. timeout_s: longest wait for the load, then for each request. reuse_state: later requests find
    the cache as the one before left it (to test for leaks). chunk: prompt tokens a call of a dynamic asset takes at
    most. tmp: where private folders are made. Raises HarnessError for an unknown compute unit and a malformed index.
    """

    def __init__(self, decoder: Path, vision: Path | None = None, *, geometry: Geometry,
                 grid: tuple[int, int] = (28, 28), context: int | None = None, seam_index: Path | None = None,
                 embeds: Embeds | None = None, compute_unit: str = "cpu", timeout_s: float = 900.0,
                 reuse_state: bool = False, chunk: int | None = None, tmp: Path | None = None) -> None:
        if compute_unit not in UNITS:
            raise HarnessError(f"compute unit {compute_unit!r} is not known", fix=f"known are {', '.join(UNITS)}")
        self.decoder, self.vision = Path(decoder).resolve(), Path(vision).resolve() if vision else None
        self.geometry, self.grid, self.context, self.embeds = geometry, grid, context, embeds
        self.compute_unit, self.timeout_s, self.reuse_state = compute_unit, timeout_s, reuse_state
        self.chunk, self.tmp = chunk, tmp
        self.name = "coreai-cpu-linux" if sys.platform == "linux" else f"coreai-{compute_unit}-macos"
        self.facts: dict[str, Any] = {}
        """Of the last run: load times in seconds, asset bytes, runtime, platform, compute unit, dtype, context."""
        self._index = self._read_index(seam_index)

    def seams(self) -> frozenset[str]:
        """Logits, what the vision asset puts out, and every inner value that the seam index finds in these programs."""
        found = {"logits", *self._index["decoder"], *self._index["vision"]}
        if self.vision is not None and self.embeds is None:
            taps = range(len(self.geometry.deepstack_taps))
            found |= {"vision.merger", *(f"vision.deepstack.{tap}" for tap in taps)}
        return frozenset(found)

    def check(self, request: Request) -> HostInputs:
        """What the host hands in for a request. Raises HarnessError where this bundle cannot run it."""
        return checked(request, self.geometry, self.grid, self.context,
                       self.vision is not None or self.embeds is not None)

    def run(self, requests: Sequence[Request]) -> Iterator[Trace]:
        """One Trace a request, in order, as they come; one child process for all of them.

        Raises HarnessError for bad input before anything starts (a damaged asset, a request that `check` refuses), and
        Undecided where the runtime is missing, crashes, fails or hangs; Traces already yielded stand.
        """
        for asset in filter(None, (self.decoder, self.vision)):
            check_asset(asset)
        job, arrays = self._job(requests)
        with running("harness.engines.coreai_worker", job, arrays, self.timeout_s, self.tmp) as child:
            self.facts = self._ready(child)
            for number, request in enumerate(requests):
                with within(request.inputs.case):
                    trace = child.result(f"result-{number}", f"the {self.name} engine ran the request")
                    trace.facts = {"engine": self.name, **self.facts, **trace.facts}
                    yield trace

    def _ready(self, child: Child) -> dict[str, Any]:
        with within(self.decoder.name):
            facts = child.result("ready", f"the {self.name} engine loaded the bundle").facts
            if facts["vocab"] != self.geometry.vocab or facts["layers"] != self.geometry.layers:
                raise HarnessError(f"has {facts['layers']} layers and vocabulary {facts['vocab']}, the checkpoint "
                                   f"{self.geometry.layers} and {self.geometry.vocab}",
                                   fix="give the checkpoint that the bundle was made from")
            promised(self.context, facts["context"], "metadata.json")
        return facts

    def _job(self, requests: Sequence[Request]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        arrays: dict[str, np.ndarray] = {}
        rows = []
        for number, request in enumerate(requests):
            host = self.check(request)
            arrays[f"ids.{number}"] = host.ids
            rows.append({"image": self._image(request.inputs, arrays), "prompt": request.inputs.length,
                         "free": request.free, "total": len(host.ids) + request.free, "kv": request.kv,
                         "seams": sorted(request.seams & self.seams()),
                         "rope_shift_start": host.shift_start, "rope_shift_amount": host.shift_amount})
        wanted = {seam for row in rows for seam in row["seams"]}
        seams = {tower: {name: entry for name, entry in self._index[tower].items() if name in wanted}
                 for tower in TOWERS}
        # No image, no vision tower: loading it costs time and memory.
        vision = self.vision if any(row["image"] for row in rows) and self.embeds is None else None
        return {"decoder": str(self.decoder), "vision": str(vision) if vision else None, "requests": rows,
                "seams": seams, "compute_unit": self.compute_unit, "context": self.context,
                "reuse_state": self.reuse_state, "chunk": self.chunk}, arrays

    def _image(self, given: FrozenInputs, arrays: dict[str, np.ndarray]) -> str | None:
        """Put the image of a request among the arrays, once for equal images; its name there."""
        if given.patches is None:
            return None
        name = image_name(given)
        if self.embeds is None:
            arrays[f"{name}.patches"] = given.patches
        elif f"{name}.image_embeds" not in arrays:
            arrays[f"{name}.image_embeds"], arrays[f"{name}.deepstack_embeds"] = self.embeds(given)
        return name

    def _read_index(self, path: Path | None) -> dict[str, dict[str, Any]]:
        """Entries by tower. On macOS inner values are not read, because that was never tried there."""
        if path is None or sys.platform != "linux":
            return {tower: {} for tower in TOWERS}
        table = read_json(path)
        with within(path):
            if not isinstance(table, dict) or table.get("version") != INDEX_VERSION:
                raise HarnessError("is no seam index of this version", fix="export the bundle again")
            assets = {"decoder": self.decoder, "vision": self.vision}
            return {tower: _entries(table, tower, asset) for tower, asset in assets.items()}


def _entries(table: dict[str, Any], tower: str, asset: Path | None) -> dict[str, Any]:
    part = table.get(tower)
    if part is None or asset is None or not (asset / PROGRAM_HASH).is_file():
        return {}
    if not isinstance(part, dict) or not isinstance(part.get("seams"), dict):
        raise HarnessError("must hold a program's hash and its seams", where=tower)
    if part.get("program") != program_hash(asset):
        return {}  # its ids say nothing about these bytes; what is still read without them is judged
    for name, entry in part["seams"].items():
        row = entry.get("row") if isinstance(entry, dict) else None
        if not isinstance(row, list) or not all(type(part) is int and part >= 0 for part in (entry.get("id"), *row)):
            raise HarnessError("needs an id and the shape of a row", where=name)
    return part["seams"]


def program_hash(asset: Path) -> str:
    """sha256 of an `.aimodel`'s program, hex, as `main.hash` states it. Raises HarnessError where that is missing."""
    try:
        return (asset / PROGRAM_HASH).read_bytes().hex()
    except OSError as error:
        raise HarnessError(f"cannot be read ({error.strerror})", where=asset / PROGRAM_HASH) from error


def write_index(path: Path, parts: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """Write a seam index for `{"decoder": (asset, entries), ...}`; entries: seam -> {"id", "row", ...}."""
    table: dict[str, Any] = {"version": INDEX_VERSION}
    for tower, (asset, entries) in parts.items():
        table[tower] = {"program": program_hash(asset), "seams": entries}
    path.write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")
