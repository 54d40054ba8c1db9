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
from harness.trace import decoder_seams, vision_seams

DECODER_OPS = ("input_norm", "attn.q_norm", "attn.k_norm", "attn.q_rope", "attn.k_rope", "attn.context", "post_norm",
               "mlp.act")
VISION_OPS = ("norm1", "attn.q_rope", "attn.k_rope", "attn.context", "norm2", "mlp.act")
MERGER_OPS = ("norm", "act")
CALLS = ("calls.chunked", "calls.repeated", "calls.slots")


@dataclass(frozen=True)
class Reading:
    """error: in units of what rounding may cost, inf where not finite; None where the conversion lacks `lacking`."""

    seam: str
    error: float | None
    words: str
    lacking: str = ""


def planned(depths) -> tuple[str, ...]:
    """Seams that are probed: the operations of every layer and merger, then the behaviour from call to call."""
    inside = (*vision_seams(depths, inside=True), *decoder_seams(depths, inside=True))
    ops = {"vision.layers": VISION_OPS, "decoder.layers": DECODER_OPS, "vision.merger": MERGER_OPS,
           "vision.deepstack": MERGER_OPS}
    return (*(seam for seam in inside if seam == "decoder.norm" or any(
        seam.startswith(family) and seam.endswith(tuple("." + op for op in names))
        for family, names in ops.items())), *CALLS)


def probe(conversion: Conversion, checkpoint: Checkpoint, grid: tuple[int, int]) -> Iterator[Reading]:
    """One Reading for every planned seam, in order."""
    from harness.probes import calls, decoder, vision

    found = {reading.seam: reading for part in (vision, decoder, calls)
             for reading in part.readings(conversion, checkpoint, grid)}
    for seam in planned(checkpoint.geometry):
        yield found[seam]
