"""Headroom: over all cases, no activation of the twin comes nearer to the fp16 limit than the stated fraction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from harness.plan import ALL
from harness.subject import Subject
from harness.trace import decoder_seams, vision_seams
from harness.verdict import Outcome, Verdict

NAME = "headroom"
FP16_MAX = 65504.0


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """One row for all cases together: every seam, the inside of the layers included."""
    return {ALL: (*vision_seams(subject.geometry, inside=True), *decoder_seams(subject.geometry, inside=True))}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """The largest magnitude at each seam, as a fraction of 65504, with the case and the coordinate it stands at."""
    traces = {name: subject.twin_trace(name, subject.twin_tokens(name)) for name in subject.cases}
    return [_seam(subject, seam, traces) for seam in plan(subject)[case]]


def _seam(subject: Subject, seam: str, traces: Mapping[str, Mapping[str, np.ndarray]]) -> Verdict:
    held = {name: trace[seam] for name, trace in traces.items() if seam in trace}
    if not held:
        return Verdict(NAME, ALL, seam, Outcome.ERROR, "no case has a value at this seam")
    largest = {name: float(np.abs(array).max()) for name, array in held.items()}
    name = max(largest, key=lambda key: largest[key] if math.isfinite(largest[key]) else math.inf)
    value, limit = largest[name] / FP16_MAX, subject.bounds.limit(NAME, "fraction", seam)
    at = [int(part) for part in np.unravel_index(np.abs(held[name]).argmax(), held[name].shape)]
    good = math.isfinite(value) and value <= limit
    return Verdict(NAME, ALL, seam, Outcome.PASS if good else Outcome.FAIL,
                   f"largest magnitude {largest[name]:.4g} at {at} of case {name}, {value:.2%} of 65504", "fraction",
                   value if math.isfinite(value) else math.inf, limit, figures={"largest": largest, "at": at})
