"""`coreai-cpu`: bit for bit what Apple's runtime (coreai-core 1.0.0b3) computes on a Linux CPU.

No document says how; every rule below was found by running single operations, and `tests/test_coreai_cpu.py` holds each
of them against the runtime. They cost speed: matrix products are sums in order, exponentials come from the C library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from harness.engines.replay import libm
from harness.engines.replay.arithmetic import Arithmetic, Operand
from harness.errors import HarnessError

PRODUCTS = 1 << 22
"""Products that a matrix product holds at once, elements."""


class CoreAICpu(Arithmetic):
    """fp16 and fp32 as stored; integers wrap. An fp16 operation rounds its result once unless its method says more."""

    name = "coreai-cpu"

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """As the dialect says; what does not fit an integer type becomes its nearest value, NaN becomes 0.

        The dialect leaves those cases open.
        """
        held = self.held(dtype)
        if not dtype.startswith(("si", "ui")):
            return x.to(held)
        bits, low = int(dtype[2:]), 0
        if dtype[0] == "s":
            bits, low = bits - 1, -1 << (bits - 1)
        wide = torch.nan_to_num(x.to(torch.float64), nan=0.0) if x.is_floating_point() else x.to(torch.int64)
        return wide.clamp(low, (1 << bits) - 1).to(held)

    # Products and sums: in order, each step rounded to the type of the sum.

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """For k in order: the product rounded to x's type, the sum rounded to x's type; no fused multiply-add."""
        columns, rows = x.movedim(-1, 0).unsqueeze(-1), y.movedim(-2, 0).unsqueeze(-2)
        rank = max(columns.ndim, rows.ndim)
        columns, rows = _leading(columns, rank), _leading(rows, rank)
        shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]) + (x.shape[-2], y.shape[-1])
        total = torch.zeros(shape, dtype=x.dtype)
        step = max(1, PRODUCTS // max(1, math.prod(shape)))
        for start in range(0, len(columns), step):
            products = columns[start:start + step] * rows[start:start + step]
            for product in products.unbind(0):
                total += product
        return total

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        """x [..., K], w [O, K]: the matrix product with w transposed."""
        return self.matmul(x.reshape(-1, x.shape[-1]), w.t()).reshape(*x.shape[:-1], w.shape[0])

    def reduce_sum(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """In float32 for fp16 and fp32, in row-major order over all reduced axes."""
        if not x.is_floating_point():
            return super().reduce_sum(x, axes)
        return self._sum(x, axes).to(x.dtype)

    def reduce_mean(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """The float32 sum over the count, rounded once."""
        count = math.prod(x.shape[axis] for axis in axes)
        return (self._sum(x, axes) / count).to(x.dtype)

    def reduce_product(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """In float32, in order; rounded once."""
        if not x.is_floating_point():
            return super().reduce_product(x, axes)
        last, back = _last(x.float(), axes)
        return back(_in_order(np.multiply, last)).to(x.dtype)

    def reduce_max(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """The first of the largest: 0.0 and -0.0 are equal. NaN goes before everything."""
        return _picked(x, axes, np.argmax)

    def reduce_min(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """The first of the smallest, as above."""
        return _picked(x, axes, np.argmin)

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        """fp16: exponentials and their sum in float32; fp32: in float64. Rounded once, after the division."""
        moved = x.movedim(axis, -1)
        if x.dtype == torch.float32:
            wide = moved.double()
            grown = libm.exp_below_zero(wide - wide.amax(-1, keepdim=True))
        else:
            wide = moved.float()
            grown = libm.apply("expf", wide - wide.amax(-1, keepdim=True))
        return (grown / _in_order(np.add, grown)).to(x.dtype).movedim(-1, axis)

    def _sum(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        last, back = _last(x.float(), axes)
        return back(_in_order(np.add, last) + 0.0)  # sums begin at 0.0, so that a sum of -0.0 is 0.0

    def dequantize(self, codes: Tensor, scale: Tensor, offset1: Tensor | None, offset2: Tensor | None) -> Tensor:
        """Every step in scale's type. Blocks along the last axis only: scale codes + (offset2 - scale offset1); others:
        scale (codes - offset1) + offset2.
        """
        blocks = [part for axis, count in enumerate(scale.shape) for part in (count, codes.shape[axis] // count)]
        spread = [part for count in scale.shape for part in (count, 1)]
        wide, scales = codes.to(scale.dtype).reshape(blocks), scale.reshape(spread)
        before = torch.zeros(()) if offset1 is None else offset1.reshape(spread)
        after = torch.zeros(()) if offset2 is None else offset2.reshape(spread)
        before, after = before.to(scale.dtype), after.to(scale.dtype)
        if codes.shape[:-1] == scale.shape[:-1]:
            made = (wide * scales).add_(after - scales * before)
        else:
            made = (wide - before).mul_(scales).add_(after)
        return made.reshape(codes.shape)

    # Element by element.

    def pow(self, x: Operand, y: Operand) -> Tensor:
        """The C library's powf, also for squares."""
        x, y = torch.broadcast_tensors(_tensor(x, y), _tensor(y, x))
        return libm.apply("powf", x, y).to(x.dtype) if x.is_floating_point() else torch.pow(x, y)

    def floor_div(self, x: Operand, y: Operand) -> Tensor:
        """floor of the float32 quotient, in short rows of the quotient in x's type. Infinity over anything but 0 is NaN,
        where the dialect's docstring says infinity.
        """
        x, y = _tensor(x, y), _tensor(y, x)
        if not x.is_floating_point():
            return super().floor_div(x, y)
        quotient = x.float() / y.float()
        if _in_short_rows(x, y):
            quotient = quotient.to(x.dtype)
        floored = torch.floor(quotient).to(x.dtype)
        return torch.where(x.isinf() & (y != 0), torch.nan, floored)

    def mod(self, x: Operand, y: Operand) -> Tensor:
        """The C library's fmod, where torch's says NaN for a finite number and an infinite one."""
        x, y = _tensor(x, y), _tensor(y, x)
        if not x.is_floating_point():
            return super().mod(x, y)
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(np.fmod(x.numpy(), y.numpy())))

    def maximum(self, x: Operand, y: Operand) -> Tensor:
        """The first where both are equal (0.0 and -0.0 are), in short rows the second. NaN propagates."""
        x, y = _tensor(x, y), _tensor(y, x)
        return torch.where((x > y if _in_short_rows(x, y) else x >= y) | (x != x), x, y)

    def minimum(self, x: Operand, y: Operand) -> Tensor:
        """The first where both are equal. NaN propagates."""
        x, y = _tensor(x, y), _tensor(y, x)
        return torch.where((x <= y) | (x != x), x, y)

    def silu(self, x: Tensor) -> Tensor:
        """x / (1 + expf(-x)) in float32."""
        return _mapped("silu", x, lambda wide: wide / (1 + libm.apply("expf", -wide)))

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + expf(-x)) in float32."""
        return _mapped("sigmoid", x, lambda wide: 1 / (1 + libm.apply("expf", -wide)))

    def relu(self, x: Tensor) -> Tensor:
        """-0.0 stays."""
        return torch.where(x < 0, torch.zeros_like(x), x)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """Every step, constants too, in x's type; erfc, tanh and exp in float64, rounded to x's type.

        none: (x/2) erfc(-x sqrt(1/2)). tanh: (x/2) (1 + tanh(b (x + 0.044715 x x x))), b = sqrt(2) (2 / sqrt(pi)) / 2 as
        a product in x's type. sigmoid: x (1 / (1 + exp(-1.702 x))).
        """
        if x.dtype == torch.float16:
            return _table(f"gelu {approximate}", functools.partial(_gelu, approximate=approximate))[_codes(x)]
        return _gelu(x, approximate)

    def unary(self, name: str, x: Tensor) -> Tensor:
        """In float32, by the C library's function of that name; rsqrt is 1 / sqrt."""
        if name in ("sqrt", "rsqrt"):
            # Torch's square root is not always the nearest number; numpy's is the processor's own.
            with np.errstate(invalid="ignore"):
                root = torch.from_numpy(np.sqrt(x.float().numpy()))
            return (1 / root if name == "rsqrt" else root).to(x.dtype)
        if name in LIBRARY and x.is_floating_point():
            return _mapped(name, x, functools.partial(libm.apply, f"{name}f"))
        return super().unary(name, x)


