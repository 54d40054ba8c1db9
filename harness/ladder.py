"""The ladder: ten rungs, one claim each; `judge` turns two traces and the bounds into Verdicts, one for every seam.

A fault smaller than the noise of a comparison hides in it, so no rung compares things that differ for two reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from harness import sketch
from harness.bounds import Bound, Bounds
from harness.errors import HarnessError
from harness.metrics import Distance, by_region
from harness.verdict import SEVERITY, Outcome, Verdict


@dataclass(frozen=True)
class Rung:
    """One claim: what is under test, against what, and the noise expected between the two."""

    name: str
    claim: str
    against: str
    noise: str


RUNGS = (
    Rung("contract", "extension ids, in-graph positions, rope shift and DeepStack slots are the port's contract",
         "HF get_rope_index and index arithmetic", "exact integers"),
    Rung("inputs", "the host makes the same ids, patches and grid as the HF processor",
         "frozen processed inputs", "exact, or 1/255 of a pixel"),
    Rung("weights", "every tensor of graph and bundle is the checkpoint's",
         "the checkpoint after the documented remap", "none; or half a quantization step"),
    Rung("vision", "every layer, merger and DeepStack output of the fp32 graph is the oracle's",
         "oracle, local and accumulated", "about 1e-6"),
    Rung("decoder", "every layer, DeepStack addition and the logits of the fp32 graph are the oracle's",
         "oracle, local and accumulated", "about 1e-6"),
    Rung("decode", "greedy tokens, KL and the KV cache, step by step, are the oracle's",
         "oracle", "exact, or an explained tie"),
    Rung("quantized", "quantization costs no more than the policy allows",
         "oracle", "the price of quantization"),
    Rung("engine", "the bundle's inner layers, KV cache and logits on the real runtime are the twin's",
         "twin", "fp16 rounding of this engine"),
    Rung("tokens", "the engine's greedy tokens are python's",
         "twin", "exact, or an explained tie"),
    Rung("headroom", "no activation comes near the fp16 limit", "65504", "a stated fraction"),
)
NAMES = tuple(rung.name for rung in RUNGS)


def judge(rung: str, case: str, expected: Sequence[str], reference: Mapping[str, np.ndarray],
          candidates: Mapping[str, Mapping[str, np.ndarray]], bounds: Bounds, *, engine: str = "",
          regions: Mapping[str, np.ndarray] | None = None) -> list[Verdict]:
    """One Verdict for each expected seam; a seam without an answer, or one nobody expected, is an ERROR.

    `candidates` holds one trace for each way of measuring ("local", "accumulated", or "" where there is one);
    `regions` are index arrays over the decoder's tokens ("image", "text").
    """
    if not expected:
        return [Verdict(rung, case, "*", Outcome.ERROR, "no seam was expected, so nothing was compared")]
    verdicts = [_judge_seam(rung, case, seam, reference, candidates, bounds, engine, regions or {}) for seam in expected]
    extra = sorted(set().union(*candidates.values()) - set(expected)) if candidates else []
    return verdicts + [Verdict(rung, case, seam, Outcome.ERROR, "the candidate answers a seam that nobody expected")
                       for seam in extra]


def _judge_seam(rung: str, case: str, seam: str, reference: Mapping[str, np.ndarray],
                candidates: Mapping[str, Mapping[str, np.ndarray]], bounds: Bounds, engine: str,
                regions: Mapping[str, np.ndarray]) -> Verdict:
    def error(reason: str) -> Verdict:
        return Verdict(rung, case, seam, Outcome.ERROR, reason)

    if seam not in reference:
        return error("the reference has no value at this seam")
    limits = bounds.at(rung, seam, engine)
    if not limits:
        whose = f" on {engine}" if engine else ""
        return error(f"no bound covers this seam{whose}: measure it with `harness calibrate`")
    measured: dict[str, dict[str, Distance]] = {}
    for way, trace in candidates.items():
        if seam not in trace:
            return error("not answered by the candidate" + (f" ({way})" if way else ""))
        theirs = regions if seam.startswith(("decoder.", "logits")) else {}
        try:
            compare = sketch.by_region if isinstance(reference[seam], sketch.Sketch) else by_region
            measured[way] = compare(reference[seam], trace[seam], theirs)
        except HarnessError as problem:
            return Verdict(rung, case, seam, Outcome.FAIL, problem.what)
    if any(found["all"].degenerate for found in measured.values()) or not measured:
        return error("the reference is zero or not finite here, so it proves nothing")
    return decide(rung, case, seam, measured, limits)


def decide(rung: str, case: str, seam: str, measured: Mapping[str, Mapping[str, Distance | sketch.Estimate]],
           limits: Mapping[str, Bound]) -> Verdict:
    """The verdict of one seam from its distances by way and region: the figure nearest to, or furthest past, its bound.

    A figure of a sketch is known within an interval: all of it must lie within the bound to PASS, and past it to FAIL;
    what the bound cuts in two is an ERROR, undecided.
    """
    rows = [row for metric, bound in limits.items() for row in _rows(metric, bound, measured)]
    figures: dict[str, Any] = {way: {region: distance.figures() for region, distance in found.items()}
                               for way, found in measured.items()}
    if not rows:
        return Verdict(rung, case, seam, Outcome.ERROR, "no bounded metric was measured here", figures=figures)
    row = max(rows, key=lambda row: (SEVERITY[row.outcome], _excess(row.high, row.limit)))
    where = "" if row.region == "all" else f" over {row.region} tokens"
    relation = {Outcome.PASS: "within", Outcome.FAIL: "exceeds", Outcome.ERROR: "may or may not exceed"}[row.outcome]
    by = f" by sketch, {row.low:.3g} to {row.high:.3g}," if isinstance(row.distance, sketch.Estimate) else ""
    reason = f"{row.metric} {row.value:.3g}{where}{by} {relation} {row.limit:.3g}"
    if row.distance.candidate_nonfinite:
        reason = f"{row.distance.candidate_nonfinite} values are not finite"
        reason += f", the first at {list(row.distance.max_abs_at)}" if not by else ""
    elif row.outcome is Outcome.FAIL:
        reason += f"; worst token {row.distance.worst_token_at}"
        reason += "" if by else f", largest difference {row.distance.max_abs:.3g} at {list(row.distance.max_abs_at)}"
    return Verdict(rung, case, seam, row.outcome, reason, row.metric, row.value, row.limit, figures=figures)


class _Row(NamedTuple):
    low: float
    value: float
    high: float
    limit: float
    metric: str
    region: str
    distance: Distance | sketch.Estimate

    @property
    def outcome(self) -> Outcome:
        if self.low > self.limit:
            return Outcome.FAIL
        return Outcome.PASS if self.high <= self.limit else Outcome.ERROR


def _rows(metric: str, bound: Bound, measured: Mapping[str, Mapping[str, Distance | sketch.Estimate]]) -> Iterable[_Row]:
    way, _, name = metric.rpartition(".")
    if name not in Distance.__dataclass_fields__:
        raise HarnessError(f"bound on {metric!r}, which is no distance between two activations", where="bounds",
                           fix="narrow its seams, or name a field of metrics.Distance")
    for region, distance in measured.get(way, {}).items():
        if not isinstance(distance, sketch.Estimate):
            yield _Row(*[getattr(distance, name)] * 3, bound.limit, metric, region, distance)
        elif name in distance.high:
            yield _Row(distance.low[name], getattr(distance, name), distance.high[name], bound.limit, metric, region,
                       distance)


def _excess(value: float, limit: float) -> float:
    """How many times the bound a value is; an exact bound of 0 is exceeded infinitely by anything above it."""
    if limit > 0:
        return value / limit
    return 0.0 if value == 0 else float("inf")


def exact(rung: str, case: str, seam: str, reference: np.ndarray, candidate: np.ndarray, what: str) -> Verdict:
    """Verdict on integers: equal or not, with the first difference. `what` names the thing in words."""
    if reference.shape != candidate.shape:
        return Verdict(rung, case, seam, Outcome.FAIL, f"{what}: shape {candidate.shape}, expected {reference.shape}",
                       "mismatches", float(max(reference.size, candidate.size)), 0.0)
    if reference.size == 0:
        return Verdict(rung, case, seam, Outcome.ERROR, f"{what}: nothing to compare")
    wrong = np.argwhere(reference != candidate)
    if not len(wrong):
        return Verdict(rung, case, seam, Outcome.PASS, f"{what}: {reference.size} values equal", "mismatches", 0.0, 0.0)
    at = tuple(int(part) for part in wrong[0])
    return Verdict(rung, case, seam, Outcome.FAIL,
                   f"{what}: {len(wrong)} of {reference.size} differ, the first at {list(at)}: "
                   f"{candidate[at]} where {reference[at]} is right", "mismatches", float(len(wrong)), 0.0,
                   figures={"first": list(at)})
