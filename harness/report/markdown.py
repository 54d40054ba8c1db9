"""The pull request comment: verdict, ten rungs, first broken seam, links; every value escaped for GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.report import plain, view
from harness.report.html import TEMPLATES
from harness.report.read import guarded, read

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$!])")
LINKS = {"report": "report.html", "record": "run.json", "certificate": "certificate.json"}


@guarded
def render_markdown(record: Mapping[str, Any], certificate: Mapping[str, Any] | None = None,
                    links: Mapping[str, str] | None = None) -> str:
    """A short report of one run; `links` are label -> address, by default the files that lie beside it.

    Raises HarnessError as `render_html` does.
    """
    judged = read(record, certificate)
    return environment().get_template("report.md.jinja").render(
        judged=judged, title=view.title(judged), scope=view.scope(judged.run), rungs=view.rung_rows(judged),
        broken=view.first_broken(judged), places=plain.rows(judged.run.localization)[:3], facts=view.facts(judged),
        speed=view.speed(judged.run), links=LINKS if links is None else links)


@cache
def environment() -> Environment:
    """Every expression goes through `escaped`: a value is text, never a mention, a link, a cell's end or markup."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=False, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True, finalize=escaped, keep_trailing_newline=True)
    made.filters |= {"figure": plain.figure, "text": plain.text, "short": plain.short, "code": code, "address": address}
    made.globals |= {"symbol": view.SYMBOL}
    return made


class Ready(str):
    """Text that is Markdown already."""


def escaped(value: Any) -> str:
    """A value as Markdown text of one line: no markup, no mention, no bare address that becomes a link."""
    if isinstance(value, Ready):
        return value
    words = _SPECIAL.sub(r"\\\1", " ".join(str(value).split())).replace("\\<", "&lt;").replace("\\>", "&gt;")
    return words.replace("&", "&amp;").replace("&amp;lt;", "&lt;").replace("&amp;gt;", "&gt;").replace("@", "&#64;") \
        .replace("://", "&#58;//").replace("www.", "www&#46;")


def code(value: Any) -> Ready:
    """A value as inline code; backticks would end it and a bar would end a table cell, so they are replaced."""
    words = " ".join(str(value).split()).replace("`", "'").replace("|", "¦")
    return Ready(f"`{words}`" if words else "")


def address(value: Any) -> Ready:
    """A link's target; what could end it or start another is percent-encoded, and only relative or https ones stand."""
    words = quote(str(value), safe="/:?&=%#.-_~+")
    return Ready(words if words.startswith("https://") or ":" not in words else "#")
