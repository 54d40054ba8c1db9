"""The constants of an asset's program, and how each is used: what the weights rung compares with the checkpoint.

The structure is read by Apple's bindings in a child process (`harness.engines.program_worker`); the bytes of big
constants are mapped from `main.mlirb` here, so that an 8 GB program costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.bundle import PROGRAM, check_asset
from harness.engines.child import running
from harness.engines.mlirb import read_resources
from harness.errors import HarnessError, within

DTYPES = {"f16": "float16", "f32": "float32", "f64": "float64", "si8": "int8", "ui8": "uint8", "si16": "int16",
          "ui16": "uint16", "si32": "int32", "ui32": "uint32", "si64": "int64", "ui64": "uint64", "i1": "bool"}
QUANTIZED = "blockwise_shift_scale"


@dataclass(frozen=True)
class Use:
    """One operation that computes with a constant.

    op: its name without dialect (`broadcasting_batch_matmul`, `gather_nd`, `broadcasting_mul`); operand: which of its
    operands; at: its number in program order, callees counted where they are called; through: operations between that
    only change shape, dtype or quantization, in order; writes: key-cache writes before it in program order (the layer
    number for what stands before a layer's own write, as q, k, v do, and one more after it); composite: name of the
    composite operation that it stands in (`rms_norm`), or None.
    """

    op: str
    operand: int
    at: int
    through: tuple[str, ...]
    writes: int
    composite: str | None


@dataclass(frozen=True)
class Constant:
    """dtype as the program spells it (`f16`, `si8`); uses in program order. Scales and offsets of codes have none."""

    index: int
    dtype: str
    shape: tuple[int, ...]
    resource: str | None
    uses: tuple[Use, ...]
    _held: Any = field(repr=False, compare=False, default=None)

    @property
    def array(self) -> np.ndarray:
        """The values, read-only; a view into the file where they are big. Raises HarnessError for another dtype."""
        if self._held is None:
            raise HarnessError(f"constants of type {self.dtype} cannot be read", where=self.resource)
        return np.broadcast_to(self._held, self.shape)

    @property
    def fills(self) -> bool:
        """True for one value, repeated, that `where` operations only pick from."""
        single = self._held is not None and self._held.size == 1
        return single and {use.op for use in self.uses} == {"broadcasting_where"}


@dataclass(frozen=True)
class Weight:
    """A floating-point table that the program computes with, stored as it is or as int8 codes with block scales.

    A matmul that has "transpose" in `through` holds its weight as [out, in].
    """

    data: Constant
    scale: Constant | None
    offset: Constant | None
    bias: Constant | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the table."""
        return self.data.shape

    @property
    def uses(self) -> tuple[Use, ...]:
        """Of the table, after dequantization."""
        return self.data.uses

    @property
    def stored(self) -> str:
        """How it is stored: `f16`, `si8 x f16/32` (codes, scales, block length)."""
        if self.scale is None:
            return self.data.dtype
        blocks = [size // count for size, count in zip(self.data.shape, self.scale.shape) if size != count]
        return f"{self.data.dtype} x {self.scale.dtype}/{'x'.join(map(str, blocks)) or 'tensor'}"

    def rows(self, start: int = 0, stop: int | None = None, columns: int | None = None) -> np.ndarray:
        """Rows start .. stop of axis 0, and the first `columns` of the last axis, as the program computes them:
        scale * (codes - offset) + bias in scale's dtype.

        Source: docstring of `blockwise_shift_scale` in Core AI's dialect. Each scale serves a block of
        data.shape / scale.shape elements.
        """
        stop = self.shape[0] if stop is None else stop
        codes = self.data.array[start:stop, ..., :columns] if len(self.shape) > 1 else self.data.array[start:stop]
        if self.scale is None:
            return codes
        held = self.scale.array.dtype
        wide = codes.astype(held) - self._spread(self.offset, start, stop, columns).astype(held)
        return self._spread(self.scale, start, stop, columns) * wide + self._spread(self.bias, start, stop, columns)

    def digits(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Codes and scales of rows start .. stop as they are stored; None for a table that is no matrix of int8 codes
        with scales along its rows, or has offsets."""
        if self.scale is None or len(self.shape) != 2 or self.scale.shape[0] != self.shape[0] or self._shifted:
            return None
        return self.data.array[start:stop], self.scale.array[start:stop]

    @cached_property
    def _shifted(self) -> bool:
        return any(bool(part.array.any()) for part in (self.offset, self.bias))

    def _spread(self, part: Constant, start: int, stop: int, columns: int | None) -> np.ndarray:
        array = part.array
        first = self.shape[0] // part.shape[0]
        array = np.repeat(array[start // first:-(-stop // first)], first, axis=0)[start % first:][:stop - start]
        for axis in range(1, array.ndim):
            block = self.shape[axis] // part.shape[axis]
            if axis == array.ndim - 1 and columns is not None:
                array = array[..., :-(-columns // block)]
            array = np.repeat(array, block, axis=axis)
        return array[..., :columns] if array.ndim > 1 else array


@dataclass(frozen=True)
class Program:
    """constants: in order of first use. attributes: scalars and settings that change arithmetic, in program order.

    Each attribute is {"op", "at", "writes", "composite", "name", "value"}: name `eps` (added before rsqrt), `fill`
    (into a `where`), `scale` (of a multiplication), `approximate` (of gelu: tanh or none), else `operand N`; tables of one
    repeated value count as scalars too. operations: how often each operation occurs, callees counted where called.
    """

    constants: tuple[Constant, ...]
    attributes: tuple[Mapping[str, Any], ...]
    operations: Mapping[str, int]
    _codes: Mapping[int, tuple[int, int, int]] = field(repr=False)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every floating-point or quantized table that is used, in order of first use.

        Left out are scalars, and one value repeated that only fills a `where`; both stand among the attributes.
        """
        found = []
        for constant in self.constants:
            held = self._codes.get(constant.index)
            floating = constant.dtype.startswith(("f", "bf"))
            if constant.uses and (held or floating and not constant.fills and math.prod(constant.shape) > 1):
                found.append(Weight(constant, *([self.constants[index] for index in held] if held else [None] * 3)))
        return tuple(found)


def read_constants(asset: Path, timeout_s: float = 300.0, tmp: Path | None = None) -> Program:
    """Read an `.aimodel`. Raises HarnessError for damaged bytes, and Undecided where the reader is missing or dies."""
    asset = Path(asset).resolve()
    check_asset(asset)
    blobs = read_resources(asset / PROGRAM)
    with within(asset.name):
        with running("harness.engines.program_worker", {"asset": str(asset)}, {}, timeout_s, tmp) as child:
            answer = child.result("program", "Apple's bindings read the program")
        mapped = np.memmap(asset / PROGRAM, dtype=np.uint8, mode="r")
        constants = tuple(_constant(row, answer.arrays, blobs, mapped) for row in answer.facts["constants"])
    codes = {int(data): tuple(row) for data, row in answer.facts["codes"].items()}
    return Program(constants, tuple(answer.facts["attributes"]), answer.facts["operations"], codes)


def _constant(row: Mapping[str, Any], arrays: Mapping[str, np.ndarray], blobs: Mapping[str, Any],
              mapped: np.ndarray) -> Constant:
    uses = tuple(Use(**{**use, "through": tuple(use["through"])}) for use in row["uses"])
    shape, resource = tuple(row["shape"]), row["resource"]
    dtype, held = DTYPES.get(row["dtype"]), arrays.get(f"c{row['index']}")
    if resource is not None and dtype is not None:
        if resource not in blobs:
            raise HarnessError("the program names this resource, the file does not hold it", where=resource)
        blob, needed = blobs[resource], math.prod(shape) * np.dtype(dtype).itemsize
        if blob.size != needed:
            raise HarnessError(f"holds {blob.size} bytes, {row['dtype']}{list(shape)} needs {needed}", where=resource)
        held = mapped[blob.offset:blob.offset + blob.size].view(dtype).reshape(shape)
    return Constant(row["index"], row["dtype"], shape, resource, uses, held)
