"""Synthetic checkpoints at full geometry: random weights of realistic scale, as the hub writes them, from a seed.

They make every figure about size and speed measurable by anyone without a download. What a random model says means
nothing; what it costs, and whether two computations of it agree, is as with real weights.
"""

from __future__ import annotations

from harness.synth.sizes import SIZES
from harness.synth.writer import Plan, plan, synthesize

__all__ = ["SIZES", "Plan", "plan", "synthesize"]