LIBRARY = frozenset({"exp", "log", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh",
                     "atanh", "erf"})
"""Operations that are a function of the C library."""


def _gelu(x: Tensor, approximate: str) -> Tensor:
    def constant(value: float) -> Tensor:
        return torch.tensor(value, dtype=x.dtype)

    half = constant(0.5)
    if approximate == "sigmoid":
        grown = libm.apply("exp", -(constant(1.702) * x)).to(x.dtype)
        return x * (1 / (1 + grown))
    if approximate == "tanh":
        beta = constant(math.sqrt(2)) * constant(2 / math.sqrt(math.pi)) * half
        inner = beta * (x + constant(0.044715) * x * x * x)
        return half * x * (1 + libm.apply("tanh", inner).to(x.dtype))
    return half * x * libm.apply("erfc", -(x * constant(math.sqrt(0.5)))).to(x.dtype)


def _mapped(name: str, x: Tensor, formula: Callable[[Tensor], Tensor]) -> Tensor:
    """A function in float32, rounded to x's type; fp16 has so few values that they are computed once."""
    if x.dtype == torch.float16:
        return _table(name, lambda every: formula(every.float()).to(torch.float16))[_codes(x)]
    return formula(x)


_TABLES: dict[str, Tensor] = {}


def _table(name: str, formula: Callable[[Tensor], Tensor]) -> Tensor:
    if name not in _TABLES:
        _TABLES[name] = formula(torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16))
    return _TABLES[name]


