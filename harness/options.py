"""What a user may choose for a run, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.bounds import BOUNDS
from harness.cases import CASES
from harness.policy import POLICY

OURS = "harness.graph.reference:factory"


@dataclass(frozen=True)
class Options:
    """What a user may choose; None means the default: the embedded checkpoint, our graph, an oracle and a bundle of our own.

    mode: fp16, int8lin or int8hu: of the bundle that we export (int8hu by default), or of a given one whose metadata does
    not say. grid: rows and columns of patches that the bundle is made for. work: where what is made goes.
    """

    checkpoint: str | None = None
    revision: str | None = None
    graph: str = OURS
    bundle: Path | None = None
    vision_bundle: Path | None = None
    oracle: Path | None = None
    mode: str | None = None
    device: str = "cpu"
    cases: Path = CASES
    bounds: Path = BOUNDS
    policy: Path = POLICY
    work: Path = Path("reports/latest")
    grid: tuple[int, int] = (28, 28)
    context: int = 512
    timeout_s: float = 900.0
