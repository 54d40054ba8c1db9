"""Headroom: over all cases, no activation of the twin comes nearer to the fp16 limit than the stated fraction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from harness.plan import ALL
from harness.rungs import twinned
from harness.rungs.twinned import Peak, peak
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
    if subject.twin_streams():
        found = twinned.peaks(subject)
    else:
        found = {name: {seam: peak(array) for seam, array in subject.twin_trace(name, subject.twin_tokens(name)).items()}
                 for name in subject.cases}
    return [_seam(subject, seam, found) for seam in plan(subject)[case]]


def _seam(subject: Subject, seam: str, peaks: Mapping[str, Mapping[str, Peak]]) -> Verdict:
    held = {name: found[seam] for name, found in peaks.items() if seam in found}
    if not held:
        return Verdict(NAME, ALL, seam, Outcome.ERROR, "no case has a value at this seam")
    largest = {name: found.largest for name, found in held.items()}
    name = max(largest, key=lambda key: largest[key] if math.isfinite(largest[key]) else math.inf)
    value, limit, at = largest[name] / FP16_MAX, subject.bounds.limit(NAME, "fraction", seam), list(held[name].at)
    good = math.isfinite(value) and value <= limit
    return Verdict(NAME, ALL, seam, Outcome.PASS if good else Outcome.FAIL,
                   f"largest magnitude {largest[name]:.4g} at {at} of case {name}, {value:.2%} of 65504", "fraction",
                   value if math.isfinite(value) else math.inf, limit, figures={"largest": largest, "at": at})
