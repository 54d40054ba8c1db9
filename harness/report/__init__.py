"""What a run found, for people: HTML, Markdown, model card, index, comparison. Renders records, decides nothing."""

from __future__ import annotations

from harness.report.annotations import render_annotations
from harness.report.card import render_card
from harness.report.compare import render_compare
from harness.report.html import render_html
from harness.report.index import render_index
from harness.report.markdown import render_markdown

__all__ = ["render_annotations", "render_card", "render_compare", "render_html", "render_index", "render_markdown"]
