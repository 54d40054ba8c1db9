"""What each figure of a report can be had again by: commands ready to copy, with the options of the run itself."""

from __future__ import annotations

import shlex

from harness.ladder import RUNGS
from harness.report.plain import mapping, rows, text
from harness.report.read import Judged
from harness.report.view import first_broken, title

SHARED = ("checkpoint", "graph", "bundle", "vision-bundle", "oracle", "mode", "device", "cases", "bounds", "policy")
"""Options of `pytest ladders/` that `harness ladder` has too."""


def commands(judged: Judged) -> list[tuple[str, str]]:
    """What each figure can be had again by, ready to copy; options are those of the run itself."""
    command = judged.run.command if isinstance(judged.run.command, str) else ""
    found = [("this whole run", command)] if command else []
    broken = first_broken(judged)
    if broken:
        known = any(row.get("name") == broken.case for row in rows(judged.run.cases))
        found.append(("the first broken seam", _ladder(command, broken.rung, broken.case if known else None)))
    found += [(f"rung {row.name}", _ladder(command, row.name)) for row in RUNGS]
    report, bundle = folder(judged), _option(command, "--bundle")
    return [*found, ("speed", command or "harness gate"),
            ("the certificate, judged again from its figures", shlex.join(["harness", "verify", report, *bundle])),
            ("before an upload", shlex.join(["harness", "publish-check", *(bundle or ["BUNDLE"])])),
            ("the rows for a model card", shlex.join(["harness", "report", report, "--card"]))]


def again(judged: Judged) -> dict[str, str]:
    """The command of each rung."""
    command = judged.run.command if isinstance(judged.run.command, str) else ""
    return {row.name: _ladder(command, row.name) for row in RUNGS}


def folder(judged: Judged) -> str:
    """The folder that the run was written to, as its command says."""
    command, subject = judged.run.command if isinstance(judged.run.command, str) else "", mapping(judged.run.subject)
    given = _option(command, "--out") or _option(command, "--report")
    if given:
        return given[0]
    bundle = _option(command, "--bundle")
    last = bundle[0].rstrip("/").rpartition("/")[2] if bundle else text(subject.get("mode"), 40)
    return f"reports/{title(judged)}-{last}"


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _option(command: str, name: str) -> list[str]:
    """The value of an option, in a list, or none."""
    words = _words(command)
    joined = next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)
    return [joined] if joined is not None else words[words.index(name) + 1:][:1] if name in words else []


def _ladder(command: str, rung: str, case: str | None = None) -> str:
    """A command narrowed to one rung, without the folder it wrote: a part must not replace the whole.

    `pytest ladders/` takes the same options as `harness gate`, but for the checkpoint, which stands alone there.
    """
    words = _words(command)
    options = words[2:] if words[:1] == ["harness"] else []
    if words[:1] == ["pytest"]:
        split = [part for word in words[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
        given = {name: value[0] for name in SHARED if (value := _option(shlex.join(split), f"--{name}"))}
        options = [given.pop("checkpoint")] if "checkpoint" in given else []
        options += [part for name, value in given.items() for part in (f"--{name}", value)]
    if "--out" in options:
        at = options.index("--out")
        options = options[:at] + options[at + 2:]
    wanted = ["harness", "ladder", *options, "--rung", rung, *(["--case", case] if case else [])]
    return shlex.join(wanted)
