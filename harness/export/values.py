"""The numbers of an export, made from the mapped checkpoint one tensor at a time, in blocks of rows."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.export.quantizer import quantize_rows
from harness.graph.quantize import Recipe, Scheme, to_fp16
from harness.graph.reference import EMBEDDING, HEAD, PATCH, POSITIONS, VISION, expect_names, same_head
from harness.graph.vision import interpolate_positions

BAKED = VISION + "positions"
"""The vision tower's own table of positions, resampled to its grid."""
BLOCK = 1 << 21
"""Elements made at a time: 4 MiB of fp16, and about six times that while coreai-opt looks at them: they fit a cache."""


class CheckpointValues:
    """Satisfies `harness.export.hollow.Values` from a checkpoint, rounded to fp16 as an export does.

    Raises HarnessError, at once, where names, shapes or a stored tied head are not the config's; later, where a tensor
    holds what fp16 does not.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, grid: tuple[int, int]) -> None:
        self.checkpoint, self.geometry, self.grid = checkpoint, checkpoint.geometry, grid
        names = set(checkpoint.names())
        self._from = {HEAD: EMBEDDING} if self.geometry.tied and HEAD not in names else {}
        expect_names(names | set(self._from), recipe.geometry(self.geometry))
        if self.geometry.tied and HEAD in names:
            same_head(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING))
        self._last: tuple[str, dict[str, Tensor]] = "", {}

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """See the protocol; the patch kernel is asked for flattened, the resampled position table may have any rows."""
        held = tuple(self._tensor(POSITIONS if name == BAKED else name).shape)
        fits = {PATCH: (held[0], math.prod(held[1:])), BAKED: (shape[0], *held[1:])}.get(name, held)
        if fits != shape:
            raise HarnessError(f"has shape {held}, the config asks for {shape}", where=name)

    def plain(self, name: str, like: Tensor) -> Tensor:
        """See the protocol; the position table comes resampled to the grid, the patch kernel flattened."""
        if name == BAKED:
            table = to_fp16(POSITIONS, self.checkpoint.tensor(POSITIONS))
            return interpolate_positions(table, *self.grid, self.geometry.merge).to(torch.float16).to(like.dtype)
        value, start = torch.empty(like.shape, dtype=like.dtype), 0
        held = self._tensor(name)
        for block in map(partial(to_fp16, name), held.split(_rows(held))):
            value[start:start + len(block)] = block.reshape(len(block), *like.shape[1:])
            start += len(block)
        return value

    def codes(self, name: str, scheme: Scheme, part: str, like: Tensor) -> Tensor:
        """See the protocol; both parts of a tensor are made together, and the last tensor's are kept."""
        if self._last[0] != name:
            self._last = "", {}
            held = self._tensor(name)
            try:
                self._last = name, quantize_rows(held.split(_rows(held)), len(held), scheme, partial(to_fp16, name))
            except HarnessError as error:
                raise error if error.path else error.at(name) from error
        made = self._last[1].pop(part)
        if not self._last[1]:
            self._last = "", {}
        return made

    def _tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(self._from.get(name, name))


def _rows(held: Tensor) -> int:
    """Rows in a block."""
    return max(1, BLOCK * len(held) // max(held.numel(), 1))
