"""Memory over time of a recording, as a small SVG.

    python reports/bench/plot_memory.py BENCH.json OUT.svg [--run drafted-image-1]

BENCH.json is what `record.py` wrote. Two lines: resident (files that are mapped included) and anonymous memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 260, 52, 40, 30


def svg(run: dict, title: str) -> str:
    """The picture; x in seconds, y in GiB from 0."""
    samples = run["samples"]
    seconds, most = max(row[0] for row in samples), max(row[1] for row in samples)
    step = next(size for size in (0.1, 0.25, 0.5, 1, 2, 4, 8) if most / size <= 6)
    top = step * (int(most / step) + 1)

    def x(second: float) -> float:
        return LEFT + (WIDTH - LEFT - 12) * second / seconds

    def y(gib: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * gib / top

    def line(column: int, colour: str) -> str:
        points = " ".join(f"{x(row[0]):.1f},{y(row[column]):.1f}" for row in samples)
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'

    marks = [f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(step * k):.1f}" y2="{y(step * k):.1f}" stroke="#ddd"/>'
             f'<text x="{LEFT - 6}" y="{y(step * k) + 4:.1f}" text-anchor="end">{step * k:g}</text>'
             for k in range(int(top / step) + 1)]
    marks += [f'<text x="{x(seconds * k / 6):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
              f'{seconds * k / 6:.0f}</text>' for k in range(7)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18">{title}</text>', *marks, line(1, "#1f5fa8"), line(2, "#c8641e"),
        f'<text x="{WIDTH - 12}" y="18" text-anchor="end">'
        f'<tspan fill="#1f5fa8">resident, peak {run["peak_rss_gib"]} GiB</tspan> <tspan fill="#c8641e">anonymous</tspan></text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">seconds; memory in GiB</text>', "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", default="drafted-image-1")
    given = parser.parse_args()
    held = json.loads(given.bench.read_text(encoding="utf-8"))
    run = held["runs"][given.run]
    given.out.write_text(svg(run, f"record {held['checkpoint']}"), encoding="utf-8")


if __name__ == "__main__":
    main()
