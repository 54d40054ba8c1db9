"""Tokens: at every step the engine's argmax is python's next token, so the two greedy rollouts are equal, 24/24."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.greedy import greedy
from harness.rungs import twinned
from harness.subject import Subject
from harness.verdict import Verdict

NAME = "tokens"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """One row for each case the bundle runs."""
    return {case: ("tokens",) for case in subject.engine_cases()}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """Verified under teacher forcing with the twin's greedy tokens."""
    tokens = subject.twin_tokens(case)
    first = subject.recorded(case).inputs.length - 1
    rows = slice(first, first + len(tokens))
    tie = subject.bounds.limit(NAME, "tie_margin", "tokens", subject.engine_key)
    engine = subject.engine_trace(case)
    twin = twinned.own(subject).rows[case] if subject.twin_streams() else subject.twin_trace(case, tokens)["logits"][rows]
    return [greedy(NAME, case, "tokens", np.array(tokens), twin, engine["logits"][rows], tie)]
