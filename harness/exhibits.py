"""What a report shows beside the verdicts: heat maps, the image itself, and what this machine's memory can carry."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from harness.bounds import Bounds
from harness.checkpoint import read_json
from harness.gate import digest_of
from harness.rungs.heat import token_errors
from harness.rungs.swept import swept
from harness.rungs.twinned import own
from harness.subject import Subject, streams
from harness.trace import decoder_seams, vision_seams

SIDE, LONGEST = 224, 90_000
"""Pixels of a thumbnail's longer side, and bytes that it may take; a report of eight cases stays below 1 MB of pictures."""
COPIED, REPEATS = 1 << 28, 5
POWER = Path(__file__).resolve().parent.parent / "reports" / "faults" / "power.json"
"""What `harness faults --power` has measured."""


def heat_rows(subject: Subject, name: str) -> list[dict[str, Any]]:
    """log10 of each token's relative error at every seam: the graph against the oracle, the engine against the twin.

    `part` says whose tokens they are: "decoder" (prompt and rollout) or "vision" (patches, block-major on `grid`). What
    was not computed in this run has no row.
    """
    try:
        streamed = streams(subject.conversion(subject.grid(name)))
    except Exception:  # a porter's factory may raise anything; the verdicts say what
        return []
    kinds: list[tuple[str, str, Callable[[], tuple[Any, Any, Sequence[str]]]]] = []
    rows: list[dict[str, Any]] = []
    if streamed:
        rows += _kept(subject, name, "accumulated", swept(subject).heat)
    else:
        kinds += [("decoder", way, lambda way=way: (subject.recorded(name).trace, subject.graph_trace(name, way),
                                                    decoder_seams(subject.geometry))) for way in ("accumulated", "local")]
    if subject.cases[name].engine and subject.shipped.started:
        if subject.twin_streams():
            rows += _kept(subject, name, "engine", own(subject).heat)
        else:
            kinds.append(("decoder", "engine", lambda: (subject.twin_trace(name, subject.twin_tokens(name)),
                                                        subject.engine_trace(name), decoder_seams(subject.geometry))))
    if subject.cases[name].images and not streamed:
        blocks = [seam for seam in vision_seams(subject.geometry) if seam.startswith(("vision.embed", "vision.layers"))]
        kinds.append(("vision", "accumulated", lambda: (subject.recorded(name).trace,
                                                        subject.graph_trace(name, "accumulated"), blocks)))
    return [*rows, *(row for kind in kinds for row in _row(subject, name, *kind))]


def _kept(subject: Subject, name: str, way: str, heat: Mapping[tuple[str, str], list[float | None]]) -> list[dict[str, Any]]:
    """The decoder's map of what streams: its errors were kept, its activations were not."""
    seams = [seam for seam in decoder_seams(subject.geometry) if (name, seam) in heat]
    return [{"case": name, "part": "decoder", "way": way, "grid": None, "seams": seams,
             "values": [heat[name, seam] for seam in seams]}] if seams else []


def _row(subject: Subject, name: str, part: str, way: str, made: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    try:
        reference, got, seams = made()
    except Exception:  # a porter's graph or a dead engine: the verdicts say what, the report just lacks a map
        return
    held = [seam for seam in seams if seam in reference and seam in got and len(reference[seam]) == len(got[seam])]
    if held:
        grid = list(subject.grid(name)) if part == "vision" else None
        yield {"case": name, "part": part, "way": way, "grid": grid, "seams": held,
               "values": [token_errors(reference[seam], got[seam]) for seam in held]}


def thumbnail(subject: Subject, name: str) -> str | None:
    """The case's image as the tower sees it, small, as a data URI; None without one."""
    from harness.host import load_image

    case = subject.cases[name]
    if not case.images:
        return None
    image = load_image(case.images[0], case.root)
    image.thumbnail((SIDE, SIDE))
    for quality in (85, 60, 30):
        held = io.BytesIO()
        image.save(held, "JPEG", quality=quality)
        if held.tell() <= LONGEST:
            return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
    return None


def bandwidth() -> dict[str, Any]:
    """What this machine's memory carries, in GB/s (1e9 bytes): the best of a few copies of 256 MiB on all cores.

    A copy reads and writes, so it moves twice its size; the same measure as STREAM's Copy (McCalpin, 1995).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source, target = (np.ones(COPIED // 8, dtype=np.float64) for _ in range(2))
    parts = list(zip(np.array_split(source, cores), np.array_split(target, cores)))
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(REPEATS):
            started = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            best = max(best, 2 * COPIED / (time.perf_counter() - started) / 1e9)
    return {"bandwidth_gb_s": round(best, 2),
            "bandwidth_by": f"best of {REPEATS} copies of {COPIED >> 20} MiB on {cores} core{'s' * (cores != 1)}, "
                            "reads and writes counted"}


def tensor_rows(verdicts: Sequence[Any]) -> list[dict[str, Any]]:
    """The weights rung as rows: part, tensor, outcome, how stored, and what quantization cost it."""
    rows = []
    for verdict in verdicts:
        figures: Mapping[str, Any] = verdict.figures
        rows.append({"part": verdict.case, "tensor": verdict.seam, "outcome": verdict.outcome.value,
                     "stored": figures.get("stored"), "error": figures.get("quantization", verdict.value),
                     "wrong": verdict.value, "reason": verdict.reason})
    return rows


def bounds_digest(bounds: Bounds) -> str:
    """Digest of the limits that judge graph and bundle; replay's belong to another engine."""
    return digest_of([{name: row[name] for name in ("rung", "metric", "limit", "seams", "engine")}
                      for row in bounds.record() if not row["engine"].startswith("replay")])


def power_rows(subject: Subject, path: Path = POWER) -> list[dict[str, Any]]:
    """Rows of `harness faults --power`, where that was run on this checkpoint under these bounds; none otherwise."""
    if not path.is_file():
        return []
    held = read_json(path)
    if held["checkpoint"]["digest"] != subject.checkpoint.digest or held["bounds"] != bounds_digest(subject.bounds):
        return []
    return [{name: row[name] for name in ("rung", "case", "seam", "way", "least")} for row in held["rows"]
            if held["mode"] == subject.mode or row["rung"] not in ("engine", "tokens")]
