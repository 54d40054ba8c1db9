"""The operations of Qwen3-VL in float64, from their definitions: what probes hold a conversion against."""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """weight * x / sqrt(mean(x^2) + eps)."""
    wide = x.astype(np.float64)
    return weight * wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    wide = x.astype(np.float64)
    wide = wide - wide.mean(-1, keepdims=True)
    return wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps) * weight + bias


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    wide = x.astype(np.float64)
    return wide / (1 + np.exp(-wide))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    wide = x.astype(np.float64)
    return 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))


def gelu_exact(x: np.ndarray) -> np.ndarray:
    """0.5 x (1 + erf(x / sqrt(2)))."""
    wide = x.astype(np.float64)
    return 0.5 * wide * (1 + _erf(wide / math.sqrt(2)))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, visible: np.ndarray | None = None) -> np.ndarray:
    """q [S, H, D]; k, v [T, K, D] with H a multiple of K; visible [S, T] or all -> [S, H, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(part.astype(np.float64), groups, axis=1) for part in (k, v))
    scores = np.einsum("shd,thd->hst", q.astype(np.float64), k) * scale
    if visible is not None:
        scores = np.where(visible[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hst,thd->shd", weights / weights.sum(-1, keepdims=True), v)


def inverse_frequencies(theta: float, lanes: int) -> np.ndarray:
    """theta^(-j / lanes), rounded to float32 as the reference holds it."""
    return (theta ** -(np.arange(lanes) / lanes)).astype(np.float32).astype(np.float64)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [..., D], angles [..., D / 2]: lane j turns with lane j + D / 2."""
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def resampled(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A square table [side^2, C] resampled bilinearly, corners on corners -> [rows, columns, C]."""
    side = round(len(table) ** 0.5)
    image = table.reshape(side, side, -1)
    for axis, count in enumerate((rows, columns)):
        place = np.arange(count) * (side - 1) / max(count - 1, 1)
        low = np.minimum(place.astype(int), side - 2)
        part = (place - low).reshape([-1 if one == axis else 1 for one in range(3)])
        image = (1 - part) * image.take(low, axis) + part * image.take(low + 1, axis)
    return image
