"""The parity report as one HTML file that asks nothing of the network: pictures, tables, and one small script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.ladder import RUNGS
from harness.report import plain, view
from harness.report.commands import again, commands
from harness.report.heat import by_case, colours, heat_maps
from harness.report.picture import draw
from harness.report.power import power_section
from harness.report.read import guarded, read
from harness.report.series import Ladder, ladder, owner
from harness.run import Run
from harness.verdict import Outcome

TEMPLATES = Path(__file__).resolve().parent / "templates"
MOST_ROWS, MOST_CASES = 1500, 40
FAMILIES = {"vision": "vision tower", "decoder": "decoder", "kv": "KV cache", "": "other seams"}


@guarded
def render_html(record: Mapping[str, Any], certificate: Mapping[str, Any] | None = None) -> str:
    """The report of one run. Raises HarnessError where `record` is of another schema or no whole run record.

    The outcome on the page is folded again from the record; where the certificate says otherwise, the page says so.
    """
    judged = read(record, certificate)
    run = judged.run
    scales, maps = heat_maps(run)
    problems, more = view.problems(run)
    return page("report.html.jinja", f"{judged.headline} · {view.title(judged)}", judged=judged, run=run,
                title=view.title(judged), facts=view.facts(judged), scope=view.scope(run), rungs=view.rung_rows(judged),
                broken=view.first_broken(judged), places=plain.rows(run.localization), problems=problems, more=more,
                pictures=[_picture(one) for one in view.ladders(run)], cases=_cases(run), scales=scales, maps=by_case(maps),
                palette="".join(colours()), tokens=view.tokens(run), weights=view.weights(run),
                headroom=view.headroom(run), speed=view.speed(run), speed_by=plain.mapping(run.speed),
                power=power_section(run.power), machine=view.machine(run), ties=view.tie_bounds(run),
                commands=commands(judged), again=again(judged), bounds=plain.rows(run.bounds), policy=judged.policy.record(),
                timings=run.timings)


def page(template: str, head: str, **data: Any) -> str:
    """Render a template with the style sheet and the script inside, both allowed by their digest and nothing else."""
    css, js = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    rules = f"default-src 'none'; img-src data:; style-src {_digest(css)}; script-src {_digest(js)}; " \
            "base-uri 'none'; form-action 'none'"
    return environment().get_template(template).render(head=head, css=css, js=js, rules=rules, **data)


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def environment() -> Environment:
    """Autoescape on, and a name that a template misspells is an error, not an empty string."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)
    made.filters |= {"figure": plain.figure, "text": plain.text, "short": plain.short, "seconds": plain.seconds,
                     "cosine": plain.cosine, "place": plain.place,
                     "sentence": plain.sentence, "moment": plain.moment}
    made.globals |= {"symbol": view.SYMBOL, "family_name": FAMILIES, "excess": view.excess}
    return made


def _picture(whole: Ladder) -> dict[str, Any]:
    """One rung's pictures: a family each, the inside of the layer that broke, and the table of every seam."""
    claim = next(rung for rung in RUNGS if rung.name == whole.rung)
    table, left = _table(whole)
    drawn = [(name, draw(part, f"{whole.rung} rung, {FAMILIES[name]}: error at {len(part.steps)} seams, worst over "
                               "cases; the same numbers stand in the table below"), part.first)
             for name, part in whole.families.items()]
    return {"rung": whole.rung, "claim": claim.claim, "against": claim.against, "regions": whole.regions,
            "drawn": drawn, "zoom": _zoom(whole), "table": table, "left": left, "ways": whole.ways,
            "metrics": whole.metrics, "seams": len(whole.steps)}


def _zoom(whole: Ladder) -> tuple[str, Markup] | None:
    """The inside of the first broken layer, where the record holds it."""
    if whole.broken is None:
        return None
    seam = whole.steps[whole.broken].seam
    inside = whole.inside(seam)
    if len(inside.steps) < 2:
        return None
    return owner(seam) or seam, draw(inside, f"inside {owner(seam) or seam}")


def _table(whole: Ladder) -> tuple[list[dict[str, Any]], int]:
    """Every seam as a row; of more than fit, those that did not pass stay."""
    steps = whole.steps
    if len(steps) > MOST_ROWS:
        wrong = [step for step in steps if step.outcome is not Outcome.PASS][:MOST_ROWS]
        kept = {step.seam for step in [*wrong, *steps[:MOST_ROWS - len(wrong)]]}
        steps = tuple(step for step in steps if step.seam in kept)
    lines = [{"seam": step.seam, "outcome": step.outcome.value, "marks": step.marks, "limits": step.limits,
              "inside": owner(step.seam) is not None} for step in steps]
    return lines, len(whole.steps) - len(steps)


def _cases(run: Run) -> list[dict[str, Any]]:
    """What a case is, and its own ladder of the two fp32 rungs."""
    found = []
    known = {row["name"]: row for row in plain.rows(run.cases) if isinstance(row.get("name"), str)}
    for name in list(dict.fromkeys([*known, *(verdict.case for verdict in run.of("decoder"))]))[:MOST_CASES]:
        outcomes = [verdict.outcome for verdict in run.verdicts if verdict.case == name]
        bad = next((kind for kind in (Outcome.FAIL, Outcome.ERROR, Outcome.SKIP) if kind in outcomes), Outcome.PASS)
        drawn = [(rung, part_name, draw(part, f"{rung} rung of case {name}"))
                 for rung in ("vision", "decoder") for part_name, part in ladder(run, rung, name).families.items()]
        found.append({"name": name, "row": known.get(name, {}), "outcome": bad.value if outcomes else "SKIP",
                      "drawn": drawn})
    return found
