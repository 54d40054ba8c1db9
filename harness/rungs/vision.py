"""Vision: every block, merger and DeepStack output of the fp32 graph is the oracle's, fed the oracle's input and its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.rungs import towers
from harness.rungs.sketched import lacking_seams
from harness.subject import Subject
from harness.trace import vision_seams
from harness.verdict import Verdict

NAME = "vision"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """All stream seams of the tower, for each case with an image."""
    return {case: (*vision_seams(subject.geometry), *lacking_seams(subject)) for case in subject.image_cases()}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """Local and accumulated error side by side."""
    return towers.judge_tower(NAME, subject, case, vision_seams(subject.geometry))
