"""The record of one run: what was judged, by what, every verdict, and how long it took. Plain data, JSON on disk."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness import __version__
from harness.errors import HarnessError
from harness.verdict import Verdict, plain

SCHEMA = 1


def tool() -> dict[str, str]:
    """Version and, in a checkout, commit of this tool ("+" = with uncommitted changes)."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = bool(commit) and bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.TimeoutExpired):
        commit, changed = "", False
    return {"version": __version__, "commit": commit + ("+" if changed else "") if commit else "unknown"}


def machine() -> dict[str, Any]:
    """Where a figure was measured."""
    return {"system": platform.system(), "arch": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(),
            "python": platform.python_version()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


@dataclass
class Run:
    """Collects verdicts and facts while a run goes on.

    subject: what was judged, with digests. engine: name, platform, versions. speed: the row that ports publish. tokens:
    one table a case. heat: token by layer errors a case. power: the smallest error that each rung sees at each seam, where
    it was measured under these bounds (`harness faults --power`). timings: (step, seconds).
    """

    command: str = ""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    tool: dict[str, str] = field(default_factory=tool)
    machine: dict[str, Any] = field(default_factory=machine)
    subject: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    bounds: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    heat: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    power: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, Any] = field(default_factory=dict)
    localization: list[dict[str, Any]] = field(default_factory=list)
    timings: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the wall time of the block to `timings`, also where it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings.append((step, time.perf_counter() - started))

    def of(self, rung: str) -> list[Verdict]:
        """Verdicts of one rung."""
        return [verdict for verdict in self.verdicts if verdict.rung == rung]

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        body = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "verdicts"}
        return {"schema": SCHEMA, **plain(body), "verdicts": [verdict.record() for verdict in self.verdicts]}


def run_from_record(record: Mapping[str, Any]) -> Run:
    """Inverse of `Run.record`. Raises HarnessError where the record is of another schema or not ours at all."""
    if not isinstance(record, Mapping) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, Mapping) else type(record).__name__
        raise HarnessError(f"run record of schema {found!r}, this tool reads {SCHEMA}", where="run.json",
                           fix="render it with the version that wrote it")
    plain_run = Run(tool={}, machine={})
    try:
        record = {"power": [], **record}  # a record from before power was measured
        known = {name: record[name] for name in Run.__dataclass_fields__}
        wrong = [name for name, value in known.items() if not isinstance(value, type(getattr(plain_run, name)))]
        if wrong:
            raise TypeError(f"{wrong[0]} is a {type(known[wrong[0]]).__name__}")
        known["verdicts"] = [Verdict.from_record(row) for row in known["verdicts"]]
        known["timings"] = [(step, float(seconds)) for step, seconds in known["timings"]]
        return Run(**known)
    except (KeyError, TypeError, ValueError) as error:
        raise HarnessError(f"not a whole run record ({type(error).__name__}: {error})", where="run.json",
                           fix="run the gate again") from error


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files together: all are on the disk before the first takes its place, so what was there stays if one fails.

    Raises HarnessError where the disk has no room or the folder cannot be written.
    """
    drafts = {folder / f".{name}.{os.getpid()}": folder / name for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft, text in zip(drafts, texts.values()):
            draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        for draft, path in drafts.items():
            os.replace(draft, path)
    except OSError as error:
        raise HarnessError(f"cannot be written ({error.strerror or error})", where=folder / next(iter(texts)),
                           fix="free some disk or choose another folder") from error
    finally:
        for draft in drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write text whole or not at all; see `write_files`."""
    write_files(path.parent, {path.name: text})


def json_text(value: Any) -> str:
    """Sorted, indented JSON. Raises ValueError for non-finite numbers."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `json_text`."""
    write_atomic(path, json_text(value))
