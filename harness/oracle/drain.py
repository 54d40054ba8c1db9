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

PENDING = 4
"""Parts that may wait for the disk; then the model waits."""


class Drain:
    """`put` parts, `flush` before they are read; a context manager. What the writer raises is raised by either."""

    def __init__(self, device: torch.device, pending: int = PENDING) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._sent, self._pending = deque[Future](), pending

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

    def _fetch(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Any], Any]:
        if self._side is None:
            return {name: to_numpy(value) for name, value in values.items()}, None
        current, arrays = torch.cuda.current_stream(self._side.device), {}
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for name, value in values.items():
                arrays[name] = torch.empty(value.shape, dtype=torch.float32, pin_memory=True)
                arrays[name].copy_(value, non_blocking=True)
                value.record_stream(self._side)
            return arrays, self._side.record_event()


def _write(out: CaseWriter, name: str, arrays: Mapping[str, Any], key: str, event: Any) -> None:
    if event is not None:
        event.synchronize()
        arrays = {seam: value.numpy() for seam, value in arrays.items()}
    out.part(name, {seam: np.asarray(array) for seam, array in arrays.items()}, key)
