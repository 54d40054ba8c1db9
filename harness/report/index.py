"""A page over many runs, the newest first; a record that cannot be read is a row with the reason, not its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from harness.errors import HarnessError
from harness.report import plain, view
from harness.report.html import page
from harness.report.read import guarded, read
from harness.verdict import Outcome


@guarded
def render_index(runs: Sequence[tuple[str, Any, Any]]) -> str:
    """HTML over (path of the report folder relative to the page, record or why there is none, certificate or None)."""
    rows = [_row(str(path), record, certificate) for path, record, certificate in runs]
    rows.sort(key=lambda row: row["created"], reverse=True)
    counts = {name: sum(row["outcome"] == name for row in rows) for name in view.SYMBOL}
    return page("index.html.jinja", "Parity reports", rows=rows, counts={name: n for name, n in counts.items() if n})


def _row(path: str, record: Any, certificate: Mapping[str, Any] | None) -> dict[str, Any]:
    # An absolute path or one that climbs out would make the page point at the reader's own files.
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    row = {"path": path, "link": "./" + quote("/".join([*parts, "report.html"])), "created": "",
           "outcome": Outcome.ERROR.value}
    try:
        if isinstance(record, HarnessError):
            raise record
        judged = read(record, certificate)
    except HarnessError as error:
        return {**row, "title": plain.text(path, 120), "why": str(error), "facts": {}, "rungs": [],
                "commit": plain.ABSENT}
    facts = {label: (value, digest) for label, value, digest in view.facts(judged)}
    return {**row, "created": plain.moment(judged.run.created), "outcome": judged.headline, "title": view.title(judged),
            "why": plain.sentence(judged.why), "facts": facts, "rungs": view.rung_rows(judged),
            "commit": plain.text(plain.mapping(judged.run.tool).get("commit"), 40)}
