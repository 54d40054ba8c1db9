"""The scoreboard: every fault tried, what was caught, what was named, and what the common gates let through."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.faults import KINDS, Fault, faults
from harness.faults.baselines import GATES
from harness.faults.trial import Bench, Result
from harness.options import Options
from harness.run import machine, tool
from harness.subject import Subject

SCHEMA = 2
FAST = ("scene-211", "wide", "long-text")
"""Cases of the fast subset: one image, one that is not square, one long text."""
FAST_EACH = 2
"""Faults of each class in the fast subset."""
BARS = {"caught": 1.0, "block": 0.98, "op": 0.90}
Progress = Callable[[int, int], None]

_bench: Bench | None = None


def chosen(kinds: Sequence[str] | None = None, fast: bool = False) -> list[Fault]:
    """The faults of some classes, all by default; of the fast subset only what needs no exported bundle."""
    found = [fault for kind in kinds or KINDS for fault in faults(kind)]
    if not fast:
        return found
    quick = [fault for fault in found if fault.target != "asset" and not fault.equivalent]
    return [fault for kind in KINDS for fault in [one for one in quick if one.kind == kind][:FAST_EACH]]


def bench_for(options: Options, fast: bool, work: Path) -> Bench:
    """What the trials of one process share."""
    import torch

    torch.set_num_threads(1)
    subject = Subject(options)
    if fast:
        subject.keep_cases(FAST)
        subject.__dict__["policy"] = replace(subject.policy, min_cases=len(FAST))
    return Bench(subject, work)


def run(options: Options, tried: Sequence[Fault], *, fast: bool = False, jobs: int = 1,
        progress: Progress = lambda done, total: None) -> tuple[list[Result], list[Result]]:
    """Results of the faults, in their order, and of the healthy controls."""
    with tempfile.TemporaryDirectory(prefix="harness-faults-") as folder:
        bench, results = bench_for(options, fast, Path(folder)), []
        try:
            if any(fault.target == "asset" for fault in tried):
                _ = bench.bundles
            controls = healthy(bench)
            for result in _tried(bench, tried, fast, Path(folder), jobs):
                results.append(result)
                progress(len(results), len(tried))
        finally:
            bench.subject.close()
    return results, controls


def make(options: Options, arguments: Any, progress: Progress) -> dict[str, Any]:
    """The record of what the command line asks for: `kinds`, `fast`, `jobs`, `command`."""
    tried = chosen(arguments.kinds, arguments.fast)
    results, controls = run(options, tried, fast=arguments.fast, jobs=arguments.jobs, progress=progress)
    checkpoint = Subject(options).checkpoint
    return record(results, controls, arguments.command, {"name": checkpoint.name, "digest": checkpoint.digest})


def healthy(bench: Bench) -> list[Result]:
    """Trials with nothing switched on, one a target: none may be stopped."""
    targets = ("graph", "host", "bundle", "engine")
    return [bench.try_out(Fault("control", f"healthy_{target}", f"nothing switched on ({target})", target, "", "none", None,
                                "derived", True, lambda thing: None)) for target in targets]


def _tried(bench: Bench, tried: Sequence[Fault], fast: bool, folder: Path, jobs: int) -> Iterator[Result]:
    if jobs == 1:
        yield from map(bench.try_out, tried)
        return
    options = replace(bench.subject.options, oracle=bench.subject.oracle.path)
    bundles = bench.bundles if "bundles" in bench.__dict__ else None
    # Spawned, not forked: torch's thread pools do not survive a fork.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (options, fast, folder, bundles)) as pool:
        yield from pool.map(_one, [fault.id for fault in tried])


def _begin(options: Options, fast: bool, folder: Path, bundles: tuple[Path, Path] | None) -> None:
    global _bench
    _bench = bench_for(options, fast, folder)
    if bundles:
        _bench.use(*bundles)


def _one(name: str) -> Result:
    return _bench.try_out(next(fault for fault in faults() if fault.id == name))


def tally(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row a class and one for all: how many, caught, block and op named rightly, and what each gate stopped."""
    rows = []
    for kind in (*KINDS, "all"):
        real = [one for one in results if not one.equivalent and kind in (one.kind, "all")]
        if not real:
            continue
        with_op = [one for one in real if one.op is not None or one.expected.endswith(")")]
        rows.append({"kind": kind, "faults": len(real), "caught": sum(one.caught for one in real),
                     "rung": sum(one.rung for one in real), "block": sum(one.block for one in real),
                     "with_op": len(with_op), "op": sum(bool(one.op) for one in with_op),
                     "explained": sum("tried out" in one.cause for one in real),
                     "seen": {gate: sum(one.gates.get(gate) is not None for one in real) for gate in GATES},
                     **{gate: sum(bool(one.gates.get(gate)) for one in real) for gate in GATES}})
    return rows


