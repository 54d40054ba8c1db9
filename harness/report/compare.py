"""Two runs side by side: which seams got worse, which better, and which moved only as far as benign noise does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.report import plain, view
from harness.report.html import page
from harness.report.read import Judged, guarded, read
from harness.report.series import Ladder
from harness.report.view import ladders

MOST_ROWS = 1000
_ORDER = {"broke": 0, "gone": 1, "worse": 2, "mended": 3, "new": 4, "better": 5, "within noise": 6}


@dataclass(frozen=True)
class Change:
    """One seam in one way and region. `kind`: broke, gone, worse, mended, new, better, within noise."""

    rung: str
    seam: str
    way: str
    region: str
    before: float | None
    after: float | None
    noise: float | None
    kind: str

    @property
    def ratio(self) -> float | None:
        """after / before; None where that says nothing."""
        return self.after / self.before if self.before and self.after is not None and self.before < math.inf else None


@guarded
def render_compare(record_a: Mapping[str, Any], record_b: Mapping[str, Any]) -> str:
    """HTML of what changed from run A to run B. Raises HarnessError where either is no run record of this schema."""
    before, after = read(record_a), read(record_b)
    found = changes(before, after)
    kinds = {kind: sum(change.kind == kind for change in found) for kind in _ORDER}
    return page("compare.html.jinja", f"{view.title(before)} → {view.title(after)}", before=before, after=after,
                titles=(view.title(before), view.title(after)), changes=found[:MOST_ROWS],
                left=max(0, len(found) - MOST_ROWS), kinds={kind: count for kind, count in kinds.items() if count},
                rungs=list(zip(view.rung_rows(before), view.rung_rows(after))), facts=_facts(before, after),
                speed=_speed(before, after))


def changes(before: Judged, after: Judged) -> list[Change]:
    """Every seam that either run measured, the gravest change first, then in order of computation."""
    ours, theirs = ({one.rung: one for one in ladders(judged.run)} for judged in (before, after))
    found = [change for rung in dict.fromkeys([*ours, *theirs])
             for change in _rung(rung, ours.get(rung), theirs.get(rung))]
    return sorted(found, key=lambda change: _ORDER[change.kind])


def _gravest(found: list[Change]) -> list[Change]:
    """One change for each way of a seam: that of the region where it is gravest, and there the largest."""
    chosen: dict[str, Change] = {}
    for change in sorted(found, key=lambda change: (_ORDER[change.kind], -(change.ratio or 0.0))):
        chosen.setdefault(change.way, change)
    return list(chosen.values())


def _rung(rung: str, before: Ladder | None, after: Ladder | None) -> list[Change]:
    tables = [{step.seam: step for step in one.steps} if one else {} for one in (before, after)]
    found = []
    for seam in dict.fromkeys([*tables[1], *tables[0]]):
        steps, here = [table.get(seam) for table in tables], []
        for key in dict.fromkeys(key for step in steps if step for key in step.marks):
            values = [step.marks[key].value if step and key in step.marks else None for step in steps]
            limits = [step.limits.get(key[0]) if step else None for step in steps]
            limit, noise = limits[1] or limits[0] or (None, None)
            here.append(Change(rung, seam, *key, *values, noise, kind(*values, limit, noise)))
        found += _gravest(here)
    return found


def kind(before: float | None, after: float | None, limit: float | None, noise: float | None) -> str:
    """What became of a seam. A change counts where it is larger than the benign noise measured for that seam.

    Without a noise figure, a factor of two counts: benign variants differ by less.
    """
    if before is None or after is None:
        return "gone" if after is None else "new"
    if limit is not None and (before > limit) != (after > limit):
        return "broke" if after > limit else "mended"
    if before == after:
        return "within noise"
    moved = abs(after - before) > noise if noise else max(before, after) > 2 * min(before, after)
    return "within noise" if not moved else "worse" if after > before else "better"


def _facts(before: Judged, after: Judged) -> list[tuple[str, str, str, bool]]:
    """What was judged, in A and in B, and whether it differs: digest, or words where there is none."""
    rows = [{label: (value, digest) for label, value, digest in view.facts(judged)} for judged in (before, after)]
    found = []
    for label in dict.fromkeys([*rows[0], *rows[1]]):
        pair = [row.get(label, (plain.ABSENT, "")) for row in rows]
        words = [f"{value} {plain.short(digest)}" if digest else value for value, digest in pair]
        found.append((label, *words, pair[0] != pair[1]))
    return found


def _speed(before: Judged, after: Judged) -> list[tuple[str, str, str]]:
    rows = [{label: value for label, value, _ in view.speed(judged.run)} for judged in (before, after)]
    return [(label, rows[0].get(label, plain.ABSENT), rows[1].get(label, plain.ABSENT))
            for label in dict.fromkeys([*rows[0], *rows[1]])]
