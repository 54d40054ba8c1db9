"""Our conversion of a checkpoint that is larger than memory: each block and layer has its weights while it computes.

The towers are those of `harness.graph.reference`, built without weights. A call of `encode` or `decode` runs through them
stage by stage; `together` brings many calls through, so that each weight is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.graph.decoder import Decoder
from harness.graph.protocol import Tap, untapped
from harness.graph.reference import EMBEDDING, HEAD, POSITIONS, TEXT, VISION, Reference, expect_names
from harness.graph.vision import Vision, interpolate_positions
from harness.streaming.parked import Parked, driven, fork, parking
from harness.streaming.reading import WeightReader
from harness.streaming.stages import Stage, head_stages, tower_stages
from harness.streaming.sweep import merged, sweep
from harness.streaming.weights import Streamed

SLOTS = 2
"""Buffers of weights: the next stage is read while one computes."""
T = TypeVar("T")


class StreamedReference(Reference):
    """Satisfies `harness.graph.protocol.Conversion`.

    reader, geometry: of what is computed with, where that is not the checkpoint itself (see `harness.graph.twin`); dtype:
    what an export rounds the positions to that it bakes. vary: changes the towers in place before they are used; the head
    is multiplied in blocks of rows whatever it does.
    Raises HarnessError where a tensor is missing, left over, or of another shape than the config says.
    """

    streams = True

    def __init__(self, checkpoint: Checkpoint, grid: tuple[int, int], reader: WeightReader | None = None,
                 geometry: Geometry | None = None, dtype: torch.dtype = torch.float32,
                 vary: Callable[[Reference], None] = lambda graph: None) -> None:
        self.geometry, self.grid = geometry or checkpoint.geometry, grid
        self.reader = reader or WeightReader(checkpoint)
        shapes = self.reader.shapes()
        tied = {HEAD} if self.geometry.tied and EMBEDDING in shapes else set()
        expect_names(set(shapes) | tied, self.geometry)
        with torch.device("meta"):
            self.vision = Vision(self.geometry, grid).eval()
            self.decoder = Decoder(self.geometry, (grid[0] // self.geometry.merge, grid[1] // self.geometry.merge)).eval()
        self.slots = self.decoder.slots
        table = torch.empty(shapes[POSITIONS])
        self.reader.fill(POSITIONS, table)
        baked = interpolate_positions(table, *grid, self.geometry.merge).to(dtype).float()
        self.vision.positions = nn.Parameter(baked, requires_grad=False)
        self.decoder.embed_tokens.forward = self._look_up
        self.stages = self._stages(shapes)
        vary(self)
        self._held = ExitStack()
        parked = [module for stage in self.stages for module in stage.modules] + [self.decoder.lm_head]
        self.real = self._held.enter_context(parking(parked))

    def _stages(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Stage]:
        names = {id(module): VISION + path for path, module in self.vision.named_modules()}
        names |= {id(module): TEXT + path for path, module in self.decoder.named_modules()}
        stages = tower_stages(self.geometry, self.vision, self.decoder, names)
        for place in (place for stage in stages for place in stage.places):
            if torch.Size(shapes[place.tensor]).numel() != torch.Size(place.shape).numel() \
                    or shapes[place.tensor][0] != place.shape[0]:
                raise HarnessError(f"has shape {shapes[place.tensor]}, the config asks for {place.shape}",
                                   where=place.tensor)
        return stages + head_stages(self.geometry, EMBEDDING if self.geometry.tied else HEAD, self.decoder.lm_head)

    def _look_up(self, ids: Tensor) -> Tensor:
        unique, places = torch.unique(ids, return_inverse=True)
        return self.reader.rows(EMBEDDING, unique.tolist())[places]

    def tensors(self) -> Mapping[str, Tensor]:
        """Weights by checkpoint name, in float32, each read when it is asked for, through the path that stages take."""
        return _Lazily(self.reader, {place.tensor for stage in self.stages for place in stage.places}
                       | {POSITIONS, EMBEDDING} | ({HEAD} if not self.geometry.tied else set()))

    def encode(self, patches: Tensor, tap: Tap = untapped) -> tuple[Tensor, Tensor]:
        """See the protocol."""
        return self._alone(lambda: super(StreamedReference, self).encode(patches, tap))

    def decode(self, *arguments: Any, tap: Tap = untapped, **named: Any) -> Tensor:
        """See the protocol."""
        if len(arguments) > 7:
            *arguments, tap = arguments
        return self._alone(lambda: super(StreamedReference, self).decode(*arguments, **named, tap=tap))

    def in_turn(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of calls that are known beforehand and depend on those before by the cache alone: each weight is read
        once for all of them."""
        return fork(calls) if driven() else together([self], [lambda: fork(calls)])[0]

    def _alone(self, call: Callable[[], T]) -> T:
        return call() if driven() else together([self], [call])[0]


class _Lazily(Mapping[str, Tensor]):
    def __init__(self, reader: WeightReader, names: set[str]) -> None:
        self._reader, self._names, self._shapes = reader, sorted(names), reader.shapes()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.rows(name, 0, self._shapes[name][0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, at most to its end."""
        target = torch.empty(min(stop, self._shapes[name][0]) - start, *self._shapes[name][1:])
        self._reader.fill(name, target, start)
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def together(models: Sequence[StreamedReference], calls: Sequence[Callable[[], T]],
             after: Callable[[str], None] = lambda stage: None, slots: int = SLOTS) -> list[T]:
    """Results of calls that use any of the models (of one checkpoint, for several grids), each weight read once a pass."""
    stages = merged([model.stages for model in models])
    real = {module: forward for model in models for module, forward in model.real.items()}
    source = Streamed(models[0].reader, torch.device("cpu"), slots, max(stage.elements for stage in stages), False)
    forwards = [Parked(call) for call in calls]
    sweep(forwards, stages, [model.decoder.lm_head for model in models], source, real, after)
    return [forward.result for forward in forwards]

