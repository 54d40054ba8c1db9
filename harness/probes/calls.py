"""From call to call: chunks and single tokens against one call, the same request after another, what a call may not touch.

Logits of an image prompt are compared in float32 as the graph computes them: other chunks sum in another order, which
costs up to 1e-4 of the largest logit; the same call again costs nothing but what threads reorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from harness.checkpoint import Checkpoint, Geometry
from harness.engines.torch_graph import in_turn
from harness.graph.contract import NO_SHIFT
from harness.graph.protocol import untapped
from harness.probes import Call, Reading
from harness.probes.bench import Worst, cache_for, decode, image_rows, reading, wide
from harness.trace import decoder_seams

CHUNKS = (17, 64)
SINGLE = 4
"""Tokens at the end that come one a call."""
ORDER, AGAIN = 1e-4, 1e-6
SPARE = 3
"""Slots behind the last token."""


class Behaviour:
    """The three readings; they need no seam."""

    def __init__(self, conversion: Any, checkpoint: Checkpoint, grid: tuple[int, int]) -> None:
        geometry, self.found = checkpoint.geometry, Worst()
        self.conversion, self.geometry = conversion, geometry
        self.shift = 5 + conversion.slots, conversion.slots - max(grid) // geometry.merge
        generator = np.random.default_rng(9)
        text = generator.integers(0, min(geometry.vocab, geometry.image_token), 25)
        self.ids = np.concatenate([text[:5], geometry.vocab + np.arange(conversion.slots), text[5:]])
        self.whole, self.broken = np.zeros((0, 0)), 0
        start, amount = self.shift
        self.last = self._talk(self.ids, len(self.ids), self.shift, 21, self._repeated)
        self.calls = [call for talk in (
            self._talk(self.ids, len(self.ids), self.shift, 21, self._first),
            *(self._talk(self.ids, chunk, self.shift, 21, partial(self._chunked, chunk)) for chunk in CHUNKS),
            self._talk(text, 7, (NO_SHIFT, 0), None), self._talk(
                np.concatenate([text[:9], self.ids[5:-20]]), len(self.ids), (start + 4, amount), 22),
            self.last) for call in talk.calls]

    def readings(self) -> Iterator[Reading]:
        """After the calls."""
        chunked = self.found["calls.chunked"]
        yield chunked if chunked.error <= 1 else replace(chunked, place=self._place(self.broken))
        yield self.found["calls.repeated"]
        count = len(self.ids)
        rest = np.concatenate([part[:, :, :, count:].numpy().ravel() for part in self.last.cache])
        untouched = np.concatenate([part[:, :, :, count:].numpy().ravel() for part in _garbage(self.geometry, count)])
        yield reading("calls.slots", rest, untouched, 1e-30, "cache slots behind the last token, which no call may write")

    def _talk(self, ids: np.ndarray, chunk: int, shift: tuple[int, int], seed: int | None,
              look: Callable[[int, np.ndarray], None] = lambda start, rows: None, tap: Any = untapped) -> _Talk:
        return _Talk(self.conversion, self.geometry, ids, chunk, shift, seed, look, tap)

    def _first(self, start: int, rows: np.ndarray) -> None:
        self.whole, self.scale = rows, float(np.abs(rows).max())

    def _chunked(self, chunk: int, start: int, rows: np.ndarray) -> None:
        held = self.found.get("calls.chunked")
        self.found.add(reading("calls.chunked", rows, self.whole[start:start + len(rows)], ORDER * self.scale,
                               f"logits in chunks of {chunk}, in one call", start))
        self.broken = self.broken if self.found["calls.chunked"] is held else chunk

    def _repeated(self, start: int, rows: np.ndarray) -> None:
        self.found.add(reading("calls.repeated", rows, self.whole, AGAIN * self.scale,
                               "logits again, after a text and another image"))

    def _place(self, chunk: int) -> str:
        """The first block, in the order of computation, whose values differ from those of one call."""
        seams = decoder_seams(self.geometry)
        kept = _Kept(seams), _Kept(seams)
        for tap, size in zip(kept, (len(self.ids), chunk)):
            in_turn(self.conversion, [call.run for call in self._talk(self.ids, size, self.shift, 21, tap=tap).calls])
        whole, parts = ({name: np.concatenate(rows) for name, rows in tap.parts.items()} for tap in kept)
        for seam in seams:
            if seam in whole and seam in parts and \
                    np.abs(parts[seam] - whole[seam]).max() > ORDER * np.abs(whole[seam]).max():
                return seam
        return ""


def _garbage(geometry: Geometry, count: int) -> tuple[Any, Any]:
    return cache_for(geometry, count + SPARE, 4)


class _Talk:
    """Tokens fed in chunks into a cache of garbage with three slots too many; look(start, rows) is told each call's
    logits."""

    def __init__(self, conversion: Any, geometry: Geometry, ids: np.ndarray, chunk: int, shift: tuple[int, int],
                 seed: int | None, look: Callable[[int, np.ndarray], None], tap: Any) -> None:
        self.conversion, self.geometry, self.ids, self.shift, self.seed = conversion, geometry, ids, shift, seed
        self.look, self.tap = look, tap
        slots = len(ids) + SPARE
        self.calls = [Call(partial(self._call, start, stop), stop - start, 0 if start else slots, geometry.layers)
                      for start, stop in _cuts(len(ids), chunk)]

    @cached_property
    def cache(self) -> tuple[Any, Any]:
        """As it stands."""
        return _garbage(self.geometry, len(self.ids))

    def _call(self, start: int, stop: int) -> None:
        image = image_rows(self.conversion, self.geometry, self.seed)
        self.look(start, decode(self.conversion, self.ids[start:stop], stop, image, self.shift, self.cache, self.tap))


def _cuts(count: int, chunk: int) -> Iterator[tuple[int, int]]:
    """First and last token of each call: one call, or chunks and at last single tokens."""
    if chunk >= count:
        return iter([(0, count)])
    return pairwise([*range(0, count - SINGLE, chunk), *range(count - SINGLE, count + 1)])


class _Kept:
    """A tap that keeps every call's values of the stream."""

    def __init__(self, seams: tuple[str, ...]) -> None:
        self.seams, self.parts = frozenset(seams), {}

    def __call__(self, name: str, value: Any) -> Any:
        if name in self.seams:
            self.parts.setdefault(name, []).append(wide(value))
        return value
