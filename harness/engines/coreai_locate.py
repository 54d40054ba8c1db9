"""Where a shipped program holds a seam's value, found by the value itself: no names, no debug information needed.

The program runs on a few tokens (or one image) with every operation read, and each seam is sought among them by the
values that a trusted torch graph of the same weights has there. Two operations that hold one value are equally good.

`python -m harness.engines.coreai_locate folder` is the child process.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.bundle import check_asset
from harness.engines import Request
from harness.engines.child import running
from harness.engines.coreai import CoreAIEngine
from harness.engines.coreai_model import Function, load
from harness.engines.worker import Desk, serve
from harness.errors import HarnessError, within
from harness.trace import Trace

NEAR = 0.05
"""Relative L2 distance below which a value counts as the seam's own. Measured on random decoders and vision towers of
width 32 to 64: values that belong are within 2e-6 (fp32) to 0.023 (fp16), the nearest other is at 0.16 or further."""


def locate_seams(asset: Path, steps: list[Mapping[str, np.ndarray]], expected: Mapping[str, np.ndarray], *,
                 context: int | None = None, compute_unit: str = "cpu", timeout_s: float = 600.0,
                 tmp: Path | None = None) -> dict[str, dict[str, Any]]:
    """Entries of a seam index: seam -> {"id", "row", "distance"}; seams without a value nearer than NEAR are left out.

    steps: the inputs of one call after the other, by the asset's names, shapes as it declares them; states begin at
    zero. An asset that takes any count of tokens gets those of all steps in one call. expected: seam -> [tokens, *row],
    rows in the order of the calls. Choose steps on which seams differ: a DeepStack addition shows at image tokens only.
    Raises HarnessError for a damaged asset or inputs that do not fit, and Undecided where the runtime is missing, dies
    or hangs.
    """
    asset = Path(asset).resolve()
    check_asset(asset)
    arrays = {f"step.{number}.{name}": np.asarray(value) for number, step in enumerate(steps)
              for name, value in step.items()}
    arrays |= {f"seam.{name}": np.asarray(value, dtype=np.float32) for name, value in expected.items()}
    job = {"asset": str(asset), "steps": len(steps), "context": context, "compute_unit": compute_unit}
    with running("harness.engines.coreai_locate", job, arrays, timeout_s, tmp) as child, within(asset.name):
        found = child.result("located", "the runtime ran with every operation read").facts
    return {name: {**found[name], "row": list(expected[name].shape[1:])} for name in sorted(found)}


def locate_for(engine: CoreAIEngine, request: Request, trace: Trace) -> dict[str, tuple[Path, dict[str, Any]]]:
    """What `write_index` takes, for the assets of an engine: every seam of `trace` that is found in them.

    trace: a torch graph with the same weights on the same request, which must have an image; the sooner its image
    begins the better, for the program runs step by step up to its third image token. Raises as `locate_seams` does.
    """
    host, images = engine.check(request), np.flatnonzero(request.inputs.ids == engine.geometry.image_token)
    if not images.size:
        raise HarnessError("has no image, so DeepStack additions cannot be told from the layers before them",
                           where=request.inputs.case)
    tokens, taps = int(images[0]) + 3, range(len(engine.geometry.deepstack_taps))
    fixed = {"image_embeds": trace["vision.merger"], "rope_shift_start": np.array([host.shift_start]),
             "deepstack_embeds": np.concatenate([trace[f"vision.deepstack.{tap}"] for tap in taps]),
             "rope_shift_amount": np.array([host.shift_amount])}
    steps = [{"input_ids": host.ids[None, place:place + 1], "position_ids": np.arange(place + 1)[None], **fixed}
             for place in range(tokens)]
    settings = {"compute_unit": engine.compute_unit, "timeout_s": engine.timeout_s, "tmp": engine.tmp}
    inner = {seam: rows[:tokens] for seam, rows in trace.items()
             if seam.startswith("decoder.") and rows.dtype.kind == "f"}
    found = locate_seams(engine.decoder, steps, inner, context=engine.context, **settings)
    parts = {"decoder": (engine.decoder, found)}
    if engine.vision is not None:
        seen = {seam: rows for seam, rows in trace.items() if seam.startswith("vision.")}
        found = locate_seams(engine.vision, [{"patches": request.inputs.patches}], seen, **settings)
        parts["vision"] = engine.vision, found
    return parts


class _Search:
    """Stands in for a `Capture`: takes every operation's value and keeps sums of squares, never the values."""

    def __init__(self, operations: list[int], expected: Mapping[str, np.ndarray], steps: int) -> None:
        self.seams = operations
        parts = {name: np.array_split(value, steps) for name, value in expected.items()}
        self._wanted: list[dict[int, list[tuple[str, np.ndarray]]]] = [{} for _ in range(steps)]
        for name, rows in parts.items():
            for step, row in enumerate(rows):
                self._wanted[step].setdefault(row.size, []).append((name, row.ravel().astype(np.float64)))
        self._total = {name: float(np.square(value, dtype=np.float64).sum()) for name, value in expected.items()}
        self._error: dict[tuple[str, int], float] = {}
        self._seen: dict[tuple[str, int], int] = {}
        self.step, self._steps = 0, steps

    def logger(self) -> Any:
        """The runtime's logger for all operations."""
        from coreai.runtime import CompileIdentifiers, IntermediateLogger

        return IntermediateLogger([CompileIdentifiers(identifier, None) for identifier in self.seams], self._take)

    def best(self) -> dict[str, dict[str, Any]]:
        """The nearest operation of each seam that answered once a step, if it is near."""
        found: dict[str, dict[str, Any]] = {}
        for (name, identifier), error in sorted(self._error.items()):
            if self._seen[name, identifier] != self._steps or not self._total[name]:
                continue
            distance = math.sqrt(error / self._total[name])
            # Written so that NaN, which a scratch buffer may hold, is not near.
            if distance < min(NEAR, found.get(name, {}).get("distance", math.inf)):
                found[name] = {"id": identifier, "distance": distance}
        return found

    def _take(self, values: list[Any], kind: str, identifiers: Any) -> None:
        from coreai.runtime import NDArray

        if kind != "output" or not values or values[0] is None:
            return
        value = NDArray._wrap(values[0]).numpy()
        candidates = self._wanted[self.step].get(value.size, ())
        if not candidates or value.dtype.kind not in "fiub":
            return
        flat = np.array(value, dtype=np.float64).ravel()
        for name, wanted in candidates:
            key = name, identifiers.id
            with np.errstate(invalid="ignore", over="ignore"):
                error = float(np.square(flat - wanted).sum())
            self._error[key] = self._error.get(key, 0.0) + error
            self._seen[key] = self._seen.get(key, 0) + 1


