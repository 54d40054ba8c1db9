"""Power: the smallest error that each rung sees at each seam, found by injecting a scaled perturbation and bisecting its size.

Two perturbations of the thing under test: noise over the whole activation, the hardest of its size to see, and the same on
one token alone; in the rungs that compare one value with one, a change of one value. Sizes are relative L2 norms: of the
noise to the activation, of the token's noise to that token, of the change to the value. The rung judges with its own code
and bounds; what is measured is the size from which on it says FAIL.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import HarnessError
from harness.faults.scoreboard import Progress, bench_for
from harness.faults.suspect import Host, Suspect
from harness.faults.tables import ship
from harness.faults.trial import Bench
from harness.exhibits import bounds_digest
from harness.options import Options
from harness.report.power import draw_power
from harness.rungs import CHECKS, answers
from harness.rungs.engine import SHARP
from harness.run import machine, tool
from harness.trace import decoder_seams, vision_seams
from harness.verdict import Outcome

SCHEMA = 1
SMALLEST, LARGEST = 1e-9, 1e3
STEPS = 9
"""Halvings of the range on a log scale: what is found is right within a factor of 1.06."""
CASE = "scene-211"
EVERYWHERE, ONE_TOKEN, ONE_VALUE = "whole activation", "one token", "one value"
Inject = Callable[[Suspect, float], None]
Tap = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Injection:
    """One perturbation: which rung is to see it, in which case of its plan, at which seam, and how it is switched on."""

    rung: str
    case: str
    seam: str
    way: str
    inject: Inject


@dataclass(frozen=True)
class Power:
    """The least size seen; inf where even `LARGEST` is not, which is a hole and said so."""

    rung: str
    case: str
    seam: str
    way: str
    least: float


def injections(bench: Bench) -> Iterator[Injection]:
    """Every rung that measures, every seam of its plan."""
    subject = bench.subject
    geometry = subject.geometry
    ways = (EVERYWHERE, ONE_TOKEN)
    yield Injection("inputs", CASE, "patches", ONE_VALUE, _patches)
    for name in {_family(name): name for name in reversed(subject.checkpoint.names())}.values():
        yield Injection("weights", "graph", name, ONE_VALUE, partial(_weight, name))
    for rung, seams in (("vision", vision_seams(geometry)), ("decoder", decoder_seams(geometry))):
        yield from (Injection(rung, CASE, seam, way, partial(_graph, seam, way)) for seam in seams for way in ways)
    for layer in range(geometry.layers):
        for part, source in (("keys", "k_rope"), ("values", "v")):
            seam, made = f"kv.{part}.{layer:02d}", f"decoder.layers.{layer:02d}.attn.{source}"
            yield from (Injection("decode", CASE, seam, way, partial(_graph, made, way)) for way in ways)
    yield from (Injection("decode", CASE, seam, EVERYWHERE, partial(_graph, "logits", EVERYWHERE))
                for seam in ("kl", "tokens"))
    for case in (CASE + SHARP, CASE):
        for seam in (*vision_seams(geometry), *decoder_seams(geometry)):
            yield from (Injection("engine", case, seam, way, partial(_engine, seam, way)) for way in ways)
    yield Injection("tokens", CASE, "tokens", EVERYWHERE, partial(_engine, "logits", EVERYWHERE))


def measure(bench: Bench, progress: Progress = lambda done, total: None) -> list[Power]:
    """One row for each injection."""
    wanted, found = list(injections(bench)), []
    for done, one in enumerate(wanted):
        progress(done, len(wanted))
        least = bisect(partial(_seen, bench, one))
        found.append(Power(one.rung, one.case, one.seam, one.way, least))
    return found


def bisect(seen: Callable[[float], bool]) -> float:
    """The least size that is seen, to half a step of the bisection; inf where none is. 0 is never seen by a sound rung."""
    low, high = math.log(SMALLEST), math.log(LARGEST)
    if not seen(LARGEST):
        return math.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(math.exp(middle)) else (middle, high)
    return math.exp(high)


def _seen(bench: Bench, one: Injection, size: float) -> bool:
    """Whether the rung fails at this very seam: what shows elsewhere would name another place."""
    suspect = Suspect(bench.subject)
    one.inject(suspect, size)
    verdicts = answers(CHECKS[one.rung], suspect, one.case)
    return any(verdict.outcome is Outcome.FAIL and verdict.seam == one.seam for verdict in verdicts)


def noise(value: Tensor, size: float, way: str, seed: int = 0) -> Tensor:
    """`value` with noise of relative L2 norm `size`, on all tokens or on the one in the middle.

    The one token is one of the prompt: a call that brings a single token stays as it is.
    """
    if not value.is_floating_point() or (way == ONE_TOKEN and len(value) == 1):
        return value
    made = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    if way == ONE_TOKEN:
        kept = torch.zeros(len(value), *[1] * (value.ndim - 1))
        kept[len(value) // 2] = 1
        made = made * kept
        norm = value[len(value) // 2].norm()
    else:
        norm = value.norm()
    return value + made * (size * norm / made.norm())


def _graph(seam: str, way: str, suspect: Suspect, size: float) -> None:
    """Perturb what the graph under test computes at `seam`; step by step calls see the prompt's call perturbed."""
    def bend(graph: Any) -> None:
        for name in ("encode", "decode"):
            plain = getattr(graph, name)
            setattr(graph, name, lambda *arguments, plain=plain: plain(*arguments[:-1], _perturbing(arguments[-1])))

    def _perturbing(tap: Tap) -> Tap:
        def perturbed(name: str, value: Tensor) -> Tensor:
            return tap(name, noise(value, size, way) if name == seam else value)
        return perturbed

    suspect.bend_graph = bend


