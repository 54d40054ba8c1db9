"""Scenes of broken seams: what stands there, what should, and the values it is computed from, rung by rung."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.bounds import Bound, Bounds
from harness.causes import Scene
from harness.engines import Request
from harness.graph.contract import positions
from harness.ladder import judge
from harness.localize import inherited
from harness.rungs.decode import by_layer, stepped
from harness.rungs.engine import SHARP, value_at
from harness.subject import Subject
from harness.trace import Trace, decoder_seams, layer_of, stream_input, vision_seams
from harness.verdict import Outcome, Verdict


def zoom(subject: Subject, culprit: Verdict) -> tuple[Verdict | None, Scene | None]:
    """The first inside seam of the broken block that fails on the oracle's own inputs; and the scene that may explain it.

    None where no inside can be had, or where the values at the seam are not at hand.
    """
    readers = {"vision": _inside, "decoder": _inside, "contract": _contract, "decode": _cache, "engine": _engine}
    if culprit.rung not in readers or inherited(culprit):
        return None, None
    try:
        return readers[culprit.rung](subject, culprit)
    except Exception:  # noqa: BLE001  a porter's graph may raise anything here; the seam is named all the same
        return None, None


def _inside(subject: Subject, culprit: Verdict) -> tuple[Verdict | None, Scene | None]:
    family = vision_seams if culprit.rung == "vision" else decoder_seams
    inside = [seam for seam in family(subject.geometry, inside=True) if seam.startswith(culprit.seam + ".")
              and not seam.endswith(".deepstack")]
    reference = inside_trace(subject, culprit.case, culprit.seam)
    trace = _fed(subject, culprit.case, [*inside, culprit.seam], reference)
    have = [seam for seam in inside if seam in trace]
    found = judge(culprit.rung, culprit.case, have, reference, {"local": trace.only(have)},
                  _Inside(subject.bounds, culprit.seam), regions=subject.regions(culprit.case)) if have else []
    op = next((verdict for verdict in found if verdict.outcome is Outcome.FAIL), None)
    seam = op.seam if op else culprit.seam
    return op, scene(subject, culprit.case, seam, trace[seam], reference) if seam in trace else None


def _contract(subject: Subject, culprit: Verdict) -> tuple[None, Scene | None]:
    """Planes and DeepStack additions of a case; of a probed operation what a prompt with an image shows of it."""
    case, seam = culprit.case, culprit.seam
    if case not in subject.cases:
        case = next(iter(subject.image_cases() or subject.cases))
        reference = inside_trace(subject, case, seam)
        trace = _fed(subject, case, [seam], reference)
        return None, scene(subject, case, seam, trace[seam], reference)
    recorded, trace = subject.recorded(case), subject.graph_trace(case, "accumulated")
    if seam.endswith(".positions"):
        found = trace["decoder.positions"] if seam == "graph.positions" else _host_planes(subject, case).T
        return None, scene(subject, case, "decoder.positions", found, {"decoder.positions": recorded.positions.T})
    tap = int(seam.removeprefix("deepstack."))
    name = f"decoder.layers.{tap:02d}"
    expected = trace[name].astype(np.float64)
    expected[subject.sequence(case) == subject.geometry.image_token] += trace[f"vision.deepstack.{tap}"]
    seam = f"{name}.deepstack"
    return None, scene(subject, case, seam, trace[seam], {**trace, seam: expected})


def _host_planes(subject: Subject, case: str) -> np.ndarray:
    geometry, grid = subject.geometry, subject.recorded(case).inputs.grid
    merged = (grid[1] // geometry.merge, grid[2] // geometry.merge) if grid else None
    host = subject.host(subject.sequence(case), geometry.image_token, geometry.vocab, merged)
    return positions(host.ids, geometry.vocab, host.shift_start, host.shift_amount, merged[1] if merged else 1)


def _made(seam: str) -> tuple[str, str] | None:
    """The layer and the seam whose values a cache row holds: `kv.keys.02` -> layer 02, its `attn.k_rope`."""
    cache = re.fullmatch(r"kv\.(keys|values)\.(\d+)", seam)
    if cache is None:
        return None
    layer = f"decoder.layers.{cache[2]}"
    return layer, f"{layer}.attn.{'k_rope' if cache[1] == 'keys' else 'v'}"


def _cache(subject: Subject, culprit: Verdict) -> tuple[None, Scene | None]:
    """The graph's cache after a prompt and single steps."""
    made, case = _made(culprit.seam), culprit.case
    if made is None:
        return None, None
    reference, got = inside_trace(subject, case, made[0]), by_layer(stepped(subject, case))
    return None, scene(subject, case, made[1], got[culprit.seam], reference, prompt=subject.recorded(case).inputs.length)


