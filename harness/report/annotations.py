"""GitHub's annotations: one line a broken rung, at the line of the graph's source that computes the failing seam.

Format: https://docs.github.com/actions/reference/workflow-commands-for-github-actions. A value cannot end its line or
start another command: `%`, line ends, and in properties `:` and `,` are escaped as GitHub's own toolkit does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.report import plain, view
from harness.report.read import Judged, guarded, read
from harness.verdict import Outcome

MOST = 10
"""GitHub shows ten errors a step."""
_LARGEST = 1 << 20


@guarded
def render_annotations(record: Mapping[str, Any], certificate: Mapping[str, Any] | None = None,
                       root: Path | None = None) -> str:
    """`::error` lines for what broke, `::notice` for a pass; `root` is where the graph's source is looked for.

    Raises HarnessError as `render_html` does.
    """
    judged = read(record, certificate)
    if judged.headline == Outcome.PASS.value:
        return command("notice", f"{view.title(judged)}: {view.scope(judged.run)}", title="numerics parity: PASS")
    lines = [command("error", sentence, title="record and certificate do not agree") for sentence in judged.problems[:3]]
    places = plain.rows(judged.run.localization)
    lines += [_place(judged, place, root) for place in places]
    named = {place.get("rung") for place in places}
    for rung in judged.decision.rungs:
        if rung.outcome in (Outcome.FAIL, Outcome.ERROR) and rung.rung not in named:
            seam = rung.leading.seam if rung.leading else "*"
            lines.append(command("error", rung.reason, title=f"{rung.rung} {rung.outcome.value}: {seam}",
                                 **source(judged, seam, root)))
    return "\n".join(lines[:MOST]) or command("error", judged.why, title=f"numerics parity: {judged.headline}")


def _place(judged: Judged, place: Mapping[str, Any], root: Path | None) -> str:
    seam = plain.text(place.get("op") or place.get("seam"), 200)
    parts = [plain.text(place.get("reason"), 400)]
    parts += [f"probable cause: {place['cause']}"] if place.get("cause") else []
    parts += [f"reproduce: {place['reproduce']}"] if place.get("reproduce") else []
    return command("error", "\n".join(parts), title=f"{plain.text(place.get('rung'), 40)} FAIL: {seam}",
                   **source(judged, seam, root))


def source(judged: Judged, seam: str, root: Path | None) -> dict[str, str]:
    """File and line of the graph under test that speak of a seam: the longest end of its name that stands there quoted."""
    graph = plain.mapping(judged.run.subject).get("graph")
    if root is None or not isinstance(graph, str) or not re.fullmatch(r"[\w.]+:\w+", graph):
        return {}
    relative = Path(*graph.partition(":")[0].split(".")).with_suffix(".py")
    path = root / relative
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parts = seam.split(".")
    for start in range(len(parts)):
        # A layer's number stands in the source as a field of an f-string.
        name = r"\.".join(rf"(?:{part}|\{{[^}}]*\}})" if part.isdecimal() else re.escape(part) for part in parts[start:])
        found = next((at for at, line in enumerate(lines, 1) if re.search(rf"[\"'.}}]{name}[\"']", line)), None)
        if found:
            return {"file": relative.as_posix(), "line": str(found)}
    return {"file": relative.as_posix(), "line": "1"}


def command(kind: str, message: str, **properties: str) -> str:
    """One workflow command."""
    given = ",".join(f"{name}={_escaped(value, property=True)}" for name, value in properties.items())
    return f"::{kind} {given}::{_escaped(message)}"


def _escaped(value: str, property: bool = False) -> str:
    words = value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return words.replace(":", "%3A").replace(",", "%2C") if property else words
