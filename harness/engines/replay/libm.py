"""The C library's elementary functions, element by element, as Apple's Linux runtime calls them.

Torch and numpy have vector versions of their own, which differ from the C library in the last bit now and then. A result
is only bit-equal to the runtime's on the machine whose C library both used.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from harness.errors import Undecided


def apply(name: str, *operands: Tensor) -> Tensor:
    """The function `name` (`expf`: float32, `exp`: float64) on every element of operands of one shape."""
    function, dtype = _function(name, len(operands))
    columns = [operand.to(dtype).flatten().tolist() for operand in operands]
    return torch.tensor(list(map(function, *columns)), dtype=dtype).reshape(operands[0].shape)


def exp_below_zero(x: Tensor) -> Tensor:
    """exp in float64 for x <= 0, fast: numpy's complex exponential calls the C library's exp for its real part."""
    import numpy as np

    return torch.from_numpy(np.exp(x.to(torch.float64).numpy().astype(np.complex128)).real.copy())


@functools.cache
def _function(name: str, count: int) -> tuple[Callable[..., float], torch.dtype]:
    function = getattr(_library(), name)
    kind, dtype = (ctypes.c_float, torch.float32) if name.endswith("f") and name != "erf" else (
        ctypes.c_double, torch.float64)
    function.restype, function.argtypes = kind, [kind] * count
    return function, dtype


@functools.cache
def _library() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise Undecided("the arithmetic coreai-cpu is that of Apple's Linux runtime, whose C library is not here",
                        fix="choose fp32 or fp16, or run on Linux")
    return ctypes.CDLL("libm.so.6")
