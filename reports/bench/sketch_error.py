"""Size and error of a sketch on recorded activations.

    python reports/bench/sketch_error.py ORACLE SKETCH

At every seam of every case three candidates are judged by the whole record and by the sketch: the values rounded to
float16 (an engine's rounding), noise of 1e-6 of each token's norm (a healthy float32 graph), and one token that is 1 %
off. Prints one JSON object: bytes, and for relative L2 and worst token how far the estimates are off (median, 99th
percentile, largest) and how many true values lie outside their interval.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from harness import metrics, sketch
from harness.store import Oracle, open_oracle
from harness.store.sketches import _split


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def candidates(r: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The three."""
    norms = np.linalg.norm(r.reshape(len(r), -1), axis=1).reshape(-1, *[1] * (r.ndim - 1))
    noise = rng.standard_normal(r.shape, dtype=np.float32)
    off = r.copy()
    off[len(r) // 2] *= 1.01
    return {"float16": np.clip(r, -65504, 65504).astype(np.float16).astype(np.float32),
            "noise 1e-6": r + (1e-6 * norms / np.sqrt(r[0].size) * noise).astype(np.float32), "one token": off}


def main(whole: str, small: str) -> None:
    """Measure and print."""
    oracle, sketched, rng = Oracle.open(Path(whole)), open_oracle(Path(small)), np.random.default_rng(0)
    apart: dict[str, list[float]] = {}
    outside, figures, seconds, seams = 0, 0, 0.0, 0
    for name in oracle.cases:
        case, kept = oracle.case(name), sketched.case(name).trace
        for seam in case.seams:
            for part, r in _split(seam, case.load((seam,))[seam]).items():
                seams += 1
                for kind, c in candidates(np.ascontiguousarray(r), rng).items():
                    true = metrics.distance(r, c)
                    started = time.perf_counter()
                    found = sketch.by_region(kept[part], c, {})["all"]
                    seconds += time.perf_counter() - started
                    for metric in ("rel_l2", "worst_token"):
                        value = getattr(true, metric)
                        if value < 4 * sketch.FLOOR:
                            continue
                        figures += 1
                        apart.setdefault(f"{metric}, {kind}", []).append(abs(getattr(found, metric) / value - 1))
                        outside += not found.low[metric] <= value <= found.high[metric]
    spread = {key: {"median": round(float(np.median(values)), 4), "p99": round(float(np.quantile(values, 0.99)), 4),
                    "largest": round(max(values), 4), "figures": len(values)} for key, values in apart.items()}
    sizes = size(Path(whole)), size(Path(small))
    print(json.dumps({"bytes": sizes, "smaller": round(sizes[0] / sizes[1], 1), "seams": seams, "figures": figures,
                      "outside_interval": outside, "seconds_a_comparison": round(seconds / (3 * seams), 4),
                      "relative_error_of_estimates": spread}))


if __name__ == "__main__":
    main(*sys.argv[1:])
