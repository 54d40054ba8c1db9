"""From call to call: chunks and single tokens against one call, the same request after another, what a call may not touch.

Logits of an image prompt are compared in float32 as the graph computes them: other chunks sum in another order, which
costs up to 1e-4 of the largest logit; the same call again costs nothing but what threads reorder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from harness.checkpoint import Checkpoint, Geometry
from harness.probes import Reading
from harness.probes.bench import Feed, cache_for, decode, image_rows, reading
from harness.trace import decoder_seams

CHUNKS = (17, 64)
SINGLE = 4
"""Tokens at the end that come one a call."""
ORDER, AGAIN = 1e-4, 1e-6


def readings(conversion: Any, checkpoint: Checkpoint, grid: tuple[int, int]) -> Iterator[Reading]:
    """The three readings; they need no seam."""
    geometry = checkpoint.geometry
    shift = 5 + conversion.slots, conversion.slots - max(grid) // geometry.merge
    generator = np.random.default_rng(9)
    text = generator.integers(0, min(geometry.vocab, geometry.image_token), 25)
    ids = np.concatenate([text[:5], geometry.vocab + np.arange(conversion.slots), text[5:]])
    whole, _ = _fed(conversion, geometry, ids, len(ids), shift, seed=21)
    parts = [_fed(conversion, geometry, ids, chunk, shift, seed=21)[0] for chunk in CHUNKS]
    scale = np.abs(whole).max()
    worst, chunk = max(((reading("calls.chunked", part, whole, ORDER * scale, f"logits in chunks of {chunk}, in one call"),
                         chunk) for chunk, part in zip(CHUNKS, parts)), key=lambda one: one[0].error)
    yield worst if worst.error <= 1 else replace(worst, place=_first(conversion, geometry, ids, chunk, shift))
    _fed(conversion, geometry, text, 7, (1 << 30, 0), seed=None)
    _fed(conversion, geometry, np.concatenate([text[:9], ids[5:-20]]), len(ids), (shift[0] + 4, shift[1]), seed=22)
    again, state = _fed(conversion, geometry, ids, len(ids), shift, seed=21)
    yield reading("calls.repeated", again, whole, AGAIN * scale, "logits again, after a text and another image")
    rest = np.concatenate([part[:, :, :, len(ids):].ravel() for part in state])
    untouched = np.concatenate([part.numpy()[:, :, :, len(ids):].ravel() for part in cache_for(geometry, len(ids) + 3, 4)])
    yield reading("calls.slots", rest, untouched, 1e-30, "cache slots behind the last token, which no call may write")


def _fed(conversion: Any, geometry: Geometry, ids: np.ndarray, chunk: int, shift: tuple[int, int],
         seed: int | None, feed: Feed | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of all tokens, fed in chunks into a cache of garbage with three slots too many; the cache afterwards."""
    cache, rows = cache_for(geometry, len(ids) + 3, 4), []
    image = image_rows(conversion, geometry, seed)
    for start, stop in _cuts(len(ids), chunk):
        rows.append(decode(conversion, ids[start:stop], stop, image, shift, cache, feed or Feed()))
    return np.concatenate(rows), [part.numpy() for part in cache]


def _cuts(count: int, chunk: int) -> Iterator[tuple[int, int]]:
    """First and last token of each call: one call, or chunks and at last single tokens."""
    if chunk >= count:
        return iter([(0, count)])
    return pairwise([*range(0, count - SINGLE, chunk), *range(count - SINGLE, count + 1)])


class _Kept(Feed):
    """A tap that keeps every call's values of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        self.parts.setdefault(name, []).append(self.seen[name])
        return value


def _first(conversion: Any, geometry: Geometry, ids: np.ndarray, chunk: int, shift: tuple[int, int]) -> str:
    """The first block, in the order of computation, whose values differ from those of one call."""
    kept = _Kept(), _Kept()
    for feed, size in zip(kept, (len(ids), chunk)):
        _fed(conversion, geometry, ids, size, shift, 21, feed)
    whole, parts = ({name: np.concatenate(rows) for name, rows in feed.parts.items()} for feed in kept)
    for seam in decoder_seams(geometry):
        if seam in whole and seam in parts and np.abs(parts[seam] - whole[seam]).max() > ORDER * np.abs(whole[seam]).max():
            return seam
    return ""
