"""Decoder: every layer, every DeepStack addition, the final norm and the logits of the fp32 graph are the oracle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.rungs import towers
from harness.rungs.sketched import lacking_seams
from harness.subject import Subject
from harness.trace import decoder_seams
from harness.verdict import Verdict

NAME = "decoder"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """All stream seams of the decoder, for every case."""
    return {case: (*decoder_seams(subject.geometry), *lacking_seams(subject)) for case in subject.cases}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """Local and accumulated error side by side, image and text tokens apart."""
    return towers.judge_tower(NAME, subject, case, decoder_seams(subject.geometry))
