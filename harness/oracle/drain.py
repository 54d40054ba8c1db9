"""Activations on their way to the store: written by a thread of its own while the model goes on.

From a GPU they travel on a stream of their own into pinned memory, so the model's stream never waits for a copy. What counts
is the host's time, which the model's launches want: parts wait until there are enough of them, are put together on the GPU
by one kernel and leave in one copy; and many copies go to the thread at once, for each time that it wakes, the interpreter
is away from the model. Pinned memory is used again once nobody holds an array in it, for pinning takes milliseconds. A model
that is spread over GPUs has a stream for copies on each, for a copy runs on the GPU that it comes from.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.oracle.hooks import to_numpy
from harness.store import CaseWriter

PENDING = 4
"""Hand-overs that may wait for the disk; then the model waits."""
SLAB, SLABS = 1 << 25, 16
"""Bytes that leave a GPU together; and how many times that goes to the thread at once, while as much is being written."""
AGE = 0.25
"""Seconds after which parts go to the thread although they are few: weights may come slowly, and the run may be killed."""


class _Slab:
    """Pinned memory, `whole` as an array; what is cut from that holds it. pool: where it goes when the last such is gone."""

    def __init__(self, count: int, pool: list[Tensor]) -> None:
        fits = count <= SLAB // 4
        self.memory = pool.pop() if fits and pool else pinned(max(count, SLAB // 4))
        self.whole = self.memory.numpy()
        if fits:
            weakref.finalize(self.whole, pool.append, self.memory).atexit = False


class _Lot:
    """Parts that leave a GPU together: `add` them, `leave` on the model's thread, `write` on the one that writes."""

    def __init__(self) -> None:
        self.parts: list[tuple[CaseWriter, str, Mapping[str, Any], str]] = []
        self.count, self.begun = 0, 0.0
        self._copies: list[tuple[Tensor, torch.cuda.Event]] = []
        self._starts: dict[torch.device, int] = {}

    def add(self, part: tuple[CaseWriter, str, Mapping[str, Tensor], str], count: int) -> None:
        """count: values in the part."""
        self.begun = self.begun or time.monotonic()
        self.count += count
        self.parts.append(part)

    def leave(self, slab: _Slab, side: Callable[[torch.device], torch.cuda.Stream]) -> None:
        """Begin to copy, from each device on its side stream; the model may use the memory of the values again."""
        values = [value for _, _, held, _ in self.parts for value in held.values()]
        self._slab, start = slab, 0
        for place in dict.fromkeys(value.device for value in values):
            flat = torch.cat([value.reshape(-1) for value in values if value.device == place])
            self._starts[place], target = start, slab.memory[start:start + len(flat)]
            start += len(flat)
            if place.type == "cpu":
                target.copy_(flat)
                continue
            stream = side(place)
            with torch.cuda.stream(stream):
                target.copy_(flat, non_blocking=True)
            self._copies.append((flat, stream.record_event()))
        self.parts = [(out, name, {seam: (value.device, tuple(value.shape)) for seam, value in held.items()}, key)
                      for out, name, held, key in self.parts]

    def release(self) -> None:
        """Let go of memory on the GPU whose copy is done."""
        self._copies = [copy for copy in self._copies if not copy[1].query()]

    def write(self) -> None:
        """Give the parts to their writers when they are there."""
        for _, event in self._copies:
            event.synchronize()
        self._copies.clear()
        for out, name, held, key in self.parts:
            out.part(name, {seam: self._cut(*what) for seam, what in held.items()}, key)

    def _cut(self, place: torch.device, shape: tuple[int, ...]) -> np.ndarray:
        start = self._starts[place]
        self._starts[place] += math.prod(shape)
        return self._slab.whole[start:self._starts[place]].reshape(shape)


def pinned(count: int) -> Tensor:
    """Page-locked host memory, float32."""
    return torch.empty(count, dtype=torch.float32, pin_memory=True)


class Drain:
    """`put` parts, `flush` before they are read; a context manager. What the writer raises is raised by either."""

    def __init__(self, device: torch.device) -> None:
        self._sides: dict[torch.device, torch.cuda.Stream] | None = {} if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._sent, self._pending = deque[Future](), PENDING if self._sides is None else 1
        self._lot, self._left = _Lot(), list[_Lot]()
        self._pool: list[Tensor] = []

    def put(self, out: CaseWriter, name: str, values: Mapping[str, Tensor], key: str) -> None:
        """Write a part in the order given; the values must not change any more."""
        if self._sides is not None:
            self._collect(out, name, values, key)
            return
        self._wait()
        arrays = {seam: to_numpy(value) for seam, value in values.items()}
        self._sent.append(self._worker.submit(out.part, name, arrays, key))

    def flush(self) -> None:
        """Wait until all is on the disk."""
        self._hand_over()
        while self._sent:
            self._sent.popleft().result()

    def __enter__(self) -> Drain:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._hand_over()
        finally:
            self._worker.shutdown(wait=True)

    def _collect(self, out: CaseWriter, name: str, values: Mapping[str, Tensor], key: str) -> None:
        count = sum(value.numel() for value in values.values())
        if self._lot.count + count > SLAB // 4:
            self._leave()
        self._lot.add((out, name, values, key), count)
        if time.monotonic() - (self._left or [self._lot])[0].begun > AGE:
            self._hand_over()

    def _leave(self) -> None:
        """What has been collected leaves the GPU."""
        for lot in self._left:
            lot.release()
        lot, self._lot = self._lot, _Lot()
        if lot.parts:
            lot.leave(_Slab(lot.count, self._pool), self._side)
            self._left.append(lot)
        if len(self._left) >= SLABS:
            self._hand_over()

    def _side(self, place: torch.device) -> torch.cuda.Stream:
        """The stream for copies from a GPU, behind what it computes now."""
        if place not in self._sides:
            self._sides[place] = torch.cuda.Stream(place)
        self._sides[place].wait_stream(torch.cuda.current_stream(place))
        return self._sides[place]

    def _hand_over(self) -> None:
        """All that has been collected goes to the thread."""
        if self._lot.parts:
            self._leave()
        lots, self._left = self._left, []
        if lots:
            self._wait()
            self._sent.append(self._worker.submit(_write, lots))

    def _wait(self) -> None:
        """Until the thread is so far that it may be given one thing more."""
        while self._sent and (len(self._sent) >= self._pending or self._sent[0].done()):
            self._sent.popleft().result()


def _write(lots: list[_Lot]) -> None:
    lots.reverse()
    while lots:
        lots.pop().write()  # and its memory can be used again
