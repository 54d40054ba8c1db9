"""What the torch rungs measure of a graph that reads its weights for each call: for all cases at once, as the values come.

The judgements are those of the rungs themselves; only when they are made differs. Of activations nothing but the stage at
hand is in memory, and the few seams of the first layers that the contract rung looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from harness.ladder import judge
from harness.subject import Subject
from harness.sums import sums
from harness.trace import Trace, decoder_seams, layer_of, vision_seams
from harness.verdict import Verdict

WAYS = ("local", "accumulated")
T = TypeVar("T")


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


def for_all(subject: Subject, call: Callable[[str], T]) -> dict[str, T]:
    """call(case) for every case, each weight read once a pass for all of them."""
    from harness.graph.streamed import together

    cases = list(subject.cases)
    grids = dict.fromkeys(subject.grid(case) for case in cases)
    results = together([subject.conversion(grid) for grid in grids], [lambda case=case: call(case) for case in cases])
    return dict(zip(cases, results))


def token_errors(reference: np.ndarray, got: np.ndarray) -> list[float | None]:
    """log10 of each token's relative error, two digits; None where it is not finite."""
    found = sums(*(array.reshape(len(array), -1) for array in (reference, got)))
    error = np.sqrt(found.row_dd) / np.maximum(np.sqrt(found.row_rr), 1e-30)
    return [round(float(value), 2) if np.isfinite(value) else None for value in np.log10(np.maximum(error, 1e-12))]


class _Sweep:
    def __init__(self, subject: Subject) -> None:
        self.subject, self.found = subject, Swept()
        self.waiting: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.stream = [*vision_seams(subject.geometry), *decoder_seams(subject.geometry)]
        taps = len(subject.geometry.deepstack_taps)
        self.kept = {"decoder.positions", *(seam for seam in self.stream if seam.startswith("vision.deepstack") or (
            seam.startswith("decoder.layers.") and layer_of(seam) < taps))}

    def run(self) -> Swept:
        from harness.graph.streamed import together

        subject = self.subject
        grids = dict.fromkeys(subject.grid(case) for case in subject.cases)
        calls = [self._call(case, way) for case in subject.cases for way in WAYS]
        together([subject.conversion(grid) for grid in grids], calls, lambda stage: self._judge())
        self._judge()
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
                self.waiting.setdefault((case, seam), {})[way] = values

        def call() -> None:
            inject: Any = recorded.lazily() if way == "local" else None
            next(engine.run([request], inject=inject, inject_at=self.stream, sink=sink))

        return call

    def _judge(self) -> None:
        """Judge each seam that both ways have answered, and let go of it."""
        subject = self.subject
        for case, seam in [key for key, values in self.waiting.items() if len(values) == len(WAYS)]:
            values = self.waiting.pop((case, seam))
            reference = subject.recorded(case).load((seam,))
            rung = "vision" if seam.startswith("vision.") else "decoder"
            self.found.verdicts.setdefault((rung, case), []).extend(judge(
                rung, case, [seam], reference, {way: {seam: values[way]} for way in WAYS}, subject.bounds,
                regions=subject.regions(case)))
            if rung == "decoder" and seam in reference:
                self.found.heat[case, seam] = token_errors(reference[seam], values["accumulated"])