def _codes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16).long() & 0xFFFF


def _tensor(x: Operand, like: Operand) -> Tensor:
    """A number in the other operand's type."""
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype if isinstance(like, Tensor) else None)


def _in_short_rows(x: Tensor, y: Tensor) -> bool:
    """Operands of different shapes, fewer than 8 elements in a row of the result: the runtime goes another way there."""
    return x.shape != y.shape and torch.broadcast_shapes(x.shape, y.shape)[-1:] < (8,)


def _leading(x: Tensor, rank: int) -> Tensor:
    """x [K, ...] with axes of size 1 after the first, up to `rank`."""
    return x.reshape(x.shape[0], *[1] * (rank - x.ndim), *x.shape[1:])


def _last(x: Tensor, axes: Sequence[int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The reduced axes, in order, as one last axis; and what puts a result back with size 1 in their places."""
    gone = sorted(axis % x.ndim for axis in axes)
    kept = [axis for axis in range(x.ndim) if axis not in gone]
    shape = [1 if axis in gone else size for axis, size in enumerate(x.shape)]
    moved = x.permute(kept + gone).reshape([x.shape[axis] for axis in kept] + [math.prod(x.shape[axis] for axis in gone)])
    return moved, lambda reduced: reduced.reshape(shape)


def _in_order(how: np.ufunc, x: Tensor) -> Tensor:
    """The last axis folded from its first element on, one rounding a step; it stays, with size 1."""
    if not x.shape[-1]:
        raise HarnessError("nothing is reduced over an axis of size 0; the runtime answers with whatever is in memory")
    with np.errstate(all="ignore"):
        return torch.from_numpy(how.accumulate(x.numpy(), axis=-1)[..., -1:].copy())


def _picked(x: Tensor, axes: Sequence[int], which: Callable[..., np.ndarray]) -> Tensor:
    last, back = _last(x, axes)
    places = torch.from_numpy(np.asarray(which(last.numpy(), axis=-1)))
    return back(last.gather(-1, places.unsqueeze(-1)))
