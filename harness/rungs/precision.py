"""In which type the shipped program takes the mean of squares of its norms, and its softmaxes: the model's own is float32.

No comparison of layers sees this where the engine's rounding is larger. A norm in half is given the rows that the graph's
norms are probed with: its squares leave float16 at |x| > 255, which the next photo may hold. One that comes out right all the
same, because it divides by its largest value first, is no fault. A softmax in half is said and not blamed: its scores and
its weights are float16 on either side of it, so what can differ is only how wide a device sums within that one operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.engines.replay.precision import NORM, SOFTMAX, Taken
from harness.errors import HarnessError
from harness.probes.bench import rows
from harness.probes.formulas import layer_norm, rms_norm
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

SEAMS = ("norm.statistics", "attention.softmax")
KINDS = {"usual": 0, "large": 3, "spike": 5}
"""Of the rows of `probes.bench.rows`: those whose size decides, not their eps."""
SPAN = 6
NEAR = 2.0**-8
"""Relative: five roundings to float16 on the way from x to y, 2^-11 each, and half as much again."""


def precision(subject: Subject, case: str) -> list[Verdict]:
    """One verdict on all norms, one on all softmaxes, of both programs."""
    try:
        found = subject.taken()
    except HarnessError as error:
        return [Verdict("weights", case, seam, Outcome.SKIP, str(error)) for seam in SEAMS]
    norms, softmaxes = ([one for one in found if one.kind == kind] for kind in (NORM, SOFTMAX))
    return [_norms(case, norms), _softmaxes(case, softmaxes)]


def _norms(case: str, norms: Sequence[Taken]) -> Verdict:
    def verdict(outcome: Outcome, reason: str, wrong: int = 0) -> Verdict:
        return Verdict("weights", case, SEAMS[0], outcome, reason, "mismatches", float(wrong), 0.0, figures=_figures(norms))

    if not norms:
        return Verdict("weights", case, SEAMS[0], Outcome.SKIP, "the program shows no norm")
    narrow = [one for one in norms if one.narrow]
    try:
        lost = [(one, words) for one in narrow if (words := _lost(one))]
    except HarnessError as error:
        return verdict(Outcome.ERROR, f"{narrow[0].seam} takes its mean of squares in {narrow[0].dtype} and cannot be run "
                                      f"alone: {error}")
    said = _said(norms, "norms take their mean of squares")
    if lost:
        first, words = lost[0]
        return verdict(Outcome.FAIL, f"{first.seam} takes its mean of squares in {first.dtype}: {words}, and so it is with "
                                     f"{len(lost)} of {len(norms)} norms", len(lost))
    return verdict(Outcome.PASS, said + (f"; rows of up to 500 come out right in the {len(narrow)} narrow ones" if narrow
                                         else ""))


def _lost(norm: Taken) -> str:
    """What is wrong with what a norm makes of usual and large rows, or nothing."""
    given = rows(SPAN, norm.width, seed=11)[list(KINDS.values())].astype(np.float16).astype(np.float32)
    one, zero = np.ones(norm.width), np.zeros(norm.width)
    right = layer_norm(given, one, zero, 0.0) if norm.centred else rms_norm(given, one, 0.0)
    made = norm.of(given)
    for name, x, got, want in zip(KINDS, given, made, right):
        off = np.abs(got - want) / np.abs(want).max()
        off = np.where(np.isfinite(off), off, np.inf)
        if not off.max() <= NEAR:
            at = int(np.abs(off).argmax())
            return f"of a {name} row, |x| up to {np.abs(x).max():.3g}, it makes {got[at]:.4g} where {want[at]:.4g} is right"
    return ""


def _softmaxes(case: str, softmaxes: Sequence[Taken]) -> Verdict:
    if not softmaxes:
        return Verdict("weights", case, SEAMS[1], Outcome.SKIP, "the program shows no softmax")
    narrow = [one for one in softmaxes if one.narrow]
    reason = _said(softmaxes, "softmaxes are taken")
    if narrow:
        reason += (f"; {narrow[0].seam} is the first in {narrow[0].dtype}: how wide it sums is the device's choice, which no "
                   "comparison here sees")
    return Verdict("weights", case, SEAMS[1], Outcome.PASS, reason, "mismatches", 0.0, 0.0, figures=_figures(softmaxes))


def _said(found: Sequence[Taken], what: str) -> str:
    counts = Counter(one.dtype for one in found)
    inside = Counter(one.composite for one in found if one.composite)
    kernels = ", ".join(f"{count} in composite {name}" for name, count in inside.items())
    return f"{len(found)} {what} in " + ", ".join(f"{dtype}" if len(counts) == 1 else f"{dtype} ({count})"
                                                   for dtype, count in counts.items()) + (
        f"; {kernels}, where a runtime may have a kernel of its own, whose types nothing states" if kernels else "")


def _figures(found: Sequence[Taken]) -> dict[str, Any]:
    """Places by type, those that are not float32 by name."""
    return {"taken": dict(Counter(one.dtype for one in found)), "narrow": [one.seam for one in found if one.narrow]}
