"""What the vision and the decoder rung share: one pass on the graph's own values, one on the oracle's."""

from __future__ import annotations

from collections.abc import Sequence

from harness.ladder import judge
from harness.subject import Subject, offered
from harness.verdict import Outcome, Verdict


def judge_tower(rung: str, subject: Subject, case: str, seams: Sequence[str]) -> list[Verdict]:
    """Verdicts at `seams`; those that the graph does not offer are SKIPs, which the policy may or may not excuse."""
    have, lacking = offered(subject, case, seams)
    recorded = subject.recorded(case)
    ways = ("local", "accumulated") if subject.conversion(subject.grid(case)).injectable else ("accumulated",)
    candidates = {way: subject.graph_trace(case, way).only(have) for way in ways}
    verdicts = judge(rung, case, have, recorded.trace, candidates, subject.bounds,
                     regions=subject.regions(case)) if have else []
    return verdicts + [Verdict(rung, case, seam, Outcome.SKIP, "the graph under test does not offer this seam")
                       for seam in lacking]
