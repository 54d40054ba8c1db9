"""The twin: our graph with the weights of a bundle of some recipe, whole in memory or, of a large checkpoint, streamed.

Streamed, each weight goes through the quantizer's formula on its way in, a few rows at a time: a scale belongs to a block
of one row, so pieces give the same bits as the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.graph.quantize import Recipe, Scheme, dequantize, expected_codes, planned_names, to_fp16, twin_weights
from harness.graph.reference import Reference, large
from harness.graph.streamed import StreamedReference
from harness.streaming.reading import PIECE, WeightReader


def twin(checkpoint: Checkpoint, recipe: Recipe, grid: tuple[int, int]) -> Reference:
    """What a bundle of this recipe should compute, in float32; a checkpoint that is large is not held in memory.

    Raises HarnessError naming a tensor that fits no fp16 or block.
    """
    geometry = recipe.geometry(checkpoint.geometry)
    if large(checkpoint):
        return StreamedReference(checkpoint, grid, TwinReader(checkpoint, recipe), geometry, torch.float16)
    return Reference(geometry, grid, twin_weights(checkpoint, recipe))


class TwinReader(WeightReader):
    """Reads a checkpoint as a bundle of a recipe computes with it: rounded to fp16, or quantized and back, as float32.

    A head that the recipe takes from a tied checkpoint's embedding is a tensor of its own here.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        super().__init__(checkpoint)
        self._plan = {name: (source, scheme) for name, source, scheme in planned_names(checkpoint, recipe)}
        held = self.shapes()
        for name, (_, scheme) in self._plan.items():
            if scheme and held[name][1] % scheme.block:
                raise HarnessError(f"{held[name][1]} input features are no multiple of the block {scheme.block}", where=name,
                                   fix="export this checkpoint as fp16")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that a bundle is made of."""
        held = super().shapes()
        return {name: held[source] for name, (source, _) in self._plan.items()}

    def fill(self, name: str, target: Tensor, first: int = 0) -> None:
        """As of `WeightReader`, with what the bundle computes with; quantized where it has come, in the cache still."""
        source, scheme = self._planned(name)
        super().fill(source, target, first)
        rows = target.view(len(target), -1) if scheme else target.view(-1)
        for piece in rows.split(max(1, PIECE // rows[0].numel())):
            piece.copy_(_held(name, piece, scheme))

    def _planned(self, name: str) -> tuple[str, Scheme | None]:
        if name not in self._plan:
            raise HarnessError("the bundle has no such tensor", where=name)
        return self._plan[name]


def _held(name: str, weight: Tensor, scheme: Scheme | None) -> Tensor:
    """What a bundle computes with instead of a weight, fp16."""
    rounded = to_fp16(name, weight)
    return dequantize(*expected_codes(rounded, scheme)) if scheme else rounded
