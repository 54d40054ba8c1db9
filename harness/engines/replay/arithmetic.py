"""How each operation is computed: an arithmetic is part of an engine's name.

Generated code calls these methods for every operation that rounds; what only moves numbers is plain torch. `Fp32` computes
everything in float32 with widened constants: what the program means. `Fp16` stores what the program says and accumulates
in float32: what a GPU does. Element types are spelled as the program does (`f16`, `si8`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.engines.replay.runtime import one_thread
from harness.errors import HarnessError

HELD = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64, "i1": torch.bool,
        "si8": torch.int8, "si16": torch.int16, "si32": torch.int32, "si64": torch.int64, "ui8": torch.uint8,
        # torch has no arithmetic in these; every value they hold fits the next wider type
        "ui16": torch.int32, "ui32": torch.int64}
"""What a value of the program's type is held as."""
IN_CACHE = 1 << 18
"""Elements that are dequantized at a time on a CPU: a megabyte in float32."""
Operand = Tensor | float | int


class Arithmetic:
    """Torch's own arithmetic in the types that the program says. Integers wrap; divisions are as the dialect says.

    Source of every formula: the docstring of the operation in Core AI's dialect (`coreai.dialects`, `_coreai_ops_gen`).
    """

    name = "torch"
    scratch: Tensor | None = None
    """Memory that `dequantize` may fill, float32, one dimension; whoever sets it uses a result before asking for the next."""

    def held(self, dtype: str) -> torch.dtype:
        """The torch type that holds a value of the program's type. Raises HarnessError for one that torch lacks."""
        if dtype not in HELD:
            raise HarnessError(f"values of type {dtype} are not supported by the arithmetic {self.name}")
        return HELD[dtype]

    def widen(self, x: Tensor) -> Tensor:
        """A constant as stored -> as computed with."""
        return x

    def keep(self, w: Tensor) -> Tensor:
        """A matrix that `linear` will take again and again, in the form that is quickest to compute with."""
        return w

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """Truncates towards zero from float to integer; rounds to nearest even between floats."""
        return x.to(self.held(dtype))

    # Products and sums.

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., M, K], y [..., K, N] -> [..., M, N]; leading axes broadcast."""
        return torch.matmul(x, y)

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        """x [..., K], w [O, K] -> [..., O]."""
        return F.linear(x, w)

    def reduce_mean(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Reduced axes stay, with size 1; so in all reductions."""
        return x.mean(tuple(axes), keepdim=True)

    def reduce_sum(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Integers wrap."""
        return x.sum(tuple(axes), keepdim=True, dtype=x.dtype)

    def reduce_product(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """One axis after the other."""
        for axis in axes:
            x = x.prod(axis, keepdim=True, dtype=x.dtype)
        return x

    def reduce_max(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """NaN propagates."""
        return x.amax(tuple(axes), keepdim=True)

    def reduce_min(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """NaN propagates."""
        return x.amin(tuple(axes), keepdim=True)

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        """exp(x - max) / sum of it along one axis."""
        return x.softmax(axis)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x * rsqrt(mean(x^2) + eps) * weight over the last axis, rounded once; see `fusing`."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def dequantize(self, codes: Tensor, scale: Tensor, offset1: Tensor | None, offset2: Tensor | None) -> Tensor:
        """scale * (codes - offset1) + offset2 in the type of scale; each scale serves a block of codes.

        All have one rank; block = codes.shape / scale.shape along each axis. None stands for an offset of zeros.
        """
        blocks = [part for axis, count in enumerate(scale.shape) for part in (count, codes.shape[axis] // count)]
        spread = [part for count in scale.shape for part in (count, 1)]
        # In float32 the product of a code (8 bits) and an fp16 scale (11 bits) is exact, so rounding it once is the fp16
        # product; torch's own fp16 multiplication does the same on every device.
        wide = codes.reshape(blocks).to(torch.float32)
        if offset1 is not None:
            wide = wide - offset1.reshape(spread).to(torch.float32)
        wide = wide.mul_(scale.reshape(spread).to(torch.float32)).to(scale.dtype)
        if offset2 is not None:
            wide = wide + offset2.reshape(spread)
        return wide.reshape(codes.shape)

    # Element by element; two operands broadcast, and one of them may be a number.

    def add(self, x: Operand, y: Operand) -> Tensor:
        """Booleans: or."""
        return torch.add(x, y)

    def sub(self, x: Operand, y: Operand) -> Tensor:
        """x - y."""
        return torch.sub(x, y) if isinstance(x, Tensor) else torch.rsub(y, x)

    def mul(self, x: Operand, y: Operand) -> Tensor:
        """Booleans: and."""
        return torch.mul(x, y)

    def div(self, x: Operand, y: Operand) -> Tensor:
        """Integers: towards zero."""
        floating = any(isinstance(part, float) or isinstance(part, Tensor) and part.is_floating_point() for part in (x, y))
        return torch.div(_tensor(x, y), y, rounding_mode=None if floating else "trunc")

    def floor_div(self, x: Operand, y: Operand) -> Tensor:
        """floor(x / y)."""
        return torch.div(_tensor(x, y), y, rounding_mode="floor")

    def mod(self, x: Operand, y: Operand) -> Tensor:
        """x - trunc(x / y) * y: the sign is x's."""
        return torch.fmod(_tensor(x, y), y)

    def pow(self, x: Operand, y: Operand) -> Tensor:
        """x ** y."""
        return torch.pow(x, y)

    def maximum(self, x: Operand, y: Operand) -> Tensor:
        """NaN propagates."""
        return torch.maximum(_tensor(x, y), _tensor(y, x))

    def minimum(self, x: Operand, y: Operand) -> Tensor:
        """NaN propagates."""
        return torch.minimum(_tensor(x, y), _tensor(y, x))

    def silu(self, x: Tensor) -> Tensor:
        """x * sigmoid(x)."""
        return F.silu(x)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """approximate: none (erf), tanh, or sigmoid: x * sigmoid(1.702 x)."""
        if approximate == "sigmoid":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate=approximate)

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + exp(-x))."""
        return torch.sigmoid(x)

    def relu(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return torch.relu(x)

    def unary(self, name: str, x: Tensor) -> Tensor:
        """exp, log, sqrt, rsqrt, sin, cos and whatever else torch calls by the dialect's own name."""
        return getattr(torch, name)(x)


