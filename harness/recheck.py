"""A record judged again from its own figures: what each verdict must have been, what is missing, which bounds prove nothing.

No model is run. What stands here catches a record that contradicts itself, the geometry, or the bounds it is held
against. A record made up whole and consistently is caught by a signature only: see `harness.signing`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from harness.bounds import Bound, Bounds, bounds_from, engine_key
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.ladder import decide
from harness.metrics import Distance
from harness.plan import SHARP, Kind, planned
from harness.policy import Policy
from harness.run import Run
from harness.sketch import Estimate
from harness.verdict import Outcome, Verdict

FP16_MAX = 65504.0
EXACT = {("contract", "mismatches"): 0.0, ("contract", "roundings"): 1.0, ("inputs", "mismatches"): 0.0,
         ("inputs", "max_abs"): 2 / 255 * (1 + 1e-4), ("weights", "mismatches"): 0.0, ("weights", "tensors"): 0.0,
         ("decode", "flips"): 0.0, ("quantized", "flips"): 0.0, ("tokens", "flips"): 0.0}
"""Bounds that no file sets: a record that holds another one was widened by hand."""
SHAPE = ("rel_l2", "worst_token", "cosine_gap")
CEILINGS = {"vision": 0.01, "decoder": 0.01, "decode": 0.01, "quantized": 1.0, "engine": 1.0}
"""At 1 an answer of zeros passes; of float32 against float32, a hundredth is 1e5 times the rounding."""
ONE = 1 + 1e-9


def recheck(run: Run, policy: Policy, passed: bool) -> Iterator[str]:
    """Sentences about what does not hold; none where everything does. `passed`: whether the record folds to a PASS.

    Only a run that passes must be whole: what an honest FAIL or ERROR leaves unmeasured is said by its verdicts.
    """
    try:
        bounds = bounds_from(run.bounds)
    except HarnessError as error:
        yield str(error)
        return
    for verdict in run.verdicts:
        yield from (f"{verdict.id} {words}" for words in _verdict(run, policy, bounds, verdict))
    if passed:
        yield from _proves_nothing(bounds)
        yield from missing(run)


def missing(run: Run) -> Iterator[str]:
    """Seams that a whole run of this geometry and these cases answers, and this one does not."""
    subject = run.subject
    try:
        geometry = Geometry.from_record(_table(_table(subject.get("checkpoint")).get("geometry")))
    except HarnessError as error:
        yield f"what the run must have answered cannot be told: {error}"
        return
    kinds = {row["name"]: Kind(bool(row.get("image")), row.get("engine") is not False) for row in map(_table, run.cases)
             if isinstance(row.get("name"), str)}
    judged = {verdict.case for verdict in run.verdicts if verdict.rung == "decoder"}
    yield from (f"case {name!r} was judged and is not described" for name in sorted(judged - set(kinds)))
    exported = subject.get("exported", any(verdict.case.endswith(SHARP) for verdict in run.verdicts))
    if not any(kind.engine for kind in kinds.values()):
        yield "no case was run on the engine"
    by_sketch = "sketch_of" in _table(subject.get("oracle"))
    plan = planned(geometry, kinds, str(subject.get("mode")), bool(exported), by_sketch)
    if not by_sketch and any(_sketched(verdict) for verdict in run.verdicts):
        yield "figures were judged by sketch, and the record names a whole oracle"
    counted = Counter((verdict.rung, verdict.case, verdict.seam) for verdict in run.verdicts)
    yield from (f"{rung}[{case}-{seam}] stands {count} times in the record, a rung answers once"
                for (rung, case, seam), count in counted.items() if count > 1)
    yield from (f"{rung}[{case}] is no case that such a run judges"
                for rung, case in sorted({key[:2] for key in counted} - set(plan)))
    for (rung, case), seams in plan.items():
        lacking = [seam for seam in seams if (rung, case, seam) not in counted]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            yield f"{rung}[{case}-{lacking[0]}]{more} must be answered in a whole run and is not"


def weaker(run: Run, bounds: Bounds, least: Bounds) -> Iterator[str]:
    """Where the run's bounds let more pass than others: at each seam, the bound in force is wider or there is none.

    What is in force is compared, not rows: a row put behind another overrides it under any pattern.
    """
    seen = set()
    for verdict in run.verdicts:
        key = (verdict.rung, verdict.seam, _engine(run, verdict))
        if key in seen:
            continue
        seen.add(key)
        ours = bounds.at(*key)
        for metric, row in least.at(*key).items():
            name = f"the bound on {metric} at {verdict.seam} of {verdict.rung}"
            if metric not in ours:
                yield f"{name} is missing; it should be {row.limit:.3g}"
            elif ours[metric].limit > row.limit:
                yield f"{name} is {ours[metric].limit:.3g}, wider than {row.limit:.3g}"


def _proves_nothing(bounds: Bounds) -> Iterator[str]:
    for row in bounds.all:
        ceiling = CEILINGS.get(row.rung)
        if ceiling is not None and row.metric.rpartition(".")[2] in SHAPE and row.limit >= ceiling:
            yield f"the bound {row.limit:.3g} on {row.metric} of {row.rung} {row.seams} proves nothing: it must lie below " \
                  f"{ceiling:g}"


def _verdict(run: Run, policy: Policy, bounds: Bounds, verdict: Verdict) -> Iterator[str]:
    """What does not hold of one verdict."""
    if verdict.outcome not in (Outcome.PASS, Outcome.FAIL):
        return
    if (verdict.rung, verdict.seam) == ("quantized", "mode"):
        if (verdict.outcome is Outcome.PASS) != (run.subject.get("mode") in policy.modes):
            yield f"says {verdict.outcome.value}, mode is {run.subject.get('mode')!r}"
        return
    try:
        again = _again(run, bounds, verdict)
    except HarnessError as error:
        yield f"cannot be judged again: {error.what}"
        return
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        yield f"holds figures that nothing measures ({type(error).__name__}: {error})"
        return
    if again is None:
        if verdict.outcome is Outcome.PASS:
            yield "says PASS and records no figure for it"
        return
    yield from _apart(verdict, again)


def _apart(verdict: Verdict, again: Verdict) -> Iterator[str]:
    if again.outcome is not verdict.outcome:
        what = f"{again.metric} {again.value} past {again.bound}" if again.outcome is Outcome.FAIL else again.reason
        yield f"says {verdict.outcome.value}; its figures say {again.outcome.value}: {what}"
    elif verdict.bound != again.bound:
        yield f"was held against {verdict.bound}, the bound on its {again.metric} is {again.bound}"
    elif verdict.value != again.value:
        yield f"gives {verdict.metric} {verdict.value}, its figures give {again.metric} {again.value}"


def _again(run: Run, bounds: Bounds, verdict: Verdict) -> Verdict | None:
    """The verdict that its figures call for; None where it records none."""
    key = _engine(run, verdict)
    if verdict.seam == "tokens":
        return _tokens(verdict, bounds.limit(verdict.rung, "tie_margin", "tokens", key))
    fixed = EXACT.get((verdict.rung, verdict.metric or ""))
    if fixed is not None:
        return _single(verdict, verdict.value, fixed)
    if verdict.metric in ("kl", "fraction"):
        largest = verdict.figures.get("largest") if verdict.metric == "fraction" else None
        value = max(map(float, largest.values())) / FP16_MAX if largest else verdict.value
        return _single(verdict, value, bounds.limit(verdict.rung, verdict.metric, verdict.seam, key))
    measured = {way: {region: (_estimate if figures.get("by") == "sketch" else _distance)(figures)
                      for region, figures in regions.items()}
                for way, regions in verdict.figures.items()}
    limits = bounds.at(verdict.rung, verdict.seam, key)
    if not measured or not limits:
        return None
    return decide(verdict.rung, verdict.case, verdict.seam, measured, limits)


def _engine(run: Run, verdict: Verdict) -> str:
    """Whose bounds a verdict was held against."""
    mode = run.subject.get("mode")
    if verdict.rung == "quantized":
        return str(mode)
    if verdict.rung not in ("engine", "tokens"):
        return ""
    hidden = _table(_table(run.subject.get("checkpoint")).get("geometry")).get("hidden")
    return engine_key(run.engine.get("name"), mode, hidden, verdict.case.endswith(SHARP))


def _sketched(verdict: Verdict) -> bool:
    """Whether a verdict rests on what a sketch tells."""
    regions = [region for way in verdict.figures.values() if isinstance(way, Mapping) for region in way.values()]
    return any(_table(figures).get("by") == "sketch" for figures in (verdict.figures, *regions))


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _single(verdict: Verdict, value: float | None, bound: float) -> Verdict | None:
    if value is None or math.isnan(value):
        return None
    outcome = Outcome.PASS if 0 <= value <= bound else Outcome.FAIL
    return Verdict(verdict.rung, verdict.case, verdict.seam, outcome, "within its bound", verdict.metric, value, bound)


def _tokens(verdict: Verdict, tie: float) -> Verdict | None:
    """Flips counted again: a tie counts as one only where its gap lies within the bound."""
    figures = verdict.figures
    if not figures and verdict.outcome is Outcome.FAIL:
        return None
    choice, tokens, ties = (list(figures[name]) for name in ("choice", "tokens", "ties"))
    if not tokens or len(choice) != len(tokens):
        raise HarnessError(f"{len(choice)} choices for {len(tokens)} tokens")
    steps = [step for step, (one, other) in enumerate(zip(choice, tokens)) if one != other]
    if "gaps" not in figures:  # a record made before gaps were kept: what it calls a tie has to be believed
        return _single(verdict, float(len(set(steps) - set(ties))), 0.0)
    gaps = [float(gap) for gap in figures["gaps"]]
    if len(gaps) != len(steps):
        raise HarnessError(f"{len(gaps)} gaps for {len(steps)} flips")
    return _single(verdict, float(sum(not 0 <= gap <= tie for gap in gaps)), 0.0)


def _distance(figures: Mapping[str, Any]) -> Distance:
    """A Distance from its record. Raises HarnessError for a figure that no comparison gives."""
    read = {name: figures[name] for name in Distance.__dataclass_fields__}
    for name, value in read.items():
        if isinstance(value, list):
            read[name] = tuple(value)
        elif isinstance(value, str):
            read[name] = float(value)
    wrong = [name for name in ("cosine", "worst_token_cosine") if not -ONE <= read[name] <= ONE]
    wrong += [name for name in ("cosine_gap", "rel_l2", "worst_token", "worst_channel", "norm_drift", "max_abs")
              if not read[name] >= 0]
    if wrong:
        raise HarnessError(f"{wrong[0]} of {read[wrong[0]]}, which nothing has")
    if read["tokens"] < 1 or read["reference_nonfinite"]:
        raise HarnessError("its reference proves nothing")
    if read["candidate_nonfinite"] and math.isfinite(read["rel_l2"]):
        raise HarnessError("values are not finite, and yet their distance is")
    return Distance(**read)


def _estimate(figures: Mapping[str, Any]) -> Estimate:
    """An Estimate from its record. Raises HarnessError for an interval that no sketch gives."""
    low, high = ({name: float(value) for name, value in figures[end].items()} for end in ("low", "high"))
    read = {name: float(figures[name]) for name in ("rel_l2", "worst_token", "norm_drift", "cosine_gap")}
    wrong = [name for name in low if name not in high or not 0 <= low[name] <= high[name]]
    wrong += [name for name, value in read.items() if name in low and not low[name] <= value <= high[name]]
    if wrong or set(low) != set(high):
        raise HarnessError(f"its interval of {wrong[0] if wrong else 'a figure'} is none that a sketch gives")
    return Estimate(**read, worst_token_at=int(figures["worst_token_at"]), low=low, high=high,
                    candidate_nonfinite=int(figures["candidate_nonfinite"]), tokens=int(figures["tokens"]), degenerate=False)
