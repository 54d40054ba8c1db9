"""What a model card says of a port: the "Measured" row, and how anybody can check it without our machines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.report import plain, view
from harness.report.markdown import environment
from harness.report.read import Judged, guarded, read
from harness.report.series import family, owner
from harness.run import Run
from harness.verdict import Outcome, Verdict


@guarded
def render_card(record: Mapping[str, Any], certificate: Mapping[str, Any] | None = None) -> str:
    """Markdown for a model card, from the run record only. A run that did not pass says so in place of the figures.

    Raises HarnessError as `render_html` does.
    """
    judged = read(record, certificate)
    speed, bundle = plain.mapping(judged.run.speed), plain.mapping(plain.mapping(judged.run.subject).get("bundle"))
    checkpoint = plain.mapping(plain.mapping(judged.run.subject).get("checkpoint"))
    return environment().get_template("card.md.jinja").render(
        judged=judged, passed=judged.headline == Outcome.PASS.value, title=view.title(judged),
        rungs=view.rung_rows(judged), platform=platform(judged),
        prefill=rate(speed.get("prefill_tok_s")), decode=rate(speed.get("decode_tok_s")),
        numerics=numerics(judged.run), bundle=bundle, checkpoint=checkpoint, scope=view.scope(judged.run),
        size=plain.size(bundle.get("bytes")), certificate=judged.certificate["digest"])


def platform(judged: Judged) -> str:
    """Engine and machine: a figure belongs to both."""
    speed, engine = plain.mapping(judged.run.speed), plain.mapping(judged.run.engine)
    machine = speed.get("machine") or judged.run.machine
    names = [machine.get(key) for key in ("cpu", "system")] if isinstance(machine, Mapping) else [machine]
    named = speed.get("engine") or " ".join(plain.text(engine[key]) for key in ("name", "version") if engine.get(key))
    return ", ".join(plain.text(name, 120) for name in [named, *names] if name) or plain.ABSENT


def rate(value: Any) -> str:
    """Tokens per second to one decimal, as ports publish them."""
    found = plain.number(value)
    return plain.ABSENT if found is None or not math.isfinite(found) else f"{found:.1f} tok/s"


def numerics(run: Run) -> str:
    """One line: vision cosine, layers within bounds, decode n/n, engine ≡ python n/n. Only what the record holds."""
    parts = []
    vision = _cosines(run, run.of("vision"))
    if vision:
        parts.append(f"vision worst-token cosine {plain.cosine(min(vision.values()))}")
    layers = _cosines(run, run.of("decoder"))
    if layers:
        failed = {verdict.seam for verdict in run.of("decoder") if verdict.outcome is not Outcome.PASS}
        names = {seam for seam in layers if ".layers." in seam and not seam.endswith(".deepstack")}
        parts.append(f"{len(names - failed)}/{len(names)} layers within bounds, worst-token cosine "
                     f"{plain.cosine(min(layers.values()))}")
    tables = view.tokens(run)
    for label, key in (("python = oracle", "python"), ("engine ≡ python", "engine")):
        counted = [table[key] for table in tables if table[key]]
        if counted:
            same, total = (sum(column) for column in zip(*counted))
            ties = sum(table[f"{key}_ties"] for table in tables)
            explained = f" ({ties} explained tie{'s' * (ties != 1)})" if ties else ""
            parts.append(f"{label} {same}/{total} greedy tokens{explained} on {len(counted)} "
                         f"case{'s' * (len(counted) != 1)}")
    return "; ".join(parts) or "no figures in the record"


def _cosines(run: Run, verdicts: list[Verdict]) -> dict[str, float]:
    """Worst-token cosine by stream seam: the worst over cases, of the accumulated error where there is one."""
    found: dict[str, float] = {}
    for verdict in verdicts:
        ways = plain.mapping(verdict.figures)
        figures = plain.mapping(plain.mapping(ways.get("accumulated") or ways.get("")).get("all"))
        value = plain.number(figures.get("worst_token_cosine"))
        if value is not None and family(verdict.seam) and owner(verdict.seam) is None:
            found[verdict.seam] = min(value, found.get(verdict.seam, 1.0))
    return found
