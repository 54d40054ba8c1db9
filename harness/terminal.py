"""What a person sees: progress while a run goes on, and one readable table at its end (rich, 80 columns)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from harness.ladder import RUNGS
from harness.verdict import Outcome

if TYPE_CHECKING:
    from harness.gate import Decision, RungResult
    from harness.run import Run

STYLE = {Outcome.PASS: "green", Outcome.SKIP: "yellow", Outcome.ERROR: "magenta", Outcome.FAIL: "bold red"}


class Screen:
    """Progress on stderr, so that what a verb prints stays clean; a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self.out = Console(highlight=False)
        self._progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20),
                                  MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True),
                                  transient=True, disable=quiet)
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
        self._progress.console.print(f"[dim]{escape(text)}[/dim]")

    def table(self, run: Run, decision: Decision, names: Sequence[str], folder: Path) -> None:
        """The rungs, the sentence, what failed first, and how long it took."""
        table = Table(box=None, pad_edge=False)
        for header, settings in (("rung", {}), ("", {}), ("seams", {"justify": "right"}), ("nearest its bound", {})):
            table.add_column(header, **settings)
        for result in decision.rungs:
            if result.rung in names:
                table.add_row(*_row(result))
        self.out.print(table)
        for row in run.localization:
            self.out.print(f"[bold red]first broken[/bold red] ({row['rung']}): {escape(row['seam'])}"
                           f"{' at ' + escape(row['op']) if row['op'] else ''}, case {escape(row['case'])}")
            for label in ("reason", "tokens", "cause", "reproduce"):
                if row.get(label):
                    self.out.print(f"  {label}: {escape(str(row[label]))}")
        if len(names) == len(RUNGS):
            self.out.print(f"[{STYLE[decision.outcome]}]{decision.outcome.value}[/]: {escape(decision.reason)}")
        self.out.print("[dim]" + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in run.timings) + "[/dim]")
        self.out.print(f"report: {escape(str(folder / 'report.html'))}")


def _row(result: RungResult) -> tuple[str, ...]:
    leading, total = result.leading, sum(result.counts.values())
    good = result.counts.get("PASS", 0)
    where = f"{leading.seam}: {leading.reason}" if leading else result.reason
    return (result.rung, f"[{STYLE[result.outcome]}]{result.outcome.value}[/]", f"{good}/{total}", escape(where))
