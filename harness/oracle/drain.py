"""Activations on their way to the store: written by a thread of its own while the model goes on.

From a GPU they travel on a stream of their own into pinned memory, so the model's stream never waits for a copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.oracle.hooks import to_numpy
from harness.store import CaseWriter

PENDING, PENDING_GPU = 4, 128
"""Parts that may wait for the disk; then the model waits. A GPU is far ahead of any disk, and its host has memory."""


class Drain:
    """`put` parts, `flush` before they are read; a context manager. What the writer raises is raised by either."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._sent, self._pending = deque[Future](), PENDING if self._side is None else PENDING_GPU

    def put(self, out: CaseWriter, name: str, values: Mapping[str, Tensor], key: str) -> None:
        """Write a part in the order given; the values must not change any more."""
        while self._sent and (len(self._sent) >= self._pending or self._sent[0].done()):
            self._sent.popleft().result()
        arrays, event = self._fetch(values)
        self._sent.append(self._worker.submit(_write, out, name, arrays, key, event))

    def flush(self) -> None:
        """Wait until all is on the disk."""
        while self._sent:
            self._sent.popleft().result()

    def __enter__(self) -> Drain:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(wait=True)

    def _fetch(self, values: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], Any]:
        """Arrays, and what to wait for before they are whole, which also holds what is still being copied."""
        if self._side is None:
            return {name: to_numpy(value) for name, value in values.items()}, None
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        pinned = torch.empty(sum(value.numel() for value in values.values()), dtype=torch.float32, pin_memory=True)
        arrays, start = {}, 0
        with torch.cuda.stream(self._side):
            for name, value in values.items():
                target = pinned[start:start + value.numel()].view(value.shape)
                target.copy_(value, non_blocking=True)
                arrays[name], start = target.numpy(), start + value.numel()
            return arrays, (self._side.record_event(), values)


def _write(out: CaseWriter, name: str, arrays: Mapping[str, np.ndarray], key: str, copied: Any) -> None:
    if copied is not None:
        copied[0].synchronize()
    out.part(name, arrays, key)
