"""What a person sees: progress while a run goes on, and one readable table at its end (rich, 80 columns)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from harness.ladder import RUNGS
from harness.verdict import Outcome

if TYPE_CHECKING:
    from harness.gate import Decision, RungResult
    from harness.run import Run

WIDTH = 80
STYLE = {Outcome.PASS: "green", Outcome.SKIP: "yellow", Outcome.ERROR: "magenta", Outcome.FAIL: "bold red"}


class Screen:
    """Progress on stderr, so that what a verb prints stays clean; a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self.out = Console(highlight=False)
        error = Console(stderr=True)
        self._progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20),
                                  MofNCompleteColumn(), TimeElapsedColumn(), console=error, transient=True,
                                  disable=quiet or not error.is_terminal)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, step: str, done: int, total: int) -> None:
        """Show `done` of `total` of a named step."""
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(escape(step), total=total)
        self._progress.update(self._tasks[step], completed=done, total=total)

    def rung(self, rung: str, case: str, done: int, total: int) -> None:
        """Show that a rung is at a case."""
        self.step(f"rung {rung}", done + 1, total)

    def say(self, text: str) -> None:
        """A line about a step that has no count."""
        self._progress.console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def table(self, run: Run, decision: Decision, names: Sequence[str], folder: Path) -> None:
        """The rungs, the sentence, what failed first, and how long it took."""
        table = Table(box=None, pad_edge=False)
        for header, settings in (("rung", {}), ("", {}), ("seams", {"justify": "right"})):
            table.add_column(header, no_wrap=True, **settings)
        table.add_column("nearest its bound", overflow="fold")
        for result in decision.rungs:
            if result.rung in names:
                table.add_row(*_row(result))
        self._lines(table)
        for number, row in enumerate(run.localization):
            self._broken(row) if number == 0 else self._also(row)
        if len(names) == len(RUNGS):
            reason = escape(_short(decision.reason, 3 * WIDTH))
            self._lines(f"[{STYLE[decision.outcome]}]{decision.outcome.value}[/]: {reason}")
        self._lines("[dim]" + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in run.timings) + "[/dim]")
        self._whole(f"report: {escape(str(folder / 'report.html'))}")

    def _broken(self, row: Mapping[str, Any]) -> None:
        """The first fault, in full."""
        self._lines(f"[bold red]first broken[/bold red] {_place(row)}")
        block = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
        block.add_column(no_wrap=True)
        block.add_column(overflow="fold")
        for label in ("reason", "tokens", "cause"):
            if row.get(label):
                block.add_row(f"  {label}:", escape(_short(row[label], 2 * WIDTH)))
        if block.row_count:
            self._lines(block)
        if row.get("reproduce"):
            self._whole(f"  reproduce: {escape(str(row['reproduce']))}")

    def _also(self, row: Mapping[str, Any]) -> None:
        """A later rung that broke, often for the same reason: one line, the report has the rest."""
        self._lines(f"[red]also broken[/red] {_place(row)}")

    def _lines(self, content: Any) -> None:
        """Print wrapped, without the blanks that rich fills a table's lines with."""
        with self.out.capture() as captured:
            self.out.print(content)
        for line in captured.get().splitlines():
            self.out.file.write(line.rstrip() + "\n")

    def _whole(self, line: str) -> None:
        """Print one line that may be longer than the screen: a command or a path must survive copying."""
        self.out.print(line, soft_wrap=True)


def _row(result: RungResult) -> tuple[str, ...]:
    leading, total = result.leading, sum(result.counts.values())
    good = result.counts.get("PASS", 0)
    where = f"{leading.seam}: {leading.reason}" if leading else result.reason
    return (result.rung, f"[{STYLE[result.outcome]}]{result.outcome.value}[/]", f"{good}/{total}",
            escape(_short(where, 2 * WIDTH)))


def _place(row: Mapping[str, Any]) -> str:
    op = f" at {row['op']}" if row.get("op") else ""
    return escape(f"({row['rung']}): {row['seam']}{op}, case {row['case']}")


def _short(value: object, length: int) -> str:
    """One line of at most `length` characters; the report has the whole of it."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[:length - 3] + "..."
