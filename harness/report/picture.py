"""The ladder as a picture: SVG written by hand from `series.Ladder`.

Not Altair: its offline renderer alone is about 800 kB of JavaScript that must be parsed before the first paint, a chart
is blank without it and in print previews that do not run it, and no screen reader gets at a canvas. A ladder is a few
hundred numbers: one path a series, one hover column a seam, coloured by the page's own CSS, is ten to forty kB.
All text goes through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from markupsafe import Markup

from harness.report.plain import cosine, figure, place
from harness.report.series import Ladder, Mark, Step
from harness.verdict import Outcome

WIDTH, LEFT, RIGHT, TOP, PANEL, GAP, FOOT = 1060, 58, 118, 24, 168, 40, 26
MOST_COLUMNS, FLAG = 300, 26
_WAY = {"local": "local: each layer fed the reference's input", "": "error against the reference",
        "accumulated": "accumulated: each layer fed by the layers before it"}


def draw(ladder: Ladder, label: str) -> Markup:
    """One `<svg>` with a panel for each way of measuring; empty where there is nothing to draw."""
    ways = ladder.ways
    if not ways:
        return Markup("")
    groups = _grouped(ladder.steps)
    broken = next((at for at, group in enumerate(groups) if _outcome(group) is Outcome.FAIL), None)
    frame = _Frame(len(groups), len(ways), TOP if broken is None else TOP + FLAG)
    # The flag's pole goes through all panels: their titles keep to the other side of it.
    side = "end" if broken is not None and 2 * broken < len(groups) else "start"
    parts = [_panel(ladder, groups, way, number, frame, side) for number, way in enumerate(ways)]
    if broken is not None:
        first = next(step for step in groups[broken] if step.outcome is Outcome.FAIL)
        parts.append(_flag(frame, broken, first.seam))
    parts += [_names(groups, frame)]
    parts += [_column(ladder, group, frame, at) for at, group in enumerate(groups)]
    return Markup('<svg class="ladder" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, frame.height, label, Markup("").join(parts))


class _Frame:
    """Where columns and panels stand, in SVG units."""

    def __init__(self, columns: int, panels: int, head: int) -> None:
        self.columns, self.panels, self.head = columns, panels, head
        self.step = (WIDTH - LEFT - RIGHT) / columns
        self.height = head + panels * PANEL + (panels - 1) * GAP + FOOT

    def left(self, at: float) -> float:
        return round(LEFT + at * self.step, 1)

    def middle(self, at: int) -> float:
        return self.left(at + 0.5)

    def top(self, panel: int) -> float:
        return self.head + panel * (PANEL + GAP)


def _grouped(steps: Sequence[Step]) -> list[Sequence[Step]]:
    """One column a seam; neighbours share one where there are more seams than columns that can be told apart."""
    together = math.ceil(len(steps) / MOST_COLUMNS)
    return [steps[at:at + together] for at in range(0, len(steps), together)]


def _outcome(group: Sequence[Step]) -> Outcome:
    order = (Outcome.FAIL, Outcome.ERROR, Outcome.SKIP, Outcome.PASS)
    return next(outcome for outcome in order if any(step.outcome is outcome for step in group))


def _worst(group: Sequence[Step], way: str, region: str) -> Mark | None:
    marks = [step.marks[way, region] for step in group if (way, region) in step.marks]
    return max(marks, key=lambda mark: mark.value, default=None)


def _scale(ladder: Ladder, way: str) -> tuple[int, int]:
    """Decades from below the smallest to above the largest of all that is drawn."""
    drawn = [mark.value for step in ladder.steps for (found, _), mark in step.marks.items() if found == way]
    drawn += [value for step in ladder.steps for value in step.limits.get(way, ()) if value is not None]
    logs = [math.log10(value) for value in drawn if 0 < value < math.inf] or [0.0]
    low, high = math.floor(min(logs) - 0.2), math.ceil(max(logs) + 0.2)
    return max(low, high - 18), high


def _panel(ladder: Ladder, groups: Sequence[Sequence[Step]], way: str, panel: int, frame: _Frame,
           side: str) -> Markup:
    low, high = _scale(ladder, way)
    top = frame.top(panel)

    def y(value: float) -> float:
        if value <= 0:
            return top + PANEL
        share = 1.0 if math.isinf(value) else (math.log10(value) - low) / (high - low)
        return round(top + PANEL * (1 - min(1.0, max(0.0, share))), 1)

    title = f"{_WAY[way]} ({ladder.metrics[way].replace('_', ' ')})"
    parts = [_grid(low, high, top, y), Markup('<text class="way" text-anchor="{}" x="{}" y="{}">{}</text>').format(
        side, LEFT if side == "start" else WIDTH - RIGHT, top - 7, title)]
    limits = [next((step.limits[way] for step in group if way in step.limits), None) for group in groups]
    parts.append(_limits(limits, frame, top, y))
    for region in ladder.regions:
        marks = [_worst(group, way, region) for group in groups]
        parts.append(Markup('<path class="line {}" d="{}"/>').format(region, _line(marks, frame, y)))
        parts += [_edge(mark.value, frame.middle(at), top) for at, mark in enumerate(marks) if mark]
    parts += [_symbol(group, way, frame.middle(at), y, top) for at, group in enumerate(groups)]
    return Markup("<g>{}</g>").format(Markup("").join(parts))


def _grid(low: int, high: int, top: float, y: Callable[[float], float]) -> Markup:
    stride = max(1, math.ceil((high - low) / 6))
    lines = []
    for power in range(low, high + 1, stride):
        at = y(10.0**power)
        lines.append(Markup('<path class="grid" d="M{},{}H{}"/><text class="tick" x="{}" y="{}">{}</text>').format(
            LEFT, at, WIDTH - RIGHT, LEFT - 8, at + 4, f"1e{power}" if power else "1"))
    return Markup('<rect class="plot" x="{}" y="{}" width="{}" height="{}"/>{}').format(
        LEFT, top, WIDTH - LEFT - RIGHT, PANEL, Markup("").join(lines))


def _limits(limits: Sequence[tuple[float, float | None] | None], frame: _Frame, top: float,
            y: Callable[[float], float]) -> Markup:
    """Benign noise as a band from below, the bound as a stepped line, both named at the right edge."""
    band, line = [], []
    for at, found in enumerate(limits):
        if found is None:
            continue
        left, right = frame.left(at), frame.left(at + 1)
        follows = at > 0 and limits[at - 1] is not None
        line.append(f"{'L' if follows else 'M'}{left},{y(found[0])}H{right}")
        if found[1]:
            band.append(f"M{left},{top + PANEL}V{y(found[1])}H{right}V{top + PANEL}Z")
    last = next((found for found in reversed(limits) if found), None)
    if last is None:
        return Markup("")
    at, noise_at, x = y(last[0]), y(last[1] or 0.0), WIDTH - RIGHT + 8
    labels = Markup('<text class="bound-name" x="{}" y="{}">bound {}</text>').format(x, at + 4, figure(last[0]))
    if last[1]:
        labels += Markup('<text class="noise-name" x="{}" y="{}">noise {}</text>').format(
            x, max(noise_at + 4, at + 20), figure(last[1]))
    return Markup('<path class="noise" d="{}"/><path class="bound" d="{}"/>{}').format(
        "".join(band), "".join(line), labels)


def _line(marks: Sequence[Mark | None], frame: _Frame, y: Callable[[float], float]) -> str:
    """One path; a seam without a value leaves a gap. `h0` gives a lone point a segment, so that its marker is drawn."""
    parts = []
    for at, mark in enumerate(marks):
        if mark is not None:
            joined = at > 0 and marks[at - 1] is not None
            parts.append(f"{'L' if joined else 'M'}{frame.middle(at)},{y(mark.value)}{'' if joined else 'h0'}")
    return "".join(parts)


def _edge(value: float, x: float, top: float) -> Markup:
    """Names the two values that a log scale has no place for: they are drawn on its edge."""
    if value == 0:
        return Markup('<text class="edge" x="{}" y="{}">0</text>').format(x, top + PANEL - 8)
    return Markup('<text class="inf" x="{}" y="{}">∞</text>').format(x, top + 12) if math.isinf(value) else Markup("")


def _symbol(group: Sequence[Step], way: str, x: float, y: Callable[[float], float], top: float) -> Markup:
    """A cross where a seam is past its bound, a question mark where it could not be measured: shape before colour.

    The cross stands in the panel of the way that is past its bound. Where no drawn figure is, another metric failed the
    seam, and a faint cross stands in every panel.
    """
    outcome = _outcome(group)
    if outcome is Outcome.ERROR:
        return Markup('<text class="unknown" x="{}" y="{}">?</text>').format(x, top + PANEL - 6)
    over = {found: mark.value for step in group for (found, _), mark in step.marks.items()
            if found in step.limits and mark.value > step.limits[found][0]}
    if outcome is not Outcome.FAIL or over and way not in over:
        return Markup("")
    size = 6 if over else 4
    values = [mark.value for step in group for (found, _), mark in step.marks.items() if found == way]
    at = min(max(y(max(values, default=0.0)), top + size), top + PANEL - size)
    return Markup('<path class="cross{}" d="M{},{}l{},{}m0,-{}l-{},{}"/>').format(
        "" if over else " faint", x - size, at - size, 2 * size, 2 * size, 2 * size, 2 * size, 2 * size)


def _flag(frame: _Frame, at: int, seam: str) -> Markup:
    """The first broken seam: a line through all panels, all behind it shaded, and its name in words on top."""
    x, bottom = frame.middle(at), frame.height - FOOT
    shown = seam if len(seam) <= 44 else seam[:43] + "…"
    words = f"✕ first broken: {shown}"
    width = 7.1 * len(words) + 16
    left = min(max(LEFT, x - 12), WIDTH - width)
    return Markup(
        '<rect class="after" x="{}" y="{}" width="{}" height="{}"/><path class="broken" d="M{},{}V{}"/>'
        '<rect class="flag" x="{}" y="2" width="{}" height="20" rx="4"/><text class="flag-name" x="{}" y="16">{}</text>'
    ).format(x, frame.head, max(0.0, round(WIDTH - RIGHT - x, 1)), bottom - frame.head, x, 22, bottom, round(left, 1),
             round(width, 1), round(left + 8, 1), words)


def short_name(seam: str) -> str:
    """A seam as an axis label: layer number, E(mbed), D(eepStack), M(erger), N(orm)."""
    for pattern, name in ((r"(?:vision|decoder)\.layers\.0*(\d+)$", r"\1"), (r".*\.layers\.\d+\.deepstack$", "+D"),
                          (r"vision\.deepstack\.(\d+)$", r"D\1"), (r".*\.embed$", "E"), (r"vision\.merger$", "M"),
                          (r"decoder\.norm$", "N"), (r"(?:vision|decoder)\.(?:layers|deepstack)\.\d+\.(.+)$", r"\1"),
                          (r"vision\.merger\.(.+)$", r"\1"), (r"kv\.keys\.0*(\d+)$", r"K\1"),
                          (r"kv\.values\.0*(\d+)$", r"V\1")):
        found = re.match(pattern, seam)
        if found:
            return found.expand(name)
    return seam


def _names(groups: Sequence[Sequence[Step]], frame: _Frame) -> Markup:
    """Axis labels, as many as fit; the last one always."""
    names = [short_name(group[0].seam)[:18] for group in groups]
    last = len(groups) - 1
    parts, free, end = [], 0.0, frame.middle(last) - 3.3 * len(names[last]) - 3
    for at, name in enumerate(names):
        half = 3.3 * len(name) + 3
        if at == last or (frame.middle(at) - half >= free and frame.middle(at) + half <= end):
            parts.append(Markup('<text class="name" x="{}" y="{}">{}</text>').format(
                frame.middle(at), frame.height - 8, name))
            free = frame.middle(at) + half
    return Markup("").join(parts)


def _column(ladder: Ladder, group: Sequence[Step], frame: _Frame, at: int) -> Markup:
    """The hover target of a seam: its numbers in `<title>`, which browsers show without any script."""
    words = "\n".join(_words(ladder, step) for step in group[:3])
    if len(group) > 3:
        words += f"\nand {len(group) - 3} more seams in this column"
    return Markup('<g class="col"><rect x="{}" y="{}" width="{}" height="{}"/><title>{}</title></g>').format(
        frame.left(at), frame.head, round(frame.step, 1), frame.height - FOOT - frame.head, words)


def _words(ladder: Ladder, step: Step) -> str:
    lines = [f"{step.seam}: {step.outcome.value}"]
    for (way, region), mark in sorted(step.marks.items(), key=lambda item: item[0], reverse=True):
        name = " ".join(part for part in (way, region) if part)
        token = "" if mark.token is None else f" at token {mark.token}, over {region} tokens"
        where = f", largest |Δ| {figure(mark.max_abs)} at {place(mark.max_abs_at)}" if mark.max_abs_at else ""
        case = "" if ladder.case else f" ({mark.case})"
        lines.append(f"{name}: {figure(mark.value)}{token}{where}, cosine {cosine(mark.cosine)}{case}")
    for way, (limit, noise) in step.limits.items():
        lines.append(f"bound{' ' + way if way else ''} {figure(limit)}, noise {figure(noise)}")
    if step.outcome is not Outcome.PASS:
        lines.append(step.leading.reason[:300])
    return "\n".join(lines)
