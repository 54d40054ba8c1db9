"""Bringing forwards of one or several models through the stages together, over and over until all of them are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.streaming import room
from harness.streaming.parked import Fork, Parked
from harness.streaming.stages import Place, Stage
from harness.streaming.weights import Source

Real = Mapping[nn.Module, Callable[..., Any]]


def merged(models: Sequence[Sequence[Stage]]) -> list[Stage]:
    """Stages of models that hold the same weights (towers of several grids): read once, placed in each."""
    joined = []
    for parts in zip(*models, strict=True):
        places = [Place(tuple(owner for same in group for owner in same.owners), group[0].attribute, group[0].tensor,
                        group[0].shape) for group in zip(*(stage.places for stage in parts), strict=True)]
        modules = tuple(module for stage in parts for module in stage.modules)
        joined.append(Stage(parts[0].name, modules, tuple(places), parts[0].rows))
    return joined


@torch.no_grad()
def sweep(forwards: Sequence[Parked], stages: Sequence[Stage], heads: Sequence[nn.Module], source: Source, real: Real,
          after: Callable[[str], None] = lambda stage: None) -> int:
    """Drive forwards to their ends; returns how many passes over the weights that took.

    heads: the modules that multiply by the head's matrix, which is read in blocks of rows. after(stage) is told when a
    stage has been computed for all that waited there. Raises what a forward raises; those that are not done are ended.
    """
    body, rows = [stage for stage in stages if not stage.rows], [stage for stage in stages if stage.rows]
    passes, crew = 0, Crew(forwards)
    try:
        crew.spread()
        while any(forward.at is not None for forward in crew.all):
            passes += 1
            first = min((place for place, stage in enumerate(body) if _waiting(crew.all, stage.modules)),
                        default=len(body))
            for stage, _ in source.stages(body[first:]):
                for forward in crew.all:
                    while forward.at is not None and forward.at.module in stage.modules:
                        call = forward.at
                        crew.go(forward, real[call.module](*call.arguments, **call.keywords))
                crew.spread()
                after(stage.name)
            for group in _groups(_waiting(crew.all, heads), rows[-1].rows[1]):
                filled = _logits(group, rows, source, real)
                for forward in group:
                    crew.go(forward, filled.pop(0))
                after("logits")
            crew.spread()
    finally:
        for forward in crew.all:
            forward.close()
    return passes


class Crew:
    """Forwards under way, and those that they have forked, behind them and in order."""

    def __init__(self, forwards: Sequence[Parked]) -> None:
        self.all = list(forwards)
        self._children: dict[Parked, list[Parked]] = {}
        self._parent: dict[Parked, Parked] = {}

    def go(self, forward: Parked, value: Any) -> None:
        """Return a value from the call that a forward waits in; where it was the last of a fork, that goes on too."""
        forward.go(value)
        if forward in self._parent:
            self._join(self._parent[forward])

    def spread(self) -> None:
        """Start the calls of new forks, each behind the forward that makes it; let go of what is done."""
        self.all[:] = [one for one in self.all if one.at is not None]
        while new := [one for one in self.all if isinstance(one.at, Fork) and one not in self._children]:
            for forward in new:
                place, children = self.all.index(forward), self._children.setdefault(forward, [])
                for call in forward.at.calls:
                    children.append(Parked(call))
                    self.all.insert(place + len(children), children[-1])
                    self._parent[children[-1]] = forward
                self._join(forward)

    def _join(self, forward: Parked) -> None:
        children = self._children[forward]
        if any(child.at is not None for child in children) or len(children) < len(forward.at.calls):
            return
        for child in self._children.pop(forward):
            del self._parent[child]
        self.go(forward, [child.result for child in children])


def _waiting(forwards: Sequence[Parked], modules: Sequence[nn.Module]) -> list[Parked]:
    return [forward for forward in forwards if forward.at is not None and forward.at.module in modules]


def _groups(forwards: Sequence[Parked], vocab: int) -> list[list[Parked]]:
    groups: list[list[Parked]] = []
    size = room.LOGITS_BYTES
    for forward in forwards:
        bytes_ = 4 * vocab * forward.at.arguments[0].shape[-2]
        if size + bytes_ > room.LOGITS_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(forward)
        size += bytes_
    return groups


def _logits(group: Sequence[Parked], rows: Sequence[Stage], source: Source, real: Real) -> list[Tensor]:
    calls = [(forward.at.module, forward.at.arguments[0]) for forward in group]
    filled = [value.new_empty(*value.shape[:-1], rows[-1].rows[1]) for _, value in calls]
    for stage, (weight,) in source.stages(rows):
        for (module, value), logits in zip(calls, filled):
            # A graph's head makes its own product, as any module of it does: a variation of the graph varies it too.
            made = real[module](value) if stage.places[0].owners else F.linear(value, weight)
            logits[..., slice(*stage.rows)] = made
    return filled
