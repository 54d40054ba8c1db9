"""What the torch rungs measure of a graph that reads its weights for each call: for all cases at once, as the values come.

The judgements are those of the rungs themselves; only when they are made differs. Of activations nothing but the stage at
hand is in memory, and the few seams of the first layers that the contract rung looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from harness.ladder import judge
from harness.rungs.heat import token_errors
from harness.subject import Subject
from harness.subject.sweeps import load_of, together
from harness.trace import Trace, decoder_seams, layer_of, vision_seams
from harness.verdict import Verdict

WAYS = ("local", "accumulated")


@dataclass
class Judged:
    """found: verdicts by case, or what kept a case from being judged."""

    found: dict[str, list[Verdict] | Exception] = field(default_factory=dict)

    def verdicts(self, case: str) -> list[Verdict]:
        """Of one case. Raises what kept it from being judged."""
        found = self.found[case]
        if isinstance(found, Exception):
            raise found
        return found

    def add(self, case: str, judge: Callable[[], Sequence[Verdict]]) -> None:
        """Judge something of a case, unless it has failed before: then the others go on without it."""
        held = self.found.setdefault(case, [])
        if isinstance(held, Exception):
            return
        try:
            held.extend(judge())
        except Exception as error:  # noqa: BLE001  it is raised again where this case is asked for
            self.found[case] = error


@dataclass
class Swept:
    """verdicts by (rung, case) of both towers; traces by case: what the contract rung needs; heat by (case, seam)."""

    verdicts: dict[tuple[str, str], list[Verdict]] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    heat: dict[tuple[str, str], list[float | None]] = field(default_factory=dict)


def swept(subject: Subject) -> Swept:
    """Local and accumulated error of every case in one pass over the weights; computed once for a subject."""
    if "swept" not in subject.memory:
        subject.memory["swept"] = _Sweep(subject).run()
    return subject.memory["swept"]


class _Sweep:
    def __init__(self, subject: Subject) -> None:
        self.subject, self.found = subject, Swept()
        self.waiting: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.stream = [*vision_seams(subject.geometry), *decoder_seams(subject.geometry)]
        taps = len(subject.geometry.deepstack_taps)
        self.kept = {"decoder.positions", *(seam for seam in self.stream if seam.startswith("vision.deepstack") or (
            seam.startswith("decoder.layers.") and layer_of(seam) < taps))}

    def run(self) -> Swept:
        from harness.engines.torch_graph import in_turn

        subject = self.subject
        grids = dict.fromkeys(subject.grid(case) for case in subject.cases)
        loads, calls = [], []
        for case in subject.cases:
            recorded = subject.recorded(case)
            one = load_of(subject, recorded.inputs, len(recorded.rollout.tokens))
            loads.append(replace(one, held=len(WAYS) * one.held))
            # Both ways go together, whatever the memory: a seam is judged when both have answered.
            calls.append(partial(in_turn, subject.conversion(subject.grid(case)), [self._call(case, way) for way in WAYS]))
        together(subject, "local and accumulated error", [subject.conversion(grid) for grid in grids], loads, calls)
        return self.found

    def _call(self, case: str, way: str) -> Callable[[], None]:
        from harness.engines import Request

        subject = self.subject
        recorded, engine = subject.recorded(case), subject.graph(case)
        request = Request(recorded.inputs, forced=tuple(map(int, recorded.rollout.tokens)),
                          seams=frozenset((*self.stream, "decoder.positions")) & engine.seams())

        def sink(seam: str, values: np.ndarray) -> None:
            if way == "accumulated" and seam in self.kept:
                self.found.traces.setdefault(case, Trace()).arrays[seam] = values
            if seam in self.stream:
                self._judge(case, seam, way, values)

        def call() -> None:
            inject: Any = recorded.lazily() if way == "local" else None
            next(engine.run([request], inject=inject, inject_at=self.stream, sink=sink))

        return call

    def _judge(self, case: str, seam: str, way: str, values: np.ndarray) -> None:
        """Judge a seam as soon as both ways have answered, and let go of it."""
        subject, held = self.subject, self.waiting.setdefault((case, seam), {})
        held[way] = values
        if len(held) < len(WAYS):
            return
        del self.waiting[case, seam]
        reference = subject.recorded(case).load((seam,))
        rung = "vision" if seam.startswith("vision.") else "decoder"
        self.found.verdicts.setdefault((rung, case), []).extend(judge(
            rung, case, [seam], reference, {way: {seam: held[way]} for way in WAYS}, subject.bounds,
            regions=subject.regions(case)))
        if rung == "decoder" and seam in reference:
            self.found.heat[case, seam] = token_errors(reference[seam], held["accumulated"])
