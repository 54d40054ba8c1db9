"""What a torch conversion must offer to be judged: `--graph module:factory`.

`factory(checkpoint: pathlib.Path, grid: tuple[int, int]) -> Conversion` loads the checkpoint directory in float32 for one
image grid (height, width in patches, both even). Nothing here imports this project at run time on the porter's side: the
protocol is structural, and a porter's class satisfies it by having these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from torch import Tensor

from harness.errors import HarnessError
from harness.trace import Depths, decoder_seams, vision_seams

Tap = Callable[[str, Tensor], Tensor]
"""`x = tap("decoder.layers.03", x)`: offers the value at a seam, tokens on axis 0, and goes on with what comes back.

What comes back is the same value, or, where a local error is measured, the oracle's value at that seam; an
implementation that ignores it can be judged by accumulated error only (and then offers no `injectable = True`).
"""


class Conversion(Protocol):
    """A converted Qwen3-VL in torch. Seam names and shapes: `harness.trace`; ids and positions: `harness.graph.contract`."""

    injectable: bool
    """True where `encode` and `decode` go on with the value that `tap` returns."""

    slots: int
    """Image rows N that `decode` expects; a text-only run hands it zeros."""

    def seams(self) -> Collection[str]:
        """Names of the seams offered to `tap`; those lacking are reported as not answered, as the policy says."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Every weight under its checkpoint name and shape, as the graph holds it (fused weights split back)."""
        ...

    def encode(self, patches: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """patches [P, F] -> image embeds [N, h], DeepStack embeds [3N, h] (tap k in rows k*N .. (k+1)*N)."""
        ...

    def decode(self, input_ids: Tensor, position_ids: Tensor, image_embeds: Tensor, deepstack_embeds: Tensor,
               rope_shift_start: Tensor, rope_shift_amount: Tensor, cache: tuple[Tensor, Tensor], tap: Tap) -> Tensor:
        """One call of the decoder on S tokens at offset T - S; fills `cache` in place.

        input_ids [1, S] int32 with extension ids; position_ids [1, T] int32, the ramp 0..T-1; shifts [1] int32; cache
        keys and values [L, 1, kv_heads, context, head_dim]. Returns logits [1, S, V].
        """
        ...


def accepted(conversion: Any, depths: Depths) -> Conversion:
    """The conversion, where it offers what the protocol asks. Raises HarnessError naming what it lacks or misspells."""
    place = type(conversion).__name__
    lacking = [name for name in ("injectable", "slots", "seams", "tensors", "encode", "decode")
               if not hasattr(conversion, name)]
    if lacking:
        raise HarnessError(f"lacks {lacking[0]!r}", where=place, fix="see harness/graph/protocol.py")
    known = {*vision_seams(depths, inside=True), "decoder.positions", *decoder_seams(depths, inside=True)}
    strange = sorted(set(conversion.seams()) - known)
    if strange:
        raise HarnessError(f"offers a seam {strange[0]!r} that nothing is compared at", where=place,
                           fix="seam names: harness/trace.py; layers have two digits")
    return conversion


def untapped(name: str, value: Tensor) -> Tensor:
    """The tap of an ordinary run."""
    return value
