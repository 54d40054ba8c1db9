"""Greedy tokens by verification: n tokens are equal if every position's argmax is the next token, by induction.

So one forward over prompt + n tokens stands for n forwards, and comparison goes on with the reference's tokens after a
flip: one tie hides nothing behind it.
"""

from __future__ import annotations

import numpy as np

from harness.metrics import top2_margin
from harness.verdict import Outcome, Verdict


def greedy(rung: str, case: str, seam: str, tokens: np.ndarray, reference: np.ndarray, candidate: np.ndarray,
           tie: float) -> Verdict:
    """Verdict on tokens [n] that the reference's logits [n, V] chose, against the candidate's logits [n, V].

    A flip is an explained tie only where the reference itself puts the candidate's choice within `tie` (logit units: the
    measured benign noise of this rung) of its own. The value is the count of flips that are not, the bound 0.
    """
    if candidate.shape != reference.shape or len(tokens) != len(reference):
        return Verdict(rung, case, seam, Outcome.FAIL,
                       f"logits {candidate.shape} and {len(tokens)} tokens where the reference has {reference.shape}")
    if not len(tokens):
        return Verdict(rung, case, seam, Outcome.ERROR, "no token was compared")
    if not np.isfinite(candidate).all():
        step = int(np.argwhere(~np.isfinite(candidate))[0][0])
        return Verdict(rung, case, seam, Outcome.FAIL, f"logits are not finite from step {step} on", "flips",
                       float("inf"), 0.0)
    choice = candidate.argmax(-1)
    steps = np.arange(len(tokens))
    gap = reference[steps, tokens] - reference[steps, choice]
    flips = np.flatnonzero(choice != tokens)
    broken = [int(step) for step in flips if gap[step] > tie]
    tied = [int(step) for step in flips if gap[step] <= tie]
    same = len(tokens) - len(flips)
    reason = f"{same}/{len(tokens)} tokens equal"
    if tied:
        reason += f"; {len(tied)} tie{'s' * (len(tied) > 1)} within {tie:.3g}, the first at step {tied[0]} " \
                  f"(reference gap {gap[tied[0]]:.3g})"
    if broken:
        step = broken[0]
        reason += f"; step {step} gives {choice[step]} where {tokens[step]} is right by {gap[step]:.3g} logits"
    figures = {"noise": float(np.abs(candidate - reference).max()), "choice": choice.tolist(),
               "tokens": np.asarray(tokens).tolist(), "ties": tied, "flips": broken,
               "gaps": [float(gap[step]) for step in flips], "tie": tie,
               "margins": [round(float(value), 5) for value in top2_margin(reference)]}
    return Verdict(rung, case, seam, Outcome.FAIL if broken else Outcome.PASS, reason, "flips", float(len(broken)), 0.0,
                   figures=figures)
