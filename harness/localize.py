"""Where a red run broke first: the first seam whose local error fails is the culprit, what fails after it a victim.

Local error feeds a layer with the oracle's own input, so a layer that only inherits an error passes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness.trace import layer_of
from harness.verdict import Outcome, Verdict

ORDER = ("contract", "inputs", "weights", "vision", "decoder", "decode", "quantized", "engine", "tokens", "headroom")


def first_broken(verdicts: Sequence[Verdict], rung: str, case: str) -> Verdict | None:
    """The culprit of one rung and case: the first FAIL by local error, or else the first FAIL at all.

    Verdicts stand in the order of computation. A seam that fails only by accumulated error inherited it.
    """
    failed = [verdict for verdict in verdicts
              if verdict.rung == rung and verdict.case == case and verdict.outcome is Outcome.FAIL]
    local = [verdict for verdict in failed if (verdict.metric or "").startswith("local.") or _local_excess(verdict)]
    return (local or failed or [None])[0]


def _local_excess(verdict: Verdict) -> bool:
    """Whether the local figure alone exceeds the bound; the verdict shows whichever stands furthest past its own."""
    if verdict.bound is None or not (verdict.metric or "").startswith("accumulated."):
        return False
    name = verdict.metric.removeprefix("accumulated.")
    return any(float(region.get(name, 0.0)) > verdict.bound for region in verdict.figures.get("local", {}).values())


def inherited(verdict: Verdict) -> bool:
    """Whether a seam fails by accumulated error alone: it computes rightly what it was handed wrongly."""
    return ("local" in verdict.figures and (verdict.metric or "").startswith("accumulated.")
            and not _local_excess(verdict))


def broken(verdicts: Sequence[Verdict]) -> Iterable[Verdict]:
    """One culprit for each rung and case that failed, rungs in order."""
    for rung in ORDER:
        for case in dict.fromkeys(verdict.case for verdict in verdicts if verdict.rung == rung):
            culprit = first_broken(verdicts, rung, case)
            if culprit is not None:
                yield culprit


def describe_tokens(verdict: Verdict) -> str:
    """Which tokens an error shows on, in words: "image tokens", "text tokens", "all tokens"."""
    way = "local" if "local" in verdict.figures else next(iter(verdict.figures), None)
    found = verdict.figures.get(way, {}) if way is not None else {}
    if not isinstance(found, Mapping) or not {"image", "text"} <= set(found):
        return ""
    image, text = (float(found[name]["rel_l2"]) for name in ("image", "text"))
    if image > 30 * text:
        return "image tokens"
    return "text tokens" if text > 30 * image else "all tokens"


def block_of(seam: str) -> str:
    """The block a seam belongs to, in words: `decoder.layers.03.attn.out` -> "decoder layer 3"."""
    layer = layer_of(seam)
    return f"{seam.split('.')[0]} layer {layer}" if layer is not None else seam