def _engine(subject: Subject, culprit: Verdict) -> tuple[None, Scene | None]:
    """A value read inside the bundle; what is right is the twin's, and so are the weights."""
    case, made = culprit.case.removesuffix(SHARP), _made(culprit.seam)
    bundle = subject.sharp if culprit.case.endswith(SHARP) else subject.shipped
    got, tokens = value_at(bundle.trace(case), culprit.seam), subject.twin_tokens(case)
    seam = made[1] if made else culprit.seam
    return None, scene(subject, case, seam, got, _twin_near(subject, case, tokens, seam),
                       subject.twin(subject.grid(case)).tensors(), tokens,
                       subject.recorded(case).inputs.length if made else None)


def _twin_near(subject: Subject, case: str, tokens: tuple[int, ...], seam: str) -> Trace:
    """The twin's values that those at a seam are computed from; all of them, where they are at hand."""
    if not subject.twin_streams():
        return subject.twin_trace(case, tokens)
    geometry, layer = subject.geometry, layer_of(seam)
    tower = seam.partition(".")[0]
    order = (*vision_seams(geometry, inside=True), *decoder_seams(geometry, inside=True))
    near = {name for name in order if layer_of(name) == layer and name.startswith(tower)} | {
        seam, stream_input(seam, geometry) if seam in order else None,
        *(name for name in vision_seams(geometry) if name.startswith(("vision.deepstack", "vision.merger")))}
    engine = subject.twin_engine(case)
    request = Request(subject.recorded(case).inputs, forced=tokens, seams=frozenset(near) & engine.seams())
    return next(engine.run([request]))


class _Inside(Bounds):
    """Bounds for the inside of a block: where none covers an inner seam, those of the block's output do."""

    def __init__(self, bounds: Bounds, block: str) -> None:
        super().__init__(bounds.all, bounds.made_for)
        self._block = block

    def at(self, rung: str, seam: str, engine: str = "") -> dict[str, Bound]:
        """Bounds by metric."""
        return super().at(rung, seam, engine) or super().at(rung, self._block, engine)


def _fed(subject: Subject, case: str, seams: Sequence[str], reference: Trace) -> Trace:
    """The graph at `seams`, fed with the oracle's values at every seam it has; empty where it cannot be fed."""
    conversion = subject.conversion(subject.grid(case))
    wanted = frozenset(seams) & set(conversion.seams())
    if not wanted or not conversion.injectable:
        return Trace()
    recorded = subject.recorded(case)
    request = Request(recorded.inputs, forced=tuple(map(int, recorded.rollout.tokens)), seams=wanted)
    return next(subject.graph(case).run([request], inject=reference, inject_at=list(reference)))


def scene(subject: Subject, case: str, seam: str, wrong: np.ndarray, right: Mapping[str, np.ndarray],
          weights: Mapping[str, Any] | None = None, tokens: Sequence[int] | None = None, prompt: int | None = None) -> Scene:
    """A broken seam with all that a guess may need: by default the checkpoint's weights and the oracle's tokens."""
    recorded, checkpoint = subject.recorded(case), subject.checkpoint
    names = frozenset(checkpoint.names() if weights is None else weights)

    def weight(name: str) -> np.ndarray:
        if name not in names:
            raise KeyError(name)
        return (checkpoint.tensor(name) if weights is None else weights[name]).double().numpy()

    ids = subject.sequence(case) if tokens is None else np.concatenate([recorded.inputs.ids, tokens])
    grid = recorded.inputs.grid
    return Scene(seam, wrong, right, subject.geometry, weight, recorded.positions, ids,
                 (grid[1], grid[2]) if grid else None, recorded.inputs.patches, prompt)


def inside_trace(subject: Subject, case: str, seam: str) -> Trace:
    """The oracle with the inside of the layer that `seam` belongs to; recorded once more for one case where it lacks it."""
    from harness.oracle import record

    layer, recorded = layer_of(seam), subject.recorded(case)
    block = re.match(r"(?:decoder|vision)\.(?:layers\.\d+|deepstack\.\d+|merger)|.*", seam)[0]
    inside = (name.startswith(block + ".") and not name.endswith(".deepstack") for name in recorded.seams)
    if not subject.by_sketch and any(inside):
        return recorded.trace
    with tempfile.TemporaryDirectory(prefix="harness-zoom-") as folder:
        oracle = record(subject.checkpoint, [subject.cases[case]], Path(folder) / "oracle",
                        device=subject.options.device, memory=subject.options.memory,
                        inside="all" if layer is None else frozenset({layer}))
        return oracle.case(case).trace
