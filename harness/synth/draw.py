"""Random weights of realistic scale as bfloat16 bits, block by block: what a value is depends on seed, name and place.

Each block of a tensor has a generator of its own, seeded by (seed, tensor name, block number), so neither the order in
which tensors are made, nor the number of threads, nor a shortened model changes a value. Only raw bits of the generator
are used (numpy guarantees their stream; it does not guarantee that of its normal distribution).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist

import numpy as np

BLOCK = 1 << 22
"""Values made at a time: 8 MiB as bfloat16."""
MASSIVE = 4
"""Channels of the residual stream that grow far beyond the others, as in trained models."""
STRENGTH = 32.0
"""How much larger the rows are that write into a massive channel (a power of two: exact in bfloat16)."""


def rows_at_once(shape: tuple[int, ...]) -> int:
    """Rows (of axis 0) of a block; part of what a seed means."""
    return max(1, BLOCK // max(1, math.prod(shape[1:])))


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(block number, first row, end row) of a tensor's blocks."""
    step = rows_at_once(shape)
    for number, first in enumerate(range(0, shape[0], step)):
        yield number, first, min(first + step, shape[0])


def draw(name: str, shape: tuple[int, ...], seed: int, block: tuple[int, int, int]) -> np.ndarray:
    """Rows first..end of a tensor as bfloat16 bits (uint16), in the tensor's shape.

    Linear layers: std gain / sqrt(fan-in), the gain of those that write into the residual stream 0.15, so that it grows
    from 0.03 (embeddings) to about 1, as trained models do. Norm weights: 1 with a spread of 0.25, query and key norms
    1.5; biases 0.05. A few channels of the stream are massive: the third decoder layer's MLP writes 32 times as much
    into them, and norms damp them to an eighth.
    """
    number, first, end = block
    part = (end - first, *shape[1:])
    bits = _raw(name, seed, number, math.prod(part))
    if len(shape) == 1:
        values = _vector(name, _normal()[bits])
        if "language_model" in name and name.endswith(("layernorm.weight", "language_model.norm.weight")):
            values[massive_channels(shape[0], seed)] /= 8  # a vector is one block
        return to_bfloat16(values)
    drawn = _table(std_of(name, shape))[bits].reshape(part)
    if name.endswith("layers.2.mlp.down_proj.weight"):
        for channel in massive_channels(shape[0], seed):
            if first <= channel < end:
                drawn[channel - first] = to_bfloat16(from_bfloat16(drawn[channel - first]) * np.float32(STRENGTH))
    return drawn


def massive_channels(hidden: int, seed: int) -> list[int]:
    """The massive channels of a decoder of this width, increasing."""
    raw = np.random.SFC64(np.random.SeedSequence([seed, hidden])).random_raw(MASSIVE)
    return sorted({int(value) % hidden for value in raw})


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest, ties to even; finite values only."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _raw(name: str, seed: int, block: int, count: int) -> np.ndarray:
    words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype=np.uint32)
    generator = np.random.SFC64(np.random.SeedSequence([seed, *map(int, words), block]))
    return generator.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]


@lru_cache
def _normal() -> np.ndarray:
    """Quantiles of the standard normal distribution at (i + 1/2) / 65536: a uniform 16-bit number, looked up, is normal."""
    half = [NormalDist().inv_cdf((place + 0.5) / 65536) for place in range(32768)]
    return np.array([*half, *(-value for value in reversed(half))], dtype=np.float32)


@lru_cache(maxsize=64)
def _table(std: float) -> np.ndarray:
    return to_bfloat16(_normal() * np.float32(std))


def std_of(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix's values; see `draw`."""
    fan_in = math.prod(shape[1:])
    if "embed_tokens" in name or name == "lm_head.weight":
        return 0.03
    if "pos_embed" in name:
        return 0.1
    writes = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "linear_fc2.weight"))
    return (0.15 if writes else 1.0) / math.sqrt(fan_in)


def _vector(name: str, noise: np.ndarray) -> np.ndarray:
    if name.endswith("bias"):
        return np.float32(0.05) * noise
    middle = 1.5 if "q_norm" in name or "k_norm" in name else 1.0
    return np.maximum(np.float32(middle) * (1 + np.float32(0.25) * noise), np.float32(0.05))
