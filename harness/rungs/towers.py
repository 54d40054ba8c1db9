"""What the vision and the decoder rung share: one pass on the graph's own values, one on the oracle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.ladder import judge
from harness.rungs import sketched
from harness.rungs.swept import swept
from harness.subject import Subject, offered, streams
from harness.trace import Trace
from harness.verdict import Outcome, Verdict


def judge_tower(rung: str, subject: Subject, case: str, seams: Sequence[str]) -> list[Verdict]:
    """Verdicts at `seams`; those that the graph does not offer are SKIPs, which the policy may or may not excuse."""
    if streams(subject.conversion(subject.grid(case))) and not subject.by_sketch:
        return swept(subject).verdicts.get((rung, case), [])
    have, lacking = offered(subject, case, seams)
    recorded = subject.recorded(case)
    injectable = subject.conversion(subject.grid(case)).injectable and not subject.by_sketch
    ways = ("local", "accumulated") if injectable else ("accumulated",)
    candidates = {way: subject.graph_trace(case, way).only(have) for way in ways}
    if len(ways) == 2 and _ignores_taps(candidates, recorded.trace, have):
        return [Verdict(rung, case, seam, Outcome.ERROR, "the graph says it is injectable and ignores what a tap returns")
                for seam in seams]
    verdicts = judge(rung, case, have, recorded.trace, candidates, subject.bounds,
                     regions=subject.regions(case)) if have else []
    return verdicts + [Verdict(rung, case, seam, Outcome.SKIP, "the graph under test does not offer this seam")
                       for seam in lacking] + sketched.lacking(subject, rung, case, local=True)


def _ignores_taps(candidates: Mapping[str, Trace], oracle: Mapping[str, np.ndarray], seams: Sequence[str]) -> bool:
    """Whether handing in the oracle's values changed not one bit, though they differ from the graph's own."""
    local, own = (candidates[way] for way in ("local", "accumulated"))
    held = [seam for seam in seams if seam in local and seam in own]
    differs = any(seam in oracle and not np.array_equal(own[seam], oracle[seam]) for seam in held[:-1])
    return differs and len(held) > 2 and all(np.array_equal(local[seam], own[seam]) for seam in held)
