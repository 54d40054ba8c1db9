"""Quantized: what the twin loses against the oracle is measured at every seam and no more than the policy's price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.greedy import greedy
from harness.ladder import judge
from harness.rungs import sketched
from harness.rungs.decode import divergence
from harness.subject import Subject
from harness.trace import decoder_seams
from harness.verdict import Outcome, Verdict

NAME = "quantized"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Every decoder seam, KL and tokens, for every case; the mode itself once."""
    seams = (*decoder_seams(subject.geometry), "kl", "tokens", *sketched.lacking_seams(subject))
    return {"mode": ("mode",), **{case: seams for case in subject.cases}}


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
    verdicts = judge(NAME, case, seams, recorded.trace, {"": trace.only(seams)}, subject.bounds, engine=mode,
                     regions=subject.regions(case))
    if subject.by_sketch:
        return [*verdicts, sketched.no_divergence(NAME, case), *sketched.lacking(subject, NAME, case),
                sketched.greedy_by_top(NAME, case, subject, rows, recorded.rollout.tokens, trace["logits"], tie)]
    oracle, price = recorded.trace["logits"], subject.bounds.limit(NAME, "kl", "kl", mode)
    return [*verdicts, divergence(NAME, case, oracle, trace["logits"], price),
            greedy(NAME, case, "tokens", recorded.rollout.tokens, oracle[rows], trace["logits"][rows], tie)]
