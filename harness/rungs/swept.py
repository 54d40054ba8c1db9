"""Local and accumulated error of all cases in one pass over the weights, judged seam by seam as the values come.

The judgement is that of `harness.rungs.towers`; only when it is made differs. Nothing but the stage at hand is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.ladder import judge
from harness.subject import Subject
from harness.trace import decoder_seams, vision_seams
from harness.verdict import Verdict

if TYPE_CHECKING:
    from harness.trace import Trace

WAYS = ("local", "accumulated")


def swept(subject: Subject) -> dict[tuple[str, str], list[Verdict]]:
    """Verdicts by (rung, case) at every stream seam of both towers; computed once for a subject."""
    if "swept" not in subject.memory:
        subject.memory["swept"] = _Sweep(subject).run()
    return subject.memory["swept"]


class _Sweep:
    def __init__(self, subject: Subject) -> None:
        self.subject, self.found = subject, {}
        self.waiting: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.stream = [*vision_seams(subject.geometry), *decoder_seams(subject.geometry)]

    def run(self) -> dict[tuple[str, str], list[Verdict]]:
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
                          seams=frozenset(self.stream) & engine.seams())

        def sink(seam: str, values: np.ndarray) -> None:
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
            reference: Trace = subject.recorded(case).load((seam,))
            rung = "vision" if seam.startswith("vision.") else "decoder"
            self.found.setdefault((rung, case), []).extend(judge(
                rung, case, [seam], reference, {way: {seam: values[way]} for way in WAYS}, subject.bounds,
                regions=subject.regions(case)))
