"""Quantized: what the twin loses against the oracle is measured at every seam and no more than the policy's price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.greedy import greedy
from harness.ladder import judge
from harness.rungs.decode import divergence
from harness.subject import Subject
from harness.trace import decoder_seams
from harness.verdict import Outcome, Verdict

NAME = "quantized"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Every decoder seam, KL and tokens, for each case the bundle runs; the mode itself once."""
    seams = ("tokens", "kl", *decoder_seams(subject.geometry))
    return {"mode": ("mode",), **{case: seams for case in subject.engine_cases()}}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """The twin, teacher-forced on the oracle's tokens, against the oracle."""
    mode = subject.mode
    if case == "mode":
        allowed = mode in subject.policy.modes
        return [Verdict(NAME, case, "mode", Outcome.PASS if allowed else Outcome.FAIL,
                        f"{mode} is {'' if allowed else 'not '}among the policy's modes")]
    recorded = subject.recorded(case)
    tokens, first = tuple(map(int, recorded.rollout.tokens)), recorded.inputs.length - 1
    trace = subject.twin_trace(case, tokens)
    rows = slice(first, first + len(tokens))
    tie = subject.bounds.limit(NAME, "tie_margin", "tokens", mode)
    seams = decoder_seams(subject.geometry)
    return [greedy(NAME, case, "tokens", recorded.rollout.tokens, recorded.trace["logits"][rows], trace["logits"][rows], tie),
            divergence(NAME, case, recorded.trace["logits"], trace["logits"],
                       subject.bounds.limit(NAME, "kl", "kl", mode)),
            *judge(NAME, case, seams, recorded.trace, {"": trace.only(seams)}, subject.bounds, engine=mode,
                   regions=subject.regions(case))]