def _work(desk: Desk) -> None:
    asyncio.run(_locate(desk))


async def _locate(desk: Desk) -> None:
    job, arrays = desk.job, desk.arrays()
    asset = Path(job["asset"])
    function, _ = await load(asset, job["compute_unit"])
    expected = {name.removeprefix("seam."): value for name, value in arrays.items() if name.startswith("seam.")}
    steps = _calls(function, [{name.removeprefix(f"step.{step}."): value for name, value in arrays.items()
                               if name.startswith(f"step.{step}.")} for step in range(job["steps"])])
    search, state = _Search(await _operations(asset), expected, len(steps)), function.new_states(job["context"])
    for search.step, inputs in enumerate(steps):
        await function(inputs=inputs, state=state, capture=search)
    desk.put("located", {}, search.best())


def _calls(function: Function, steps: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """An asset that takes any count of tokens gets all in one call: only there do [S, heads] and [heads, S] differ."""
    if "input_ids" not in function.inputs or function.inputs["input_ids"].shape[1] > 0:
        return steps
    return [steps[-1] | {"input_ids": np.concatenate([step["input_ids"] for step in steps], axis=1)}]


async def _operations(asset: Path) -> list[int]:
    """Every odix operation id of the compiled program; debug information lists them for a RELEASE asset too."""
    from coreai.authoring.asset import AIModelAsset
    from coreai.runtime import AIModel

    compiled = Path(tempfile.mkdtemp(suffix=".aimodelx"))
    AIModelAsset.load(asset)._write_odix(compiled, enable_debug_info=True)
    records = json.loads((await AIModel.load(compiled))._debug_infos)
    return sorted({operation["odixId"] for record in records for operation in record.get("operations", [])
                   if record["identifier"].startswith("odix")})


if __name__ == "__main__":
    serve(_work)