def _tensor(x: Operand, like: Operand) -> Tensor:
    """A number as a tensor of the other operand's type, on its device."""
    if isinstance(x, Tensor):
        return x
    return torch.full((), x, dtype=like.dtype, device=like.device) if isinstance(like, Tensor) else torch.tensor(x)


class Fp32(Arithmetic):
    """Everything in float32, constants widened. Codes are dequantized as stored first: those are the weights that ship."""

    name = "fp32"
    _WIDE = frozenset({torch.float16, torch.bfloat16})

    def held(self, dtype: str) -> torch.dtype:
        """float32 for every narrower float."""
        found = super().held(dtype)
        return torch.float32 if found in self._WIDE else found

    def widen(self, x: Tensor) -> Tensor:
        """Narrow floats to float32."""
        return x.float() if x.dtype in self._WIDE else x

    def dequantize(self, codes: Tensor, scale: Tensor, offset1: Tensor | None, offset2: Tensor | None) -> Tensor:
        """Rounded to the type of scale, as shipped, then widened; on a CPU into `scratch`, where there is some."""
        if codes.is_cuda or codes.ndim != 2 or len(scale) != len(codes):
            return super().dequantize(codes, scale, offset1, offset2).float()
        fits = self.scratch is not None and self.scratch.numel() >= codes.numel()
        made = self.scratch[:codes.numel()].view(codes.shape) if fits else torch.empty(codes.shape)
        with one_thread():
            return _dequantized_rows(made, codes, scale, offset1, offset2)


def _dequantized_rows(made: Tensor, codes: Tensor, scale: Tensor, offset1: Tensor | None,
                      offset2: Tensor | None) -> Tensor:
    """The same in parts that fit a processor's cache, through two buffers: fresh memory costs more than the arithmetic."""
    rows = min(max(IN_CACHE // max(codes.shape[1], 1), 1), len(codes))
    wide, narrow = (torch.empty((rows, codes.shape[1]), dtype=dtype) for dtype in (torch.float32, scale.dtype))
    for start in range(0, len(codes), rows):
        part = slice(start, min(start + rows, len(codes)))
        count = part.stop - start
        blocks = wide[:count].copy_(codes[part]).unflatten(1, (scale.shape[1], -1))
        if offset1 is not None:
            blocks.sub_(offset1[part].float()[..., None])
        blocks.mul_(scale[part].float()[..., None])
        rounded = narrow[:count].copy_(wide[:count])
        if offset2 is not None:
            rounded.unflatten(1, (scale.shape[1], -1)).add_(offset2[part][..., None])
        made[part] = rounded
    return made


class Fp16(Arithmetic):
    """The program's own types, products and sums accumulated in float32 and rounded once: what a GPU does.

    On CUDA, torch's half-precision kernels do that where `exact_accumulation` has been called.
    """

    name = "fp16"

    @staticmethod
    def exact_accumulation() -> None:
        """For this process: no fp16 partial sums, no TF32."""
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """As above, rounded once."""
        if x.dtype != torch.float16 or x.is_cuda:
            return torch.matmul(x, y)
        return torch.matmul(x.float(), y.float()).to(x.dtype)

    def keep(self, w: Tensor) -> Tensor:
        """On a CPU, which has no such products, widened once."""
        return w.float() if w.dtype == torch.float16 and not w.is_cuda else w

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        """As above, rounded once; w may come widened."""
        if x.dtype != torch.float16 or x.is_cuda:
            return F.linear(x, w)
        return F.linear(x.float(), w.float()).to(x.dtype)
