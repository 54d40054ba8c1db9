"""Colours of the reports: enough contrast in light, dark and print (WCAG 2.2, 1.4.3 and 1.4.11), never alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.report.html import TEMPLATES
from harness.report.png import palette

CSS = (Path(TEMPLATES) / "report.css").read_text(encoding="utf-8")
TEXTS = ("ink", "soft", "image", "text", "all", "bound", "pass", "fail", "error", "skip")
LINES = ("image", "text", "all", "bound", "fail")


def themes() -> dict[str, dict[str, str]]:
    """Custom properties by theme; dark and print override what light defines."""
    blocks = re.findall(r":root\s*\{(.*?)\}", CSS, re.S)
    light, dark, printed = (dict(re.findall(r"--(\w+):\s*(#[0-9a-f]{3,6})", block)) for block in blocks)
    return {"light": light, "dark": {**light, **dark}, "print": {**light, **printed}}


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    code = colour.lstrip("#")
    code = "".join(part * 2 for part in code) if len(code) == 3 else code
    parts = [int(code[at:at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio, 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_formula_is_the_standards():
    assert contrast("#000", "#fff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_is_legible_on_every_ground(theme):
    held = themes()[theme]
    weak = [f"{name} on {ground}: {contrast(held[name], held[ground]):.2f}" for name in TEXTS
            for ground in ("page", "card", "shade") if contrast(held[name], held[ground]) < 4.5]
    assert not weak


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_lines_of_a_picture_stand_out(theme):
    held = themes()[theme]
    assert not [name for name in LINES if contrast(held[name], held["card"]) < 3]


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_inverted_text_is_legible(theme):
    held = themes()[theme]
    assert contrast(held["page"], held["fail"]) >= 4.5 and contrast(held["page"], held["ink"]) >= 4.5


def test_the_heat_scale_grows_in_lightness_so_that_it_reads_in_grey():
    levels = [luminance("#" + "".join(f"{part:02x}" for part in colour)) for colour in palette()[:250]]
    assert levels == sorted(levels) and levels[-1] - levels[0] > 0.9


def test_motion_is_left_out_where_it_is_not_wanted():
    assert "prefers-reduced-motion: reduce" in CSS and "animation" not in CSS and "transition" not in CSS