def record(results: Sequence[Result], controls: Sequence[Result], command: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON types."""
    benign = [one for one in (*results, *controls) if one.equivalent]
    return {"schema": SCHEMA, "command": command, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "tool": tool(), "machine": machine(), "checkpoint": checkpoint, "bars": BARS, "classes": tally(results),
            "benign": {"tried": len(benign), "flagged": [one.fault for one in benign if one.caught]},
            "seconds": round(sum(one.seconds for one in results), 1),
            "results": [one.record() for one in results], "controls": [one.record() for one in controls]}


def markdown(record: dict[str, Any]) -> str:
    """The table, what was missed, and what was named otherwise."""
    lines = ["# Detection power", "", f"Made by `{record['command']}` on {record['created'][:10]}, "
             f"{record['machine']['cpu']}, {record['seconds']:.0f} s of trials.", "",
             f"| class | faults | caught | block named | op named | cause found | {' | '.join(GATES.values())} |",
             "|---|---|---|---|---|---|" + "---|" * len(GATES)]
    for row in record["classes"]:
        gates = [f"{row[gate]} of {row['seen'][gate]}" if row["seen"][gate] else "does not look" for gate in GATES]
        ops = f"{row['op']} of {row['with_op']}" if row["with_op"] else "-"
        lines.append(f"| {row['kind']} | {row['faults']} | {row['caught']} | {row['block']} | {ops} | {row['explained']} | {' | '.join(gates)} |")
    stopped = {gate: [one["fault"] for one in record["controls"] if one["gates"].get(gate)] for gate in GATES}
    lines += ["", "Cause found: the report names a mistake that it has tried out, and that gives the values seen.", "",
              "Healthy, and yet stopped by a common gate: " + ("; ".join(
                  f"{heading}: {', '.join(stopped[gate])}" for gate, heading in GATES.items() if stopped[gate]) or "none") + "."]
    benign = record["benign"]
    lines += ["", f"Equivalents and healthy controls: {len(benign['flagged'])} of {benign['tried']} flagged"
              + (f" ({', '.join(benign['flagged'])})" if benign["flagged"] else "") + "."]
    for title, rows in (("Missed", [one for one in record["results"] if not one["equivalent"] and one["outcome"] == "PASS"]),
                        ("Caught, and another place named", [one for one in record["results"] if not one["equivalent"]
                         and one["outcome"] != "PASS" and not (one["block"] and one["op"] is not False)])):
        if rows:
            lines += ["", f"## {title}", "", "| fault | what | expected | named |", "|---|---|---|---|"]
            lines += [f"| {one['fault']} | {one['title']} | {_cell(one['expected'])} | {_cell(one['named']) or 'nothing'} |"
                      for one in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return f"`{text}`".replace("|", " or ") if text else ""


def passed(record: dict[str, Any]) -> bool:
    """Whether every bar is reached and nothing healthy is flagged."""
    whole = next((row for row in record["classes"] if row["kind"] == "all"), None)
    if whole is None:
        raise HarnessError("no fault was tried", fix="name another class")
    figures = {"caught": whole["caught"] / whole["faults"], "block": whole["block"] / whole["faults"],
               "op": whole["op"] / whole["with_op"] if whole["with_op"] else 1.0}
    return all(figures[name] >= bar for name, bar in record["bars"].items()) and not record["benign"]["flagged"]
