"""Size and error of a sketch on recorded activations.

    python reports/bench/sketch_error.py ORACLE SKETCH [CHECKPOINT CASES]

At every seam of every case candidates are judged by the whole record and by the sketch: the values rounded to float16 (an
engine's rounding), noise of 1e-6 of each token's norm, and one token that is 1 % off; with CHECKPOINT and CASES also our
float32 graph and its int8hu twin, run layer by layer at every inner seam. Prints one JSON object: bytes, how many times
smaller each kind of seam is, and for relative L2, cosine gap and worst token how far the estimates are off (median, 99th
percentile, largest) and how many true values lie outside their interval, which may be 1 in 10 000.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness import metrics, sketch
from harness.store import Oracle, open_oracle
from harness.store.sketches import _split

METRICS = ("rel_l2", "cosine_gap", "worst_token")


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def candidates(r: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Made of the record itself."""
    norms = np.linalg.norm(r.reshape(len(r), -1), axis=1).reshape(-1, *[1] * (r.ndim - 1))
    noise = rng.standard_normal(r.shape, dtype=np.float32)
    yield "float16", np.clip(r, -65504, 65504).astype(np.float16).astype(np.float32)
    yield "noise 1e-6", r + (1e-6 * norms / np.sqrt(r[0].size) * noise).astype(np.float32)
    off = r.copy()
    off[len(r) // 2] *= 1.01
    yield "one token", off


class Tally:
    """What is measured, gathered."""

    def __init__(self) -> None:
        self.apart: dict[str, list[float]] = {}
        self.outside: list[str] = []
        self.bytes: dict[str, list[int]] = {}
        self.figures = self.seams = 0
        self.seconds = [0.0, 0.0]

    def kind(self, name: str, r: np.ndarray, held: sketch.Sketch) -> None:
        """Size of one seam's sketch by kind and shape, BESIDE and all."""
        key = f"{re.sub(r'[.][0-9]+', '', name)} {list(r.shape)}"
        ours = held.squares.nbytes + held.tokens.nbytes + held.whole.nbytes + sketch.BESIDE
        self.bytes[key] = [r.size * 4, ours]
        self.seams += 1

    def judge(self, seam: str, kind: str, r: np.ndarray, c: np.ndarray, held: sketch.Sketch) -> None:
        """One comparison by both."""
        started = time.perf_counter()
        true = metrics.distance(r, c)
        self.seconds[0] += time.perf_counter() - started
        started = time.perf_counter()
        found = sketch.by_region(held, c, {})["all"]
        self.seconds[1] += time.perf_counter() - started
        if true.rel_l2 < 4 * sketch.FLOOR:
            return
        for metric in METRICS:
            value = getattr(true, metric)
            if metric == "cosine_gap" and value < 1e-15:
                continue
            self.figures += 1
            self.apart.setdefault(f"{metric}, {kind}", []).append(abs(getattr(found, metric) / value - 1))
            if not found.low[metric] * (1 - 1e-6) <= value <= found.high[metric] * (1 + 1e-6):
                self.outside.append(f"{kind} {seam} {metric}: {value:.4g} not in {found.low[metric]:.4g} "
                                    f".. {found.high[metric]:.4g}")


def run_graph(root: Path, cases: Path, oracle: Oracle, sketched: Oracle, tally: Tally) -> None:
    """Our float32 graph and its int8hu twin on the oracle's tokens, each seam judged as it comes."""
    from harness.cases import load_cases
    from harness.checkpoint import open_checkpoint
    from harness.engines import Request
    from harness.engines.torch_graph import TorchGraph
    from harness.graph.quantize import RECIPES, dequantize, expected_codes
    from harness.graph.streamed import StreamedReference

    checkpoint, recipe = open_checkpoint(str(root)), RECIPES["int8hu"]
    for case in load_cases(cases):
        recorded, held = oracle.case(case.name), sketched.case(case.name).trace
        forced = tuple(map(int, recorded.rollout.tokens))
        for kind in ("fp32 graph", "int8hu twin"):
            model = StreamedReference(checkpoint, tuple(recorded.inputs.grid[1:]))
            if kind == "int8hu twin":
                plain = model.reader.fill

                def quantized(name: str, target: Any, *rest: Any, plain: Any = plain) -> None:
                    plain(name, target, *rest)
                    if (scheme := recipe.scheme(name)) is not None:
                        target.copy_(dequantize(*expected_codes(target, scheme)))

                model.reader.fill = quantized
            engine = TorchGraph(model, checkpoint.geometry)
            seams = frozenset(recorded.seams) & engine.seams()

            def sink(seam: str, values: np.ndarray, kind: str = kind) -> None:
                if seam in held:
                    tally.judge(seam, kind, recorded.load((seam,))[seam], values, held[seam])

            next(engine.run([Request(recorded.inputs, forced=forced, seams=seams)], sink=sink))


def spread(values: list[float]) -> Mapping[str, float]:
    """How far off."""
    return {"median": round(float(np.median(values)), 4), "p99": round(float(np.quantile(values, 0.99)), 4),
            "largest": round(max(values), 4), "figures": len(values)}


def main(whole: str, small: str, *graph: str) -> None:
    """Measure and print."""
    oracle, sketched, rng = Oracle.open(Path(whole)), open_oracle(Path(small)), np.random.default_rng(0)
    tally = Tally()
    for name in oracle.cases:
        case, kept = oracle.case(name), sketched.case(name).trace
        for seam in case.seams:
            for part, r in _split(seam, case.load((seam,))[seam]).items():
                r = np.ascontiguousarray(r)
                tally.kind(part, r, kept[part])
                for kind, c in candidates(r, rng):
                    tally.judge(part, kind, r, c, kept[part])
    if graph:
        run_graph(Path(graph[0]), Path(graph[1]), oracle, sketched, tally)
    sizes = size(Path(whole)), size(Path(small))
    print(json.dumps({
        "bytes": sizes, "smaller": round(sizes[0] / sizes[1], 1), "seams": tally.seams, "figures": tally.figures,
        "outside_interval": tally.outside, "seconds_by_record_and_by_sketch": [round(one, 1) for one in tally.seconds],
        "relative_error_of_estimates": {key: spread(values) for key, values in tally.apart.items()},
        "times_smaller": {key: round(before / after, 1) for key, (before, after) in tally.bytes.items()}}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
