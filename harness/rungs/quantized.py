"""Quantized: what the twin loses against the oracle is measured at every seam and no more than the policy's price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.greedy import greedy
from harness.ladder import judge
from harness.rungs import sketched, twinned
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
    if subject.twin_streams():
        return twinned.forced(subject).verdicts(case)
    trace, reference = subject.twin_trace(case, subject.oracle_tokens(case)), subject.recorded(case).trace
    return [*(verdict for seam in decoder_seams(subject.geometry) for verdict in at(subject, case, seam, reference, trace)),
            *choices(subject, case, reference, trace["logits"])]


def at(subject: Subject, case: str, seam: str, oracle: Mapping[str, Any], twin: Mapping[str, np.ndarray]) -> list[Verdict]:
    """The verdict at one seam."""
    given = {seam: twin[seam]} if seam in twin else {}
    return judge(NAME, case, [seam], oracle, {"": given}, subject.bounds, engine=subject.mode,
                 regions=subject.regions(case))


def choices(subject: Subject, case: str, oracle: Mapping[str, Any], logits: np.ndarray) -> list[Verdict]:
    """KL and tokens, from the twin's logits [T, V]."""
    recorded, mode = subject.recorded(case), subject.mode
    tokens, first = recorded.rollout.tokens, recorded.inputs.length - 1
    rows = slice(first, first + len(tokens))
    tie = subject.bounds.limit(NAME, "tie_margin", "tokens", mode)
    if subject.by_sketch:
        return [sketched.no_divergence(NAME, case), *sketched.lacking(subject, NAME, case),
                sketched.greedy_by_top(NAME, case, subject, rows, tokens, logits, tie)]
    return [divergence(NAME, case, oracle["logits"], logits, subject.bounds.limit(NAME, "kl", "kl", mode)),
            greedy(NAME, case, "tokens", tokens, oracle["logits"][rows], logits[rows], tie)]
