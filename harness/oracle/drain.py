"""Activations on their way to the store: written by a thread of its own while the model goes on.

From a GPU they travel on a stream of their own into pinned memory, so the model's stream never waits for a copy; a model that
is spread over GPUs has one such stream on each, for a copy runs on a stream of the GPU that it comes from. Parts share
slabs of one size, which are used again once nobody holds an array in them, for pinning memory takes milliseconds; and a slab
is handed over as a whole: each time the thread wakes, the interpreter is away from the model's launches for up to 1 ms.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.oracle.hooks import to_numpy
from harness.store import CaseWriter

PENDING = 4
"""Hand-overs that may wait for the disk; then the model waits."""
SLAB, PENDING_SLABS = 1 << 27, 8
"""Bytes of pinned memory in a slab, and how many may wait: a GPU is far ahead of any disk, and its host has memory."""
AGE = 0.1
"""Seconds after which a slab goes to the disk although it is not full: weights may come slowly, and the run may be killed."""


class _Slab:
    """Pinned memory and the parts that are copied into it; `values` are held until the copies are done.

    pool: where the memory goes when the last array in it is gone.
    """

    def __init__(self, count: int, pool: list[Tensor]) -> None:
        fits = count <= SLAB // 4
        self.memory = pool.pop() if fits and pool else pinned(max(count, SLAB // 4))
        self.whole = self.memory.numpy()  # the base of every array that is given out
        if fits:
            weakref.finalize(self.whole, pool.append, self.memory).atexit = False
        self.used, self.parts, self.values, self.copied, self.begun = 0, [], [], [], time.monotonic()

    def take(self, value: Tensor) -> np.ndarray:
        """A view of the memory that `value` is being copied to, on the current stream."""
        part = slice(self.used, self.used + value.numel())
        self.used = part.stop
        self.memory[part].view(value.shape).copy_(value, non_blocking=True)
        return self.whole[part].reshape(value.shape)


def pinned(count: int) -> Tensor:
    """Page-locked host memory, float32."""
    return torch.empty(count, dtype=torch.float32, pin_memory=True)


class Drain:
    """`put` parts, `flush` before they are read; a context manager. What the writer raises is raised by either."""

    def __init__(self, device: torch.device) -> None:
        self._sides: dict[torch.device, torch.cuda.Stream] | None = {} if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._sent, self._pending = deque[Future](), PENDING if self._sides is None else PENDING_SLABS
        self._slab: _Slab | None = None
        self._pool: list[Tensor] = []

    def put(self, out: CaseWriter, name: str, values: Mapping[str, Tensor], key: str) -> None:
        """Write a part in the order given; the values must not change any more."""
        while self._sent and (len(self._sent) >= self._pending or self._sent[0].done()):
            self._sent.popleft().result()
        if self._sides is not None:
            self._copy(out, name, values, key)
            return
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

    def _copy(self, out: CaseWriter, name: str, values: Mapping[str, Tensor], key: str) -> None:
        count = sum(value.numel() for value in values.values())
        if self._slab is not None and self._slab.used + count > self._slab.memory.numel():
            self._hand_over()
        if self._slab is None:
            self._slab = _Slab(count, self._pool)
        arrays = dict.fromkeys(values)
        for place in {value.device for value in values.values()}:
            with torch.cuda.stream(self._side(place)):
                arrays |= {seam: self._slab.take(value) for seam, value in values.items() if value.device == place}
        self._slab.values.append(values)
        self._slab.parts.append((out, name, arrays, key))
        if time.monotonic() - self._slab.begun > AGE:
            self._hand_over()

    def _side(self, place: torch.device) -> torch.cuda.Stream:
        """The stream for copies from a GPU, behind what it computes now."""
        if place not in self._sides:
            self._sides[place] = torch.cuda.Stream(place)
        self._sides[place].wait_stream(torch.cuda.current_stream(place))
        return self._sides[place]

    def _hand_over(self) -> None:
        """The slab that is being filled goes to the thread."""
        slab, self._slab = self._slab, None
        if slab is not None:
            slab.copied = [side.record_event() for side in self._sides.values()]
            self._sent.append(self._worker.submit(_write, slab))


def _write(slab: _Slab) -> None:
    for event in slab.copied:
        event.synchronize()
    slab.values.clear()
    for out, name, arrays, key in slab.parts:
        out.part(name, arrays, key)
