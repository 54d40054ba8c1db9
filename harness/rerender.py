"""`harness report`: pages, cards and annotations again from the records that lie on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.attest import CERTIFICATE, RECORD, read_report
from harness.errors import HarnessError
from harness.report import (render_annotations, render_card, render_compare, render_html, render_index,
                            render_markdown)
from harness.run import write_atomic, write_files
from harness.signing import sign


def rerender(folders: Sequence[Path], *, card: bool = False, annotations: bool = False, index: Path | None = None,
             sign_with: Path | None = None, link: str | None = None) -> str:
    """What `harness report` prints: a card, annotations, or where the pages were written.

    Raises HarnessError where folders and options do not go together, or a folder holds no run.
    """
    if index is not None:
        return _index(index)
    if len(folders) == 2:
        write_atomic(folders[1] / "compare.html", render_compare(*(read_report(folder)[0] for folder in folders)))
        return f"what changed is in {folders[1] / 'compare.html'}"
    if len(folders) != 1:
        raise HarnessError(f"{len(folders)} report folders given", fix="give one to render it, two to compare them")
    record, certificate = read_report(folders[0])
    if card:
        return render_card(record, certificate)
    if annotations:
        return render_annotations(record, certificate, root=Path.cwd())
    write_files(folders[0], {"report.html": render_html(record, certificate),
                             "report.md": render_markdown(record, certificate,
                                                          {"report, record and certificate": link} if link else None)})
    if sign_with is None:
        return f"rendered {folders[0] / 'report.html'}"
    made = sign(folders[0] / CERTIFICATE, sign_with, f"{certificate.get('outcome')} {certificate.get('digest')}")
    return f"rendered {folders[0] / 'report.html'}, signed {made}"


def _index(folder: Path) -> str:
    """A page over the runs in a folder; one that cannot be read is a row with the reason."""
    runs = [(path.parent.name, *_read(path.parent)) for path in sorted(folder.glob(f"*/{RECORD}"))]
    if not runs:
        raise HarnessError("holds no report", where=folder, fix="run `harness gate` first")
    write_atomic(folder / "index.html", render_index(runs))
    return f"{len(runs)} runs listed in {folder / 'index.html'}"


def _read(folder: Path) -> tuple[Any, Any]:
    try:
        return read_report(folder)
    except HarnessError as error:
        return error, None
