"""Probes: each operation of a conversion on inputs that no prompt has, through its public protocol alone.

Activations of real prompts do not show an eps, a flavour of GELU, a slow rotary lane or a mask that fails in the second
chunk. A probe puts its own values in at one seam and reads the next: what stands between them is one operation, and the
formula of that operation is known. `value` of a verdict is the largest error in units of what rounding in float32 may
cost there, so the bound is 1; a probe's docstring says how that cost is reckoned.

All calls of all probes are known beforehand, so a conversion that streams takes them through its weights together; what
comes is read layer by layer, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    place: str = ""
    """The seam that an error of behaviour shows at first, where it can be told."""


@dataclass(frozen=True)
class Call:
    """One call of a conversion, made by `run()`, with its sizes: tokens, slots of the cache it holds in each of so many
    layers, patches."""

    run: Callable[[], None]
    tokens: int
    slots: int = 0
    layers: int = 0
    patches: int = 0


class Part(Protocol):
    """What some probes have in common: calls to be made in order, and, when they are made, what they showed."""

    calls: Sequence[Call]

    def readings(self) -> Iterator[Reading]:
        """After the calls."""
        ...


def probe(conversion: Conversion, checkpoint: Checkpoint, grid: tuple[int, int],
          make: Callable[[Sequence[Call]], object] | None = None) -> Iterator[Reading]:
    """One Reading for every planned seam, in order. make: makes the calls, in their order (default: one by one)."""
    from harness.probes import calls, decoder, vision

    parts: list[Part] = [part(conversion, checkpoint, grid) for part in (vision.Tower, decoder.Layers, calls.Behaviour)]
    wanted = [call for part in parts for call in part.calls]
    if make is not None:
        make(wanted)
    else:
        for call in wanted:
            call.run()
    found = {reading.seam: reading for part in parts for reading in part.readings()}
    for seam in planned(checkpoint.geometry):
        yield found[seam]
