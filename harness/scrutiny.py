"""What a record that says PASS must hold: every row that its cases call for, once, each with a figure inside the bounds.

A certificate binds a record to its digest; this asks whether the record is one that our rungs can have written. Reads
records only. What a rung answers for a case: `harness.rungs`, and `harness.trace` for the names of seams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from harness.run import Run
from harness.trace import decoder_seams, vision_seams
from harness.verdict import Outcome, Verdict

WORDED = {("quantized", "mode")}
"""The one row that states a word and measures nothing."""
SIBLINGS = ("contract", "inputs", "weights")
"""Rungs whose rows follow from no geometry: cases of one kind must answer alike."""
SHARP = "~sharp"
DEPTHS = ("layers", "vision_layers", "deepstack_taps")


def complaints(run: Run, passed: bool, limits: Sequence[Mapping[str, Any]] | None = None) -> Iterator[str]:
    """Sentences on what the record cannot be. `passed`: it claims PASS; `limits`: rows of the bounds in force, that its
    own must not be wider than."""
    for (rung, case, seam), count in Counter((one.rung, one.case, one.seam) for one in run.verdicts).items():
        if count > 1:
            yield f"{rung}[{case}-{seam}] stands {count} times in the record, a rung answers once"
    for verdict in run.verdicts:
        yield from _figures(verdict, run.bounds)
    if passed:
        yield from _absent(run)
    if limits is not None:
        yield from _wider(run.bounds, limits)


def _figures(verdict: Verdict, bounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A PASS without a figure, a figure below zero, one outside the recorded bounds, or one that none of its parts is."""
    if verdict.outcome is not Outcome.PASS or (verdict.rung, verdict.seam) in WORDED:
        return
    if verdict.value is None or verdict.bound is None:
        yield f"{verdict.id} says PASS without a figure and its bound"
    elif not math.isfinite(verdict.value) or verdict.value < 0:
        yield f"{verdict.id} says PASS over {verdict.value}, which is no distance"
    covering = [row for row in bounds if row["rung"] == verdict.rung and row["metric"] != "tie_margin"
                and fnmatchcase(verdict.seam, row["seams"])]
    if verdict.metric == "flips" or not covering:
        return
    held = [problem for engine in dict.fromkeys(row["engine"] for row in covering)
            for problem in [_under(verdict, {row["metric"]: row["limit"] for row in covering if row["engine"] == engine})]]
    if all(held):
        yield f"{verdict.id} {held[0]}"


def _under(verdict: Verdict, limits: Mapping[str, float]) -> str:
    """What is wrong with a PASS under the limits of one engine, "" where nothing is."""
    if limits.get(verdict.metric) != verdict.bound:
        return f"was judged by {verdict.bound}, which no bound of the record on {verdict.metric} is"
    parts = list(_parts(verdict.figures))
    if parts and verdict.value not in [value for metric, value in parts if metric == verdict.metric]:
        return f"states {verdict.value}, which none of its figures is"
    worst = [(metric, value) for metric, value in parts if metric in limits
             and not (math.isfinite(value) and 0 <= value <= limits[metric])]
    return f"says PASS, its {worst[0][0]} of {worst[0][1]} is past {limits[worst[0][0]]}" if worst else ""


def _parts(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(metric, value) of every distance in figures by way and region; a figure that is no number is infinite."""
    for way, regions in figures.items():
        for region in regions.values() if isinstance(regions, Mapping) else ():
            for name, value in region.items() if isinstance(region, Mapping) else ():
                if not isinstance(value, (list, bool)):
                    try:
                        number = float(value)
                    except (TypeError, ValueError):
                        number = math.inf
                    yield f"{way}.{name}".lstrip("."), math.inf if math.isnan(number) else number


def _absent(run: Run) -> Iterator[str]:
    """Rows that the cases and the geometry of the record call for and that are not there, or the other way round."""
    geometry = ((run.subject or {}).get("checkpoint") or {}).get("geometry")
    if not set(DEPTHS) <= set(geometry or {}) or not all({"name", "image", "engine"} <= set(case) for case in run.cases) \
            or not run.cases:
        yield "says PASS and names no geometry or no case, so nobody can tell whether all was judged"
        return
    there: dict[tuple[str, str], set[str]] = {}
    for one in run.verdicts:
        there.setdefault((one.rung, one.case), set()).add(one.seam)
    wanted = dict(planned(SimpleNamespace(**geometry), run.cases, {case for rung, case in there if rung == "engine"}))
    for (rung, case), seams in wanted.items():
        found = there.get((rung, case), set())
        for seam in sorted(seams - found)[:1]:
            yield f"{rung}[{case}-{seam}] is not in the record, and {len(seams - found) - 1} more of this case"
        for seam in sorted(found - seams)[:1]:
            yield f"{rung}[{case}-{seam}] is a row that no rung writes"
    judged = {rung for rung, _ in wanted}
    for rung, case in there:
        if rung in judged and (rung, case) not in wanted and case != "mode":
            yield f"{rung}[{case}] is a case that the record does not describe"
    yield from _alike(there, run.cases)


def planned(geometry: Any, cases: Sequence[Mapping[str, Any]], engine: set[str]) -> Iterator[tuple]:
    """((rung, case), seams) as the rungs plan them."""
    vision, decoder = set(vision_seams(geometry)), set(decoder_seams(geometry))
    cache = {f"kv.{part}.{layer:02d}" for part in ("keys", "values") for layer in range(geometry.layers)}
    for case in cases:
        name, image = case["name"], bool(case["image"])
        yield ("decoder", name), decoder
        yield ("decode", name), {*cache, "kl", "tokens"}
        yield ("quantized", name), {*decoder, "kl", "tokens"}
        if image:
            yield ("vision", name), vision
        if case["engine"]:
            yield ("tokens", name), {"tokens"}
            for run in (name, *([name + SHARP] if any(one.endswith(SHARP) for one in engine) else [])):
                yield ("engine", run), {*decoder, *cache, *(vision if image else ())}
    yield ("headroom", "all-cases"), {*vision_seams(geometry, inside=True), *decoder_seams(geometry, inside=True)}


def _alike(there: Mapping[tuple[str, str], set[str]], cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    image = {case["name"]: bool(case["image"]) for case in cases}
    for rung in SIBLINGS:
        for kind in (True, False, None):
            rows = {case: seams for (one, case), seams in there.items() if one == rung and (
                image.get(case) is kind if kind is not None else case in ("graph", "bundle"))}
            whole = set().union(*rows.values()) if rows else set()
            yield from (f"{rung}[{case}] lacks {sorted(whole - seams)[0]}, which its like answer"
                        for case, seams in rows.items() if whole - seams)
        lost = sorted(set(image) - {case for one, case in there if one == rung})
        if rung != "weights" and lost:
            yield f"{rung}[{lost[0]}] is not in the record"


def _wider(bounds: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Bounds of the record that are wider than those in force, or that are not in force at all."""
    key = ("rung", "metric", "seams", "engine")
    force = {tuple(row[name] for name in key): row["limit"] for row in limits}
    for row in bounds:
        place = tuple(row[name] for name in key)
        if place not in force or row["limit"] > force[place]:
            right = f"the bounds in force say {force[place]:g}" if place in force else "which is not in force"
            yield f"the record judges {' '.join(place)} by {row['limit']:g}, {right}"
            return
