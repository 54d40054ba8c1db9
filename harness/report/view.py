"""Run record -> plain data for the templates. Pure: no files, no clock, no decision of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from harness.gate import RungResult
from harness.ladder import RUNGS
from harness.report.plain import ABSENT, figure, integer, mapping, number, rows, seconds, size, text
from harness.report.read import Judged
from harness.report.series import Ladder, bounds, engines, ladder
from harness.run import Run
from harness.verdict import Outcome, Verdict

SYMBOL = {"PASS": "✓", "FAIL": "✕", "ERROR": "?", "SKIP": "–", "MISMATCH": "✕"}
WORDS = {"PASS": "passed", "FAIL": "failed", "ERROR": "could not be measured", "SKIP": "skipped"}
_WORDS_FIRST = ("name", "version", "platform")
MOST_PROBLEMS, MOST_TENSORS, SHOWN_FIRST = 200, 2000, 12


def title(judged: Judged) -> str:
    """What was judged, in a few words."""
    name = text(mapping(mapping(judged.run.subject).get("checkpoint")).get("name"), 120)
    return "a checkpoint without name" if name == ABSENT else name


def facts(judged: Judged) -> list[tuple[str, str, str]]:
    """Label, value and full digest (or empty) of all that was judged and by what."""
    run, subject = judged.run, mapping(judged.run.subject)
    parts = {name: mapping(subject.get(name)) for name in ("checkpoint", "oracle", "bundle", "vision_bundle")}
    engine, machine, tool = mapping(run.engine), mapping(run.machine), mapping(run.tool)
    bundle, vision = parts["bundle"], parts["vision_bundle"]
    found = [("checkpoint", _named(parts["checkpoint"], "name", "revision"), parts["checkpoint"].get("digest")),
             ("graph", text(subject.get("graph"), 200), None),
             ("bundle", _named(bundle, "name", "mode") + _bytes(bundle), bundle.get("digest")),
             ("vision bundle", _named(vision, "name") + _bytes(vision), vision.get("digest")),
             ("oracle", text(_identity(parts["oracle"]), 200), parts["oracle"].get("digest")),
             ("engine", _named(engine, *_WORDS_FIRST, *(key for key in engine if key not in (*_WORDS_FIRST, "build"))),
              engine.get("build")),
             ("machine", _named(machine, "system", "arch", "cpu") + _cores(machine), None),
             ("harness", _named(tool, "version", "commit"), None),
             ("policy", text(judged.policy.name, 120), judged.policy.digest),
             ("made", text(run.created, 60), None),
             ("certificate", "read, and recomputed from this record" if judged.given else "recomputed from this record",
              judged.certificate["digest"])]
    return [(label, value, digest if isinstance(digest, str) else "") for label, value, digest in found
            if value != ABSENT]


def _named(row: Mapping[str, Any], *keys: str) -> str:
    """Words and numbers of a row joined; what is neither (lists, tables) is left out."""
    words = [row[key] for key in keys if isinstance(row.get(key), (str, int, float)) and row[key] != ""]
    return " · ".join(text(word, 160) for word in words[:6]) or ABSENT


def _bytes(row: Mapping[str, Any]) -> str:
    return f" · {size(row.get('bytes'))}" if number(row.get("bytes")) is not None else ""


def _cores(row: Mapping[str, Any]) -> str:
    return f" · {row['cores']} cores" if integer(row.get("cores")) else ""


def _identity(oracle: Mapping[str, Any]) -> Any:
    found = oracle.get("identity")
    if isinstance(found, Mapping) and "sketch_of" in oracle:
        found = {"JUDGED BY SKETCH, not by the whole record; of oracle": str(oracle["sketch_of"])[:12], **found}
    return " · ".join(f"{key} {value}" for key, value in found.items()) if isinstance(found, Mapping) else found


def scope(run: Run) -> str:
    """How much was compared: figures that show whether a PASS stands on much or on little."""
    cases = {verdict.case for verdict in run.verdicts if verdict.rung == "decoder"}
    counts = Counter(verdict.outcome.value for verdict in run.verdicts)
    parts = [f"{counts[name]:,} {WORDS[name]}" for name in ("PASS", "FAIL", "ERROR", "SKIP") if counts[name]]
    by = " judged by sketch" if "sketch_of" in mapping(mapping(run.subject).get("oracle")) else ""
    return f"{len(run.verdicts):,} verdicts on {len(cases)} case{'s' * (len(cases) != 1)}{by}: {', '.join(parts) or 'none'}"


def rung_rows(judged: Judged) -> list[dict[str, Any]]:
    """The ten rungs as rows."""
    claims = {rung.name: rung for rung in RUNGS}
    return [_rung_row(result, claims[result.rung], judged) for result in judged.decision.rungs]


def _rung_row(result: RungResult, rung: Any, judged: Judged) -> dict[str, Any]:
    leading, total = result.leading, sum(result.counts.values())
    excused = result.outcome is Outcome.SKIP and rung.name in judged.policy.allow_skip
    return {"name": rung.name, "claim": rung.claim, "against": rung.against, "noise": rung.noise,
            "outcome": result.outcome.value, "reason": text(result.reason, 400), "passed": result.counts.get("PASS", 0),
            "total": total, "excused": excused, "where": f"{leading.seam} · {leading.case}" if leading else "",
            "metric": (leading.metric or "").replace("_", " ") if leading else "",
            "value": figure(leading and leading.value), "bound": figure(leading and leading.bound),
            "share": share(leading)}


def share(verdict: Verdict | None) -> float | None:
    """Place of a value on a gauge of four decades, 0..100, the bound at 75; None for an exact bound or no value."""
    if verdict is None or verdict.value is None or not verdict.bound or math.isnan(verdict.value):
        return None
    ratio = verdict.value / verdict.bound
    return 0.0 if ratio <= 0 else min(100.0, max(2.0, 75 + 25 * math.log10(ratio))) if ratio < math.inf else 100.0


def ladders(run: Run, case: str | None = None) -> list[Ladder]:
    """The ladder of every rung that measured distances."""
    found = (ladder(run, name, case) for name in ("vision", "decoder", "decode", "quantized", "engine"))
    return [one for one in found if one.steps]


def first_broken(judged: Judged) -> Verdict | None:
    """The first verdict that failed, of the first rung that did."""
    failed = (rung.leading for rung in judged.decision.rungs if rung.outcome is Outcome.FAIL)
    return next(failed, None)


def problems(run: Run) -> tuple[list[Verdict], int]:
    """Verdicts that failed or could not be measured, failures first, and how many more there are than are shown."""
    found = [verdict for kind in (Outcome.FAIL, Outcome.ERROR) for verdict in run.verdicts if verdict.outcome is kind]
    return found[:MOST_PROBLEMS], max(0, len(found) - MOST_PROBLEMS)


def tokens(run: Run) -> list[dict[str, Any]]:
    """A table a case: every step with the three choices, and how often they agree."""
    return [_token_table(table, run) for table in rows(run.tokens) if rows(table.get("steps"))]


def _token_table(table: Mapping[str, Any], run: Run) -> dict[str, Any]:
    steps = [_step(row) for row in rows(table.get("steps"))]
    case = table.get("case")
    said = [f"{verdict.rung}: {verdict.reason}" for verdict in run.verdicts if verdict.case == case
            and verdict.seam == "tokens" and (verdict.outcome is not Outcome.PASS or "tie" in verdict.reason)]
    margins = [step["margin"] for step in steps if step["margin"] is not None]
    return {"case": text(case, 120), "steps": steps, "said": [text(words, 400) for words in said],
            "engine": agreement(steps, "engine", "python"), "python": agreement(steps, "python", "oracle"),
            "flips": sum(step["flip"] for step in steps), "ties": sum(step["tie"] for step in steps),
            "engine_ties": sum(step["tie"] and step["apart"] for step in steps),
            "python_ties": sum(step["tie"] and step["drift"] for step in steps),
            "smallest": min(margins, default=None)}


def _step(row: Mapping[str, Any]) -> dict[str, Any]:
    oracle, python, engine = (integer(row.get(name)) for name in ("oracle", "python", "engine"))
    apart = engine is not None and python is not None and engine != python
    drift = python is not None and oracle is not None and python != oracle
    return {"step": integer(row.get("step")), "position": integer(row.get("position")), "oracle": oracle,
            "python": python, "engine": engine, "margin": number(row.get("margin")), "tie": bool(row.get("tie")),
            "apart": apart, "drift": drift, "flip": (apart or drift) and not row.get("tie"),
            "text": row["text"][:80] if isinstance(row.get("text"), str) else ""}


def agreement(steps: list[dict[str, Any]], left: str, right: str) -> tuple[int, int] | None:
    """Steps at which both chose the same, of those where both chose; None where they never did."""
    both = [step[left] == step[right] for step in steps if step[left] is not None and step[right] is not None]
    return (sum(both), len(both)) if both else None


def weights(run: Run) -> list[dict[str, Any]]:
    """One table for graph and one for bundle: tensors, those that are wrong or furthest off first."""
    severity = {"FAIL": 0, "ERROR": 1, "SKIP": 2}
    tables = []
    for part in dict.fromkeys(text(row.get("part"), 60) for row in rows(run.weights)):
        found = [row for row in rows(run.weights) if text(row.get("part"), 60) == part]
        found.sort(key=lambda row: (severity.get(str(row.get("outcome")), 3), -(number(row.get("error")) or 0.0)))
        errors = [number(row.get("error")) for row in found]
        largest = max((error for error in errors if error is not None and math.isfinite(error)), default=0.0)
        lines = [{"tensor": text(row.get("tensor"), 200), "stored": text(row.get("stored"), 60),
                  "error": figure(error) if error else "none" if error == 0 else ABSENT,
                  "share": round(100 * min(1.0, error / largest), 1) if error and largest else None,
                  "reason": text(row.get("reason"), 300) if row.get("reason") else "",
                  "outcome": text(row.get("outcome"), 20)} for row, error in zip(found, errors)]
        counts = Counter(line["outcome"] for line in lines)
        telling = sum(row.get("outcome") != "PASS" or bool(number(row.get("error"))) for row in found)
        first = min(SHOWN_FIRST, telling)
        tables.append({"part": part, "count": len(lines), "top": lines[:first], "rest": lines[first:MOST_TENSORS],
                       "left": max(0, len(lines) - MOST_TENSORS), "counts": dict(counts), "worst": largest,
                       "constants": part == "constants", "lossy": sum(bool(error) for error in errors)})
    return tables


def headroom(run: Run) -> dict[str, Any]:
    """Seams by how much of the fp16 range they use, the fullest first."""
    found = sorted(run.of("headroom"), key=lambda verdict: -(verdict.value if verdict.value is not None else math.inf))
    lines = [{"seam": verdict.seam, "value": _percent(verdict.value), "share": share(verdict),
              "outcome": verdict.outcome.value, "reason": text(verdict.reason, 300)} for verdict in found]
    return {"top": lines[:SHOWN_FIRST], "rest": lines[SHOWN_FIRST:MOST_TENSORS],
            "left": max(0, len(lines) - MOST_TENSORS)}


def _percent(value: float | None) -> str:
    return figure(value) if value is None or not math.isfinite(value) else f"{value:.2%}"


def speed(run: Run) -> list[tuple[str, str, str]]:
    """Label, figure and remark of the row that ports publish; only what was measured."""
    row = mapping(run.speed)
    known = [("prefill", "prefill_tok_s", " tok/s", figure), ("decode", "decode_tok_s", " tok/s", figure),
             ("vision tower", "vision_s", "", seconds), ("cold load", "cold_load_s", "", seconds),
             ("warm load", "warm_load_s", "", seconds), ("bundle", "bundle_bytes", "", size),
             ("read per token", "bytes_per_token", "", size)]
    found = [(label, shown(row[key]) + unit, "") for label, key, unit, shown in known
             if number(row.get(key)) is not None]
    per_token, rate, possible = (number(row.get(key)) for key in ("bytes_per_token", "decode_tok_s", "bandwidth_gb_s"))
    if per_token and rate and possible and 0 < possible < math.inf:
        used, most = per_token * rate / 1e9, possible * 1e9 / per_token
        found += [("memory bandwidth", f"{figure(possible)} GB/s", "measured here"),
                  ("bandwidth used", f"{figure(used)} GB/s", f"{figure(100 * used / possible)} % of what was measured here"),
                  ("bandwidth bound", f"{figure(most)} tok/s", f"decode stands at 1/{figure(most / rate)} of it")]
    elif per_token and rate:
        found.append(("bandwidth used", f"{figure(per_token * rate / 1e9)} GB/s", "weights only"))
    return found


def machine(run: Run) -> str:
    """Where the figures were measured, in words."""
    found = mapping(run.speed).get("machine") or run.machine
    return _named(found, "system", "arch", "cpu") + _cores(found) if isinstance(found, Mapping) else text(found, 200)


def excess(value: Any, bound: Any) -> float | None:
    """How many times its bound a figure is; None where that says nothing."""
    one, other = number(value), number(bound)
    return one / other if one and other and 0 < other < one < math.inf else None


def tie_bounds(run: Run) -> dict[str, float]:
    """The noise inside which a flip is a tie, by rung, as the record's bounds have it for this run's mode and engine."""
    found = {}
    for rung in ("decode", "quantized", "tokens"):
        limits = (bounds(run).at(rung, "tokens", engine) for engine in engines(run, rung))
        limit = next((row["tie_margin"].limit for row in limits if "tie_margin" in row), None)
        if limit is not None:
            found[rung] = limit
    return found