def _engine(seam: str, way: str, suspect: Suspect, size: float) -> None:
    def bend(loop: Any) -> None:
        loop.bend = lambda name, value: noise(value, size, way) if name == seam else value
        if seam == "logits":
            loop.read = lambda logits: noise(torch.from_numpy(logits), size, way).numpy()

    suspect.tables, suspect.bend_loop = ship(suspect.healthy), bend


def _weight(name: str, suspect: Suspect, size: float) -> None:
    def bend(graph: Any) -> None:
        tensor = graph.tensors()[name]
        at = tensor.abs().argmax()
        tensor.view(-1)[at] *= 1 + size

    suspect.bend_graph = bend


def _patches(suspect: Suspect, size: float) -> None:
    host = Host(suspect)
    plain = host.patches

    def bent(*arguments: Any) -> tuple:
        patches, grid = plain(*arguments)
        patches = patches.copy()
        at = abs(patches).argmax()
        patches.reshape(-1)[at] *= 1 + size
        return patches, grid

    host.patches = bent
    suspect.host_under_test = host


def _family(name: str) -> str:
    """`decoder.layers.03.deepstack` -> `decoder.layers.*.deepstack`."""
    return re.sub(r"(?<=\.)\d+", "*", name)


def make(options: Options, arguments: Any, progress: Progress) -> dict[str, Any]:
    """The record of `harness faults --power`."""
    with tempfile.TemporaryDirectory(prefix="harness-power-") as folder:
        bench = bench_for(options, False, Path(folder))
        try:
            if CASE not in bench.subject.engine_cases():
                raise HarnessError(f"power is measured on the case {CASE}, which these cases lack", where=options.cases,
                                   fix="give the file that holds it")
            found = measure(bench, progress)
        finally:
            bench.subject.close()
    checkpoint = bench.subject.checkpoint
    rows = [{"rung": one.rung, "case": one.case, "seam": one.seam, "way": one.way,
             "least": one.least if math.isfinite(one.least) else None} for one in found]
    return {"schema": SCHEMA, "command": arguments.command, "tool": tool(), "machine": machine(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "mode": bench.subject.mode,
            "checkpoint": {"name": checkpoint.name, "digest": checkpoint.digest},
            "bounds": bounds_digest(bench.subject.bounds), "rows": rows}


def markdown(record: dict[str, Any]) -> str:
    """One line for each family of seams: the best and the worst of its members."""
    groups: dict[tuple[str, str, str, str], list[float | None]] = {}
    for row in record["rows"]:
        seams = "any tensor" if row["rung"] == "weights" else _family(row["seam"])
        groups.setdefault((row["rung"], row["case"], seams, row["way"]), []).append(row["least"])
    lines = ["# The smallest error that each rung sees", "",
             f"Made by `{record['command']}` on {record['created'][:10]}, {record['machine']['cpu']}, mode {record['mode']}.",
             f"A perturbation is injected into the thing under test (case {CASE}) and its relative size is bisected: this is the",
             "smallest that makes the rung fail at that very seam. Of a family of seams, the one seen best and the one seen worst.",
             "", "![The same as a plot](power.svg)", "",
             "| rung | on | seams | perturbed | best | worst |", "|---|---|---|---|---|---|"]
    for (rung, case, seams, way), sizes in groups.items():
        best, worst = min(sizes, key=_size), max(sizes, key=_size)
        lines.append(f"| {rung} | {case} | {seams} | {way} | {_percent(best)} | {_percent(worst)} |")
    return "\n".join(lines) + "\n"


def _size(least: float | None) -> float:
    return math.inf if least is None else least


def _percent(least: float | None) -> str:
    return "not seen" if least is None else f"{least:.2g}"


def pictures(record: dict[str, Any]) -> dict[str, str]:
    """The same as a plot."""
    return {"power.svg": str(draw_power(record["rows"])) + "\n"}


def passed(record: dict[str, Any]) -> bool:
    """Whether every seam has a size that is seen."""
    return bool(record["rows"]) and all(row["least"] is not None for row in record["rows"])
