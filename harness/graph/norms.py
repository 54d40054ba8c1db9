"""Normalisation and rotation shared by both towers; statistics and angles stay in float32 whatever the weights are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last axis (HF `Qwen3VLTextRMSNorm`, T5's layer norm)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype; the mean is taken in float32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., D] by half-split pairs (lane j with lane j + D/2); cos and sin broadcast to x, float32.

    Source: HF `apply_rotary_pos_emb` and `rotate_half`. The products are taken in float32 and rounded once.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos_first, cos_second = cos.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    turned = torch.cat([first * cos_first - second * sin_first, second * cos_second + first * sin_second], dim=-1)
    return turned.to(x.dtype)


def inverse_frequencies(theta: float, lanes: int) -> Tensor:
    """theta^(-j / lanes) for j = 0 .. lanes - 1, float32 [lanes], in HF's own order of operations, so bit by bit.

    On the CPU always: towers are built on the meta device, their tables are not part of a checkpoint.
    """
    return 1.0 / (theta ** (torch.arange(0, 2 * lanes, 2, dtype=torch.float32, device="cpu") / (2 * lanes)))


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters only and return the module.

    `module.half()` would also cast the frequency and position tables, whose error no short prompt shows.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module
