"""What a rung answers where a sketch stands for the oracle: which figures are lacking, by name, and never as a PASS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from harness.greedy import greedy
from harness.plan import NOT_IN_SKETCH
from harness.subject import Subject
from harness.verdict import Outcome, Verdict


def lacking_seams(subject: Subject) -> tuple[str, ...]:
    """What a rung plans besides its own seams."""
    return (NOT_IN_SKETCH,) if subject.by_sketch else ()


def lacking(subject: Subject, rung: str, case: str, local: bool = False) -> list[Verdict]:
    """The verdict on it: a SKIP that says what was not judged; none where the oracle is whole."""
    what = "local error (it needs the oracle's own values to feed a layer with), worst channel" if local else "worst channel"
    return [Verdict(rung, case, NOT_IN_SKETCH, Outcome.SKIP, f"judged by sketch: {what} and largest difference cannot be "
                    "told")] if subject.by_sketch else []


def no_divergence(rung: str, case: str) -> Verdict:
    """In the place of the verdict on KL."""
    return Verdict(rung, case, "kl", Outcome.SKIP, "judged by sketch: KL needs every logit of the oracle")


def greedy_by_top(rung: str, case: str, subject: Subject, rows: slice, tokens: Sequence[int], logits: np.ndarray,
                  tie: float) -> Verdict:
    """`greedy` against the largest logits that a sketch keeps. Of a choice that is none of them only the least gap is
    known: past the noise it is a flip, inside it nothing can be told."""
    reference, ours, steps = subject.recorded(case).logits(rows), logits[rows], np.arange(len(tokens))
    found = greedy(rung, case, "tokens", np.asarray(tokens), reference, ours, tie)
    choice = ours.argmax(-1)
    lost = (choice != tokens) & (reference[steps, choice] <= reference.min(axis=1))
    lost &= reference[steps, tokens] - reference[steps, choice] <= tie
    if found.outcome is Outcome.PASS and lost.any():
        return Verdict(rung, case, "tokens", Outcome.ERROR, f"judged by sketch: the choice at step {int(lost.argmax())} is "
                       "none of the largest logits kept, so whether it is a tie cannot be told")
    # The noise over all logits is not known, the rest is what the whole oracle gives.
    figures = {key: value for key, value in found.figures.items() if key != "noise"}
    return replace(found, reason=f"{found.reason}, by sketch", figures={**figures, "by": "sketch"})
