"""Giving stages their weights: read ahead by a thread of its own while the stage before computes, and taken away again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.streaming.reading import BUFFER, WeightReader
from harness.streaming.stages import Place, Stage, aligned

STAGED = BUFFER // 4
"""Values that go to a GPU at a time, in their stored dtype."""


class Source(Protocol):
    """Where stages get their weights from. keep: whether all of them stay in memory."""

    keep: bool

    def stages(self, wanted: Sequence[Stage]) -> Iterator[tuple[Stage, list[Tensor]]]:
        """The stages in order, each with its weights in place until the next is asked for; tensors by `Stage.places`."""
        ...

    def place_all(self, stages: Sequence[Stage]) -> list[Tensor]:
        """Where all are kept: every weight in place for good; returns the head's blocks."""
        ...


class Streamed:
    """Weights from the files, in `slots` buffers that are used in turn: with two, the next stage is read while one runs.

    keep: the stages stay in memory once read, in as many buffers as there are stages. spare: bytes beyond the slots that
    `narrow` may hold.
    """

    def __init__(self, reader: WeightReader, device: torch.device, slots: int, elements: int, keep: bool,
                 spare: int = 0) -> None:
        self.reader, self.device, self.keep, self.spare = reader, device, keep, spare
        self._slots = [] if keep else [torch.empty(elements, dtype=torch.float32, device=device) for _ in range(slots)]
        self._kept: dict[str, list[Tensor]] = {}
        self._keeping: set[str] = set()
        self._done: dict[int, torch.cuda.Event] = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def narrow(self, dtype: torch.dtype, again: Sequence[Stage]) -> Streamed:
        """The same stages, matrices in a 16-bit dtype and vectors in float32, in this one's slots: use one at a time.

        again: stages that are asked for over and over; as many of them as there is spare memory for stay once read.
        """
        found, room = Streamed(self.reader, self.device, 0, 0, False), self.spare
        found._slots = [slot.view(dtype) for slot in self._slots]
        for stage in again:
            room -= _narrow_bytes(stage)
            if room >= 0:
                found._keeping.add(stage.name)
        return found

    def stages(self, wanted: Sequence[Stage]) -> Iterator[tuple[Stage, list[Tensor]]]:
        """See `Source`. Raises HarnessError where the files fail or change."""
        count = max(1, len(self._slots) or 2)
        with ThreadPoolExecutor(1, thread_name_prefix="read") as worker:
            ahead: list[Future] = []
            asked = 0
            try:
                for number, stage in enumerate(wanted):
                    while asked < min(len(wanted), number + count):
                        ahead.append(worker.submit(self._load, wanted[asked], asked))
                        asked += 1
                    tensors = ahead.pop(0).result()
                    with placed(stage.places, tensors):
                        yield stage, tensors
                    self._release(number)
            finally:
                for future in ahead:
                    future.cancel()
        self.reader.check()

    def place_all(self, stages: Sequence[Stage]) -> list[Tensor]:
        """Every weight in place for good, where all are kept; returns the head's blocks."""
        held = list(self.stages(stages))
        for stage, tensors in held:
            _place(stage.places, tensors)
        return [tensor for stage, tensors in held if stage.rows for tensor in tensors]

    def _load(self, stage: Stage, number: int) -> list[Tensor]:
        if stage.name in self._kept:
            return self._kept[stage.name]
        flat = self._own(stage) if self.keep or stage.name in self._keeping else self._slot(number)
        tensors, start = [], 0
        for place in stage.places:
            dtype = flat.dtype if len(place.shape) > 1 else torch.float32
            wide = dtype.itemsize // flat.dtype.itemsize  # elements of the slot that one of the tensor takes
            end = start + wide * torch.Size(place.shape).numel()
            target = flat[start:end].view(dtype).view(place.shape)
            self._fill(place.tensor, target, stage.rows[0] if stage.rows else 0)
            tensors.append(target)
            start += wide * aligned(place.shape)
        self.reader.check()  # before anything is computed with them, and kept
        if self.keep or stage.name in self._keeping:
            self._kept[stage.name] = tensors
        return tensors

    def _own(self, stage: Stage) -> Tensor:
        """Memory that is the stage's alone."""
        dtype = torch.float32 if self.keep else self._slots[0].dtype
        size = stage.elements if self.keep else _narrow_bytes(stage) // dtype.itemsize
        return torch.empty(size, dtype=dtype, device=self.device)

    def _slot(self, number: int) -> Tensor:
        slot = number % len(self._slots)
        if slot in self._done:
            self._done.pop(slot).synchronize()
        return self._slots[slot]

    def _release(self, number: int) -> None:
        if self.device.type == "cuda" and not self.keep:
            self._done[number % len(self._slots)] = torch.cuda.current_stream(self.device).record_event()

    def _fill(self, name: str, target: Tensor, first: int) -> None:
        if self.device.type != "cuda":
            self.reader.fill(name, target, first)
            return
        flat, before = target.view(-1), first * (target.numel() // target.shape[0])
        with torch.cuda.stream(self._copies):
            for start in range(0, flat.numel(), STAGED):
                count = min(STAGED, flat.numel() - start)
                flat[start:start + count].copy_(self.reader.stored(name, before + start, count).to(self.device))
            self._copies.synchronize()


def _narrow_bytes(stage: Stage) -> int:
    """Matrices in 16 bits, vectors in 32."""
    return sum((2 if len(place.shape) > 1 else 4) * aligned(place.shape) for place in stage.places)


@contextmanager
def placed(places: Sequence[Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts, these tensors are the parameters at these places."""
    empty = [[owner._parameters[place.attribute] for owner in place.owners] for place in places]
    _place(places, tensors)
    try:
        yield
    finally:
        for place, parameters in zip(places, empty):
            for owner, parameter in zip(place.owners, parameters):
                owner._parameters[place.attribute] = parameter


def _place(places: Sequence[Place], tensors: Sequence[Tensor]) -> None:
    for place, tensor in zip(places, tensors):
        for owner in place.owners:
            owner._parameters[place.attribute] = nn.Parameter(tensor, requires_grad=False)
