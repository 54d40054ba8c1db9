"""The benign suite: what a healthy conversion may do otherwise, over every case; none of it may be flagged.

Variations of the graph (`harness.benign`, in pairs and with other seeds, and the equivalents among the faults), of the
engine's loop (chunks, a rounding more, an int8 cache, the three modes), of the host and of the quantizer. One entry is one
variation on one case.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

from harness.faults import Fault, faults, healthy
from harness.faults.scoreboard import bench_for
from harness.faults.trial import LOOKS, Bench, climb
from harness.options import Options
from harness.run import machine, tool
from harness.verdict import Outcome

SCHEMA = 1
SEEDS = range(1, 7)
CHUNKS = (1, 5, 16, 100, 1000)
MODES = ("fp16", "int8lin", "int8hu")
THREADS = 2


@dataclass(frozen=True)
class Variation:
    """What is varied, in words; of which target; and how."""

    name: str
    target: str
    apply: Callable[[Any], None]
    rungs: tuple[str, ...] = ()


def variations() -> Iterator[Variation]:
    """All of them but modes and threads, which are other settings of the same."""
    from harness.benign import VARIATIONS, another_order_of_sums

    for name, change in VARIATIONS.items():
        yield Variation(name, "graph", change)
    for seed in SEEDS:
        yield Variation(f"another_order_of_sums, seed {seed}", "graph",
                        functools.partial(another_order_of_sums, seed=seed))
    for pair in combinations(("fused_attention", "scale_in_query", "norm_by_division", "sums_in_two_halves"), 2):
        if pair != ("fused_attention", "scale_in_query"):  # the kernel's own scale was read before
            yield Variation(" and ".join(pair), "graph", lambda graph, pair=pair: [VARIATIONS[one](graph) for one in pair])
    for chunk in CHUNKS:
        yield Variation(f"calls of {chunk} tokens", "engine", lambda loop, chunk=chunk: setattr(loop, "chunk", chunk))
    for row in healthy.rows():
        yield Variation(*row)
    for fault in faults():
        if fault.equivalent and fault.target != "asset":  # those are exported anew, and tried with the faults
            rungs = () if fault.rung == "none" else tuple(fault.rung.split("|"))
            yield Variation(f"{fault.id}: {fault.title}", fault.target, fault.apply, rungs)


def suite(bench: Bench, progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """One row for each variation and case: how many verdicts, and the first that is no PASS."""
    import torch

    wanted = [*variations(), Variation(f"{THREADS} threads", "graph", lambda graph: torch.set_num_threads(THREADS))]
    rows: list[dict[str, Any]] = []
    for done, variation in enumerate(wanted):
        progress(done, len(wanted))
        rows += _judged(bench, variation, bench.subject.mode)
        torch.set_num_threads(1)
    for mode in MODES:
        if mode != bench.subject.mode:
            other = Bench.like(bench, replace(bench.subject.options, mode=mode, oracle=bench.subject.oracle.path))
            for target in ("engine", "bundle"):
                rows += _judged(other, Variation(f"as it is, {target}", target, lambda thing: None), mode)
    return rows


def _judged(bench: Bench, variation: Variation, mode: str) -> list[dict[str, Any]]:
    fault = Fault("benign", variation.name, variation.name, variation.target, "none", "none", None, "", True, variation.apply)
    suspect = bench.suspect(fault)
    looks = [row for row in LOOKS[variation.target] if not variation.rungs or row[0] in variation.rungs]
    verdicts = climb(suspect, looks)
    rows = []
    for case in dict.fromkeys(one.case for one in verdicts):
        mine = [one for one in verdicts if one.case == case]
        wrong = next((one for one in mine if one.outcome is not Outcome.PASS and not suspect.policy.excuses(one)), None)
        rows.append({"variation": variation.name, "target": variation.target, "mode": mode, "case": case,
                     "verdicts": len(mine), "flagged": wrong is not None,
                     "reason": f"{wrong.id}: {wrong.reason}" if wrong else ""})
    return rows


def make(options: Options, arguments: Any, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The record of the suite."""
    with tempfile.TemporaryDirectory(prefix="harness-benign-") as folder:
        bench = bench_for(options, arguments.fast, Path(folder))
        try:
            rows = suite(bench, progress)
        finally:
            bench.subject.close()
    return {"schema": SCHEMA, "command": arguments.command, "tool": tool(), "machine": machine(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "checkpoint": {"name": bench.subject.checkpoint.name, "digest": bench.subject.checkpoint.digest},
            "tried": len(rows), "flagged": sum(row["flagged"] for row in rows), "rows": rows}


def markdown(record: dict[str, Any]) -> str:
    """How many of each target, and what was flagged."""
    counts = Counter(row["target"] for row in record["rows"])
    verdicts = sum(row["verdicts"] for row in record["rows"])
    lines = ["# Healthy variations", "", f"Made by `{record['command']}` on {record['created'][:10]}: "
             f"{record['flagged']} of {record['tried']} flagged, over {verdicts} verdicts.", "",
             "| under test | variations x cases | flagged |", "|---|---|---|"]
    lines += [f"| {target} | {count} | {sum(row['flagged'] for row in record['rows'] if row['target'] == target)} |"
              for target, count in counts.items()]
    lines += ["", *(f"- {row['variation']} ({row['mode']}), {row['case']}: {row['reason']}"
                    for row in record["rows"] if row["flagged"])]
    return "\n".join(lines).rstrip() + "\n"


def passed(record: dict[str, Any]) -> bool:
    """Whether nothing healthy was flagged."""
    return record["tried"] > 0 and not record["flagged"]
