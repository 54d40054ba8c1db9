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
from harness.trace import Depths, decoder_seams, vision_seams

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
    place: str = ""
    """The seam that an error of behaviour shows at first, where it can be told."""


def planned(depths: Depths) -> tuple[str, ...]:
    """Seams that are probed: operations of every layer and merger, the cache of every layer, behaviour between calls."""
    ops = {"vision.layers": VISION_OPS, "decoder.layers": DECODER_OPS, "vision.merger": MERGER_OPS,
           "vision.deepstack": MERGER_OPS}
    found = []
    for seam in (*vision_seams(depths, inside=True), *decoder_seams(depths, inside=True)):
        family = next((names for prefix, names in ops.items() if seam.startswith(prefix)), ())
        if seam in ("vision.embed", "decoder.norm") or seam.endswith(tuple(f".{op}" for op in family)):
            found.append(seam)
        if seam.startswith("decoder.") and seam.endswith(".attn.context"):
            layer = seam.split(".")[2]
            found += [f"kv.keys.{layer}", f"kv.values.{layer}"]
    return (*found, *CALLS)


def probe(conversion: Conversion, checkpoint: Checkpoint, grid: tuple[int, int]) -> Iterator[Reading]:
    """One Reading for every planned seam, in order."""
    from harness.probes import calls, decoder, vision

    found = {reading.seam: reading for part in (vision, decoder, calls)
             for reading in part.readings(conversion, checkpoint, grid)}
    for seam in planned(checkpoint.geometry):
        yield found[seam]
