"""Constants where they are computed with: on a device, as stored, a matrix dequantized in parts or once and for all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harness.engines.replay.arithmetic import Arithmetic
from harness.engines.replay.program import Constant

PART = 1 << 26
"""Elements of a matrix that are dequantized at a time: 256 MiB in float32."""


def tensor(constant: Constant, device: str = "cpu") -> Tensor:
    """A constant's values; on a CPU they stay where the file is mapped. Raises HarnessError for an unknown dtype."""
    array = constant.array
    if array.dtype in (np.uint16, np.uint32, np.uint64):  # torch computes in none of them; see `arithmetic.HELD`
        array = array.astype({2: np.int32, 4: np.int64, 8: np.int64}[array.dtype.itemsize])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the array is read-only: nothing here writes to it
        return torch.from_numpy(array if array.flags.c_contiguous else np.ascontiguousarray(array)).to(device)


@dataclass(frozen=True)
class Weight:
    """A matrix [out, in] that products take: stored as it is, or as codes with scales and offsets (None: zeros).

    casts: types it is cast to after dequantization. whole: the matrix as computed with, once `hold` made it.
    """

    data: Tensor
    scale: Tensor | None = None
    offset1: Tensor | None = None
    offset2: Tensor | None = None
    casts: tuple[str, ...] = ()
    whole: Tensor | None = None

    def parts(self, arithmetic: Arithmetic) -> Iterator[Tensor]:
        """Rows as computed with, in blocks of about PART elements."""
        if self.whole is not None:
            yield self.whole
            return
        count, width = self.data.shape
        block = 1 if self.scale is None else count // self.scale.shape[0]
        step = max(PART // max(width, 1) // block, 1) * block
        for start in range(0, count, step):
            yield self._rows(arithmetic, start, min(start + step, count), block)

    def hold(self, arithmetic: Arithmetic) -> Weight:
        """The same with the whole matrix in memory of its own, and its codes let go."""
        arithmetic.scratch = None
        parts = list(self.parts(arithmetic))
        whole = arithmetic.keep(parts[0] if len(parts) == 1 else torch.cat(parts))
        return replace(self, data=self.data[:0], scale=None, offset1=None, offset2=None, whole=whole)

    def _rows(self, arithmetic: Arithmetic, start: int, stop: int, block: int) -> Tensor:
        if self.scale is None:
            found = arithmetic.widen(self.data[start:stop])
        else:
            scale, offset1, offset2 = (part if part is None else part[start // block:-(-stop // block)]
                                       for part in (self.scale, self.offset1, self.offset2))
            found = arithmetic.dequantize(self.data[start:stop], scale, offset1, offset2)
        for dtype in self.casts:
            found = arithmetic.cast(found, dtype)
        return found


def linear(arithmetic: Arithmetic, x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] -> [..., out]: the product with a weight, part by part."""
    if weight.whole is None and arithmetic.scratch is None and not x.is_cuda:
        arithmetic.scratch = torch.empty(PART)
    parts = [arithmetic.linear(x, rows) for rows in weight.parts(arithmetic)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
