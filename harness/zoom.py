"""From the first broken seam into its layer, until the op is named: every op of the layer is fed the oracle's values.

With the oracle injected at each inside seam, the error left at a seam was made between it and the one before.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.engines import Request
from harness.ladder import judge
from harness.localize import block_of, broken, describe_tokens, inherited
from harness.options import Options
from harness.subject import Subject
from harness.trace import Trace, decoder_seams, layer_of, vision_seams
from harness.verdict import Outcome, Verdict

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
}


def localize(subject: Subject, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """One row for each broken rung, about its first broken case: seam, op, size, tokens, cause, command."""
    rows, seen = [], set()
    for culprit in broken(verdicts):
        if culprit.rung in seen:
            continue
        seen.add(culprit.rung)
        op = _op(subject, culprit)
        place = op.seam if op else culprit.figures.get("place", culprit.seam)
        shown = op or culprit
        rows.append({"rung": culprit.rung, "case": culprit.case, "seam": culprit.seam, "block": block_of(culprit.seam),
                     "op": place if place != culprit.seam else None, "metric": shown.metric, "value": shown.value,
                     "bound": shown.bound, "reason": shown.reason, "tokens": describe_tokens(culprit),
                     "inherited": inherited(culprit), "cause": culprit.cause or _explain(culprit, place),
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


def _op(subject: Subject, culprit: Verdict) -> Verdict | None:
    """The first inside seam of the broken block that fails on the oracle's own inputs, or None where none can be had."""
    if culprit.rung not in ("vision", "decoder"):
        return None
    family = vision_seams if culprit.rung == "vision" else decoder_seams
    inside = [seam for seam in family(subject.geometry, inside=True) if seam.startswith(culprit.seam + ".")
              and not seam.endswith(".deepstack")]
    try:
        return next((verdict for verdict in _inside(subject, culprit, inside) if verdict.outcome is Outcome.FAIL), None)
    except Exception:  # noqa: BLE001  a porter's graph may raise anything here; the seam is named all the same
        return None


def _inside(subject: Subject, culprit: Verdict, inside: Sequence[str]) -> list[Verdict]:
    conversion = subject.conversion(subject.grid(culprit.case))
    offered = set(conversion.seams())
    seams = [seam for seam in inside if seam in offered]
    if not seams or not conversion.injectable:
        return []
    reference = inside_trace(subject, culprit.case, culprit.seam)
    recorded = subject.recorded(culprit.case)
    request = Request(recorded.inputs, forced=tuple(map(int, recorded.rollout.tokens)), seams=frozenset(seams))
    trace = next(subject.graph(culprit.case).run([request], inject=reference, inject_at=list(reference)))
    return judge(culprit.rung, culprit.case, seams, reference, {"local": trace.only(seams)}, subject.bounds,
                 regions=subject.regions(culprit.case))


def inside_trace(subject: Subject, case: str, seam: str) -> Trace:
    """The oracle with the inside of the layer that `seam` belongs to; recorded once more for one case where it lacks it."""
    from harness.oracle import record

    layer, recorded = layer_of(seam), subject.recorded(case)
    if any(name.startswith(seam + ".") and not name.endswith(".deepstack") for name in recorded.seams):
        return recorded.trace
    with tempfile.TemporaryDirectory(prefix="harness-zoom-") as folder:
        oracle = record(subject.checkpoint, [subject.cases[case]], Path(folder) / "oracle",
                        device=subject.options.device, inside="all" if layer is None else frozenset({layer}))
        return oracle.case(case).trace
