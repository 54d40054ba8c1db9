"""Probes: each operation of a conversion on inputs that no prompt has, through its public protocol alone.

Activations of real prompts do not show an eps, a flavour of GELU, a slow rotary lane or a mask that fails in the second
chunk. A probe puts its own values in at one seam and reads the next: what stands between them is one operation, and the
formula of that operation is known. `value` of a verdict is the largest error in units of what rounding in float32 may
cost there, so the bound is 1; a probe's docstring says how that cost is reckoned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.checkpoint import Checkpoint
from harness.graph.protocol import Conversion
from harness.plan import CALLS, DECODER_OPS, MERGER_OPS, VISION_OPS
from harness.plan import probed as planned


@dataclass(frozen=True)
class Reading:
    """error: in units of what rounding may cost, inf where not finite; None where the conversion lacks `lacking`."""

    seam: str
    error: float | None
    words: str
    lacking: str = ""


def probe(conversion: Conversion, checkpoint: Checkpoint, grid: tuple[int, int]) -> Iterator[Reading]:
    """One Reading for every planned seam, in order."""
    from harness.probes import calls, decoder, vision

    found = {reading.seam: reading for part in (vision, decoder, calls)
             for reading in part.readings(conversion, checkpoint, grid)}
    for seam in planned(checkpoint.geometry):
        yield found[seam]
