"""From call to call: chunks against one call, the same request again after another, and what a call may not touch.

Logits of an image prompt are compared in float32 as the graph computes them: other chunks sum in another order, which
costs up to 1e-4 of the largest logit; the same call again costs nothing but what threads reorder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.checkpoint import Checkpoint, Geometry
from harness.probes import Reading
from harness.probes.bench import Feed, cache_for, decode, image_rows, reading

CHUNKS = (17, 64)
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
    yield max((reading("calls.chunked", part, whole, ORDER * scale, f"logits in chunks of {chunk}, in one call")
               for chunk, part in zip(CHUNKS, parts)), key=lambda one: one.error)
    _fed(conversion, geometry, text, 7, (1 << 30, 0), seed=None)
    _fed(conversion, geometry, np.concatenate([text[:9], ids[5:-20]]), len(ids), (shift[0] + 4, shift[1]), seed=22)
    again, state = _fed(conversion, geometry, ids, len(ids), shift, seed=21)
    yield reading("calls.repeated", again, whole, AGAIN * scale, "logits again, after a text and another image")
    rest = np.concatenate([part[:, :, :, len(ids):].ravel() for part in state])
    untouched = np.concatenate([part.numpy()[:, :, :, len(ids):].ravel() for part in cache_for(geometry, len(ids) + 3, 4)])
    yield reading("calls.slots", rest, untouched, 1e-30, "cache slots behind the last token, which no call may write")


def _fed(conversion: Any, geometry: Geometry, ids: np.ndarray, chunk: int, shift: tuple[int, int],
         seed: int | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of all tokens, fed in chunks into a cache of garbage with three slots too many; the cache afterwards."""
    cache, rows = cache_for(geometry, len(ids) + 3, 4), []
    image = image_rows(conversion, geometry, seed)
    for start in range(0, len(ids), chunk):
        part = ids[start:start + chunk]
        rows.append(decode(conversion, part, start + len(part), image, shift, cache, Feed()))
    return np.concatenate(rows), [part.numpy() for part in cache]
