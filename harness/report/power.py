"""The smallest error that each rung sees at each seam, as a picture: one dot a seam on a log scale, a panel for each rung.

Drawn for two places, the parity report and a file of its own, so it carries its own colours: mid-tones that keep 3:1
against white and against the report's dark ground.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH, LEFT, RIGHT, PANEL, GAP, HEAD, FOOT = 1060, 64, 12, 88, 50, 40, 10
LOW, HIGH = -9, 1
NAMED = 24
"""Seams of a panel whose names fit below it."""
COLOURS = {"whole activation": "#2f81c7", "one token": "#c26a1b", "one value": "#2c8f5e"}
SHAPES = {"whole activation": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "one token": "M-4-4H4V4H-4Z", "one value": "M0-5 5 4-5 4Z"}
"""A shape beside the colour, for those who do not see it."""


def draw_power(rows: Sequence[Mapping[str, Any]], label: str = "smallest error that each rung sees, by seam") -> Markup:
    """One `<svg>` of rows with `rung`, `case`, `seam`, `way` and `least` (None where nothing is seen); empty for no rows."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault(f"{row['rung']} on {row['case']}", []).append(row)
    if not panels:
        return Markup("")
    height = HEAD + len(panels) * (PANEL + GAP) + FOOT
    drawn = [_panel(title, held, HEAD + number * (PANEL + GAP) + GAP // 2) for number, (title, held) in enumerate(panels.items())]
    return Markup('<svg class="power" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}" '
                  'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">{}{}</svg>').format(
        WIDTH, height, label, _legend(rows), Markup("").join(drawn))


def power_section(rows: Sequence[Any]) -> dict[str, Any] | None:
    """What the report shows of them: plot, table and one sentence; None where no row is whole."""
    whole = [row for row in rows if isinstance(row, Mapping) and row.get("way") in COLOURS
             and all(isinstance(row.get(name), str) for name in ("rung", "case", "seam"))
             and (row.get("least") is None or (isinstance(row["least"], (int, float)) and 0 < row["least"] < math.inf))]
    if not whole:
        return None
    layers = [row["least"] for row in whole if row["rung"] == "decoder" and row["way"] == "whole activation"
              and re.fullmatch(r"decoder\.layers\.\d+", row["seam"])]
    sentence = "" if not layers or None in layers else (
        f"Noise of {100 * max(layers):.2g} % in any layer of the decoder is seen.")
    seen = [{**row, "seen": "not seen" if row["least"] is None else f"{row['least']:.2g}"} for row in whole]
    return {"rows": seen, "drawn": draw_power(whole), "sentence": sentence}


def _legend(rows: Sequence[Mapping[str, Any]]) -> Markup:
    used = [way for way in COLOURS if any(row["way"] == way for row in rows)]
    return Markup("").join(Markup('<path d="{}" fill="{}" transform="translate({} 14)"/><text x="{}" y="18">noise on {}</text>').format(
        SHAPES[way], COLOURS[way], LEFT + 220 * at, LEFT + 220 * at + 10, "the " + way if way[0] == "w" else way)
        for at, way in enumerate(used))


def _panel(title: str, rows: Sequence[Mapping[str, Any]], top: int) -> Markup:
    seams = list(dict.fromkeys(row["seam"] for row in rows))
    step = (WIDTH - LEFT - RIGHT) / len(seams)
    parts = [Markup('<text x="{}" y="{}" font-weight="600">{}</text>').format(LEFT, top - 4, title)]
    for power in range(LOW, HIGH + 1, 2):
        parts.append(Markup('<path d="M{} {}H{}" stroke="currentColor" stroke-opacity=".15"/>'
                            '<text x="{}" y="{}" text-anchor="end" opacity=".75">1e{}</text>').format(
            LEFT, _y(power, top), WIDTH - RIGHT, LEFT - 6, _y(power, top) + 4, power))
    if len(seams) <= NAMED:
        parts += [Markup('<text x="{}" y="{}" text-anchor="middle" font-size="10" opacity=".75">{}</text>').format(
            round(LEFT + (at + 0.5) * step, 1), top + PANEL + 12, _short(seam)) for at, seam in enumerate(seams)]
    parts += [_dot(row, round(LEFT + (seams.index(row["seam"]) + 0.5) * step, 1), top) for row in rows]
    return Markup("").join(parts)


def _short(seam: str) -> str:
    """`decoder.layers.03.deepstack` -> "03 +ds", `kv.keys.01` -> "k 01", `vision.deepstack.0` -> "ds 0"."""
    for pattern, name in ((r"\w+\.layers\.(\d+)\.deepstack", r"\1 +ds"), (r"\w+\.layers\.(\d+)", r"\1"),
                          (r"kv\.(\w)\w+\.(\d+)", r"\1 \2"), (r"vision\.deepstack\.(\d+)", r"ds \1"), (r"\w+\.(\w+)", r"\1")):
        if re.fullmatch(pattern, seam):
            return re.sub(pattern, name, seam)
    return seam


def _dot(row: Mapping[str, Any], x: float, top: int) -> Markup:
    least = row["least"]
    words = f"{row['seam']}, {row['way']}: " + ("not seen" if least is None else f"seen from {least:.2g}")
    level = HIGH if least is None else min(HIGH, max(LOW, math.log10(least)))
    return Markup('<path d="{}" fill="{}" transform="translate({} {})"><title>{}</title></path>').format(
        SHAPES[row["way"]], "none" if least is None else COLOURS[row["way"]], x, _y(level, top), words)


def _y(power: float, top: int) -> float:
    return round(top + PANEL * (HIGH - power) / (HIGH - LOW), 1)
