"""What probes share: rows that stress a norm, a tap that feeds and reads, and the largest error in units of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.checkpoint import Geometry
from harness.probes import Reading

ULP = 2.0**-23


class Worst(dict[str, Reading]):
    """The reading with the largest error at each seam; of equal ones the first."""

    def add(self, one: Reading) -> None:
        """Of another call."""
        if one.seam not in self or one.error > self[one.seam].error:
            self[one.seam] = one


def wide(value: Tensor) -> np.ndarray:
    """A tapped value in float64; integers as they are."""
    return value.detach().to("cpu").double().numpy() if value.is_floating_point() else value.numpy()


def narrow(given: np.ndarray, value: Tensor) -> Tensor:
    """What goes in at a seam instead of a value."""
    return torch.from_numpy(np.ascontiguousarray(given)).to(value.dtype).reshape(value.shape)


def rows(count: int, width: int, seed: int, group: int = 1) -> np.ndarray:
    """[count, width] float32, six kinds in turn: usual, tiny (1e-3), zero, large (500), one spike over tiny, one large spike.

    `group` rows in a row are of one kind, for a norm that takes so many together.
    """
    generator = np.random.default_rng(seed)
    made = generator.standard_normal((count, width))
    kind = np.arange(count) // group % 6
    made[kind == 1] *= 1e-3
    made[kind == 2] = 0.0
    made[kind == 3] *= 500 / 3
    for place in np.flatnonzero(kind >= 4):
        made[place] = 1e-4 * made[place] if kind[place] == 4 else 0.0
        made[place, place % width] = 1.0 if kind[place] == 4 else 500.0
    return made.astype(np.float32)


def reading(seam: str, got: np.ndarray, expected: np.ndarray, allowed: np.ndarray | float, words: str,
            first: int = 0) -> Reading:
    """The largest |got - expected| / allowed, with its place; first: number of the first row."""
    if got.shape != expected.shape:
        return Reading(seam, float("inf"), f"{words}: shape {got.shape} where {expected.shape} is right")
    error = np.abs(got - expected) / allowed
    error = np.where(np.isfinite(error), error, np.inf)
    at = tuple(int(part) for part in np.unravel_index(int(error.argmax()), error.shape))
    shown = [at[0] + first, *at[1:]] if at else []
    return Reading(seam, float(error[at]), f"{words}: {got[at]:.6g} where {expected[at]:.6g} is right, at {shown}"
                   if error[at] > 1 else f"{words}: {got.size} values")


def lacks(conversion: Any, seam: str, *needed: str) -> Reading | None:
    """A Reading that says what is not offered, or None."""
    offered = set(conversion.seams())
    missing = [name for name in (seam, *needed) if name not in offered]
    if missing:
        return Reading(seam, None, "", f"the graph under test does not offer {missing[0]}")
    if not conversion.injectable:
        return Reading(seam, None, "", "the graph under test does not take what a tap returns")
    return None


def of_row(expected: np.ndarray, share: float) -> np.ndarray:
    """`share` of the largest magnitude of each row, at least 1e-9: what sums over a row may lose."""
    return np.maximum(share * np.abs(expected).max(-1, keepdims=True), 1e-9)


def cache_for(geometry: Geometry, context: int, seed: int | None = None, shared: bool = False) -> tuple[Tensor, Tensor]:
    """A cache of zeros, or of random values that no call has written.

    shared: all layers write to one layer's memory, for a call that is read layer by layer.
    """
    whole = (geometry.layers, 1, geometry.kv_heads, context, geometry.head_dim)
    shape = (1, *whole[1:]) if shared else whole
    generator = torch.Generator().manual_seed(seed or 0)
    made = [torch.zeros(shape) if seed is None else torch.randn(shape, generator=generator) for _ in range(2)]
    return made[0].expand(whole), made[1].expand(whole)


def decode(conversion: Any, ids: np.ndarray, total: int, image: tuple[Tensor, Tensor], shift: tuple[int, int],
           cache: tuple[Tensor, Tensor], feed: Any) -> np.ndarray:
    """One call of the decoder on ids [S] at positions total - S .. total - 1; logits [S, V] float32."""
    start, amount = (torch.tensor([value], dtype=torch.int32) for value in shift)
    ramp = torch.arange(total, dtype=torch.int32)[None]
    with torch.no_grad():
        logits = conversion.decode(torch.from_numpy(ids.astype(np.int32))[None], ramp, *image, start, amount, cache, feed)
    return logits[0].float().numpy()


def image_rows(conversion: Any, geometry: Geometry, seed: int | None) -> tuple[Tensor, Tensor]:
    """Image and DeepStack embeds: random, or zero for a text."""
    shapes = (conversion.slots, geometry.hidden), (len(geometry.deepstack_taps) * conversion.slots, geometry.hidden)
    if seed is None:
        return tuple(torch.zeros(shape) for shape in shapes)
    generator = torch.Generator().manual_seed(seed)
    return tuple(0.3 * torch.randn(shape, generator=generator) for shape in shapes)
