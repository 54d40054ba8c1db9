"""The report of a failure: the first broken seam of each rung, its op, size, tokens, probable cause, and one command.

With the oracle injected at each inside seam, the error left at a seam was made between it and the one before.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from harness.causes import explain
from harness.causes.rows import extent
from harness.localize import block_of, broken, describe_tokens, inherited
from harness.options import Options
from harness.scenes import zoom
from harness.subject import Subject
from harness.verdict import Verdict

CAUSES = {
    "decoder.embed": "the text table, an id off by one, or image rows in another order",
    "input_norm": "a norm's weight, its eps, or the norm of another layer",
    "post_norm": "a norm's weight, its eps, or the norm of another layer",
    "q_norm": "q_proj (row order, scale axis) or q_norm's weight or eps",
    "k_norm": "k_proj (row order under GQA, scale axis) or k_norm's weight or eps",
    "attn.v": "v_proj, or k and v exchanged",
    "q_rope": "rotary positions: h and w exchanged, a section boundary, theta, or the pairing of lanes",
    "k_rope": "rotary positions: h and w exchanged, a section boundary, theta, or the pairing of lanes",
    "context": "the attention itself: scale, mask, softmax, the grouping of heads, or the cache",
    "attn.out": "the output projection: transposed, a missing bias, or a wrong scale axis",
    "gate": "gate_proj, or gate and up exchanged",
    "up": "up_proj, or gate and up exchanged",
    "mlp.act": "the activation function or its flavour (tanh or exact)",
    "mlp.out": "the last projection of the MLP: a missing bias, a stale row, or a wrong scale axis",
    "fc1": "the first projection of the MLP or its bias",
    "norm1": "a norm's weight, bias or eps",
    "norm2": "a norm's weight, bias or eps",
    ".norm": "a norm's weight, its eps, or a norm on the wrong side of the 2x2 join",
    "deepstack": "DeepStack: rows shifted, a tap exchanged, a layer late, or added to text tokens",
    "vision.embed": "the patch embedding (a temporal slice, the bias) or the interpolated positions",
    "merger": "a merger: order of the 2x2 neighbours, a tap exchanged, or GELU's flavour",
    "logits": "the head: tied by mistake, a stale row, or a wrong quantization",
    "kv.": "what the cache is given or where it is written: slot, rotation, or another tensor",
    "layers.": "an operation of this layer: what enters it is right",
}


def localize(subject: Subject, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """One row for each broken rung, about its first broken case: seam, op, size, tokens, cause, command."""
    rows, seen = [], set()
    for culprit in broken(verdicts):
        if culprit.rung in seen:
            continue
        seen.add(culprit.rung)
        op, found = zoom(subject, culprit)
        place = op.seam if op else culprit.seam
        shown = op or culprit
        cause, tokens = (explain(found), extent(found)) if found else (None, "")
        rows.append({"rung": culprit.rung, "case": culprit.case, "seam": culprit.seam, "block": block_of(culprit.seam),
                     "op": place if place != culprit.seam else None, "metric": shown.metric, "value": shown.value,
                     "bound": shown.bound, "reason": shown.reason, "tokens": tokens or describe_tokens(culprit),
                     "inherited": inherited(culprit), "cause": culprit.cause or cause or _explain(culprit, place),
                     "reproduce": reproduce(subject, culprit)})
    return rows


def reproduce(subject: Subject, verdict: Verdict) -> str:
    """The one command that shows this verdict again: the options that differ from their defaults."""
    words = ["harness", "ladder", *([subject.options.checkpoint] if subject.options.checkpoint else []),
             "--rung", verdict.rung]
    if verdict.case in subject.cases:
        words += ["--case", verdict.case]
    plain = Options()
    for name in ("revision", "graph", "bundle", "vision_bundle", "oracle", "mode", "grid", "cases", "bounds", "policy"):
        value = getattr(subject.options, name)
        if value != getattr(plain, name):
            words += [f"--{name.replace('_', '-')}", "x".join(map(str, value)) if name == "grid" else str(value)]
    return shlex.join(words)


def _explain(culprit: Verdict, seam: str) -> str | None:
    if inherited(culprit):
        return "inherited: on the oracle's own input every seam of this rung is right, so look at the rungs above"
    return next((cause for part, cause in CAUSES.items() if part in seam), None)
