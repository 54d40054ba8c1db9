"""A Subject with something bent under test; what it is judged by is shared with the healthy one and never bent.

| target | what a fault is given | rungs that look at it |
|---|---|---|
| graph | a freshly loaded `Reference` | contract, weights, vision, decoder, decode |
| host | `Host`: what a native app does before and around the bundle | contract, inputs |
| bundle | `Tables` of the bundle's two programs | weights, engine, tokens |
| engine | `Loop`: the runtime and its state from call to call | engine, tokens |
| asset | `Files`: a copy of an exported bundle | weights |
| model | weights by name: the model itself leaves no room | headroom |
| evidence | `Evidence`: a green run's folder, its oracle and its bundle | verify |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.cases import FrozenInputs
from harness.engines.replay.precision import NORM, SOFTMAX, Taken
from harness.errors import Undecided
from harness.faults.loop import Loop
from harness.faults.tables import Tables
from harness.graph.contract import host_inputs
from harness.graph.reference import Reference
from harness.subject import Subject
from harness.trace import Trace

SHARED = ("recorded", "twin", "twin_tokens", "twin_trace")
"""What the memory of a Subject holds of the judge's side."""


class Host:
    """The host under test; a fault replaces its steps.

    text(case) renders the prompt, encode(text) tokenizes, load(reference, root) opens an image, patches(image,
    preprocessing) cuts it, contract is `harness.graph.contract.host_inputs`.
    """

    def __init__(self, subject: Subject) -> None:
        from harness import host

        self.subject, self.preprocessing = subject, subject.preprocessing
        self.contract: Callable[..., Any] = host_inputs
        self.text: Callable[..., str] = host.render
        self.load: Callable[..., Any] = host.load_image
        self.patches: Callable[..., Any] = host.make_patches
        self._tokenizer = host.load_tokenizer(subject.tokenizer)
        self.encode: Callable[[str], np.ndarray] = lambda text: np.array(self._tokenizer.encode(text).ids, np.int32)

    def make(self, name: str) -> FrozenInputs:
        """As `harness.host.host_inputs_for`, from this host's own steps."""
        from harness.host import IMAGE_PAD

        case, patches, grid, count = self.subject.cases[name], None, None, 0
        if case.images:
            patches, grid = self.patches(self.load(case.images[0], case.root), self.preprocessing)
            count = grid[1] * grid[2] // self.preprocessing.merge**2
        ids = self.encode(self.text(case).replace(IMAGE_PAD, IMAGE_PAD * count))
        return FrozenInputs(name, ids, np.zeros((3, len(ids)), np.int32), patches, grid)


class Suspect(Subject):
    """One of: a bent graph, host, bundle, engine or model; everything else is healthy and ours."""

    def __init__(self, healthy: Subject) -> None:
        super().__init__(healthy.options)
        self.healthy = healthy
        self.__dict__.update(oracle=healthy.oracle, bounds=healthy.bounds, checkpoint=healthy.checkpoint,
                             cases=healthy.cases, policy=healthy.policy)
        self.memory.update({key: value for key, value in healthy.memory.items() if key[0] in SHARED})
        self.bend_graph: Callable[[Reference], None] | None = None
        self.host_under_test: Host | None = None
        self.tables: Tables | None = None
        self.bend_loop: Callable[[Loop], None] = lambda loop: None
        self.model: dict[str, Tensor] | None = None
        self.__dict__["shipped"] = Standing(self, wide=False)
        self.__dict__["sharp"] = Standing(self, wide=True)

    def conversion(self, grid: tuple[int, int]) -> Reference:
        """The graph under test: a fresh one, bent, or the healthy one."""
        if self.bend_graph is None:
            return self.healthy.conversion(grid)
        if ("bent", grid) not in self.memory:
            graph = Reference(self.geometry, grid, widened(self.healthy))
            with torch.no_grad():
                self.bend_graph(graph)
            self.memory["bent", grid] = graph
        return self.memory["bent", grid]

    def made_inputs(self, case: str) -> FrozenInputs:
        """By the host under test."""
        return (self.host_under_test or Host(self)).make(case)

    def made_patches(self, image: Any) -> tuple[np.ndarray, tuple[int, int, int]]:
        """By the host under test."""
        host = self.host_under_test or Host(self)
        return host.patches(image, host.preprocessing)

    @property
    def host(self) -> Callable[..., Any]:
        """The contract of the host under test."""
        return self.host_under_test.contract if self.host_under_test else host_inputs

    def programs(self) -> tuple[Any, ...]:
        """Tables of the bundle under test."""
        if self.tables is None:
            raise Undecided("no bundle is under test")
        return self.tables.programs()

    def rotations(self) -> Any:
        """Tables hold no program: a healthy one turns by what our graph computes."""
        return _Rotations(self.healthy) if self.tables is not None else super().rotations()

    def taken(self) -> list[Taken]:
        """Nor norms and softmaxes: those of ours are float32."""
        return [Taken(kind, "decoder", "f32") for kind in (NORM, SOFTMAX)] if self.tables is not None else super().taken()

    def twin(self, grid: tuple[int, int]) -> Reference:
        """The twin, of the model under test where that is bent."""
        if self.model is None:
            return self.healthy.twin(grid)
        if ("bent twin", grid) not in self.memory:
            from harness.graph.quantize import RECIPES

            geometry = RECIPES[self.mode].geometry(self.geometry)
            self.memory["bent twin", grid] = Reference(geometry, grid, self.model)
        return self.memory["bent twin", grid]

    def use_model(self, weights: dict[str, Tensor]) -> None:
        """Take another model's weights for the twin; nothing that was computed with the old ones is kept."""
        self.model = weights
        self.memory = {key: value for key, value in self.memory.items() if key[0] == "recorded"}


class _Rotations:
    """Stands for `harness.engines.replay.angles.Angles`."""

    def __init__(self, subject: Subject) -> None:
        self._decoder = subject.twin(subject.options.grid).decoder
        self.slots, self.context = self._decoder.slots, subject.options.context

    def of(self, ids: np.ndarray, shift_start: int, shift_amount: int) -> np.ndarray:
        """ids [S] -> angles [S, lanes] float32."""
        rope, place = self._decoder.rope, torch.arange(len(ids), dtype=torch.int32)
        start, amount = (torch.tensor([value], dtype=torch.int32) for value in (shift_start, shift_amount))
        planes = rope.planes(torch.from_numpy(ids), place, start, amount).float()
        return (planes[rope.axis.long()].T * rope.inv_freq).numpy()


class Standing:
    """Stands for `harness.shipped.Shipped`: the bundle under test on a `Loop`; `wide` is the sharp twin."""

    def __init__(self, suspect: Suspect, wide: bool) -> None:
        self.suspect, self.wide, self.mode = suspect, wide, suspect.mode
        self.there = self.started = False
        self._traces: dict[str, Trace] = {}

    @property
    def key(self) -> str:
        """The engine whose bounds judge."""
        return engine_key(self.suspect.healthy, self.wide)

    @property
    def engine(self) -> Any:
        """Its name, and that it answers every seam of the stream."""
        return SimpleNamespace(name=self.key.split(":")[0], facts={}, seams=lambda: frozenset({"logits"}))

    def trace(self, case: str) -> Trace:
        """All cases run one after the other on one engine, in the order of the plan."""
        if not self._traces:
            suspect = self.suspect
            loop = Loop(suspect.healthy, suspect.tables.values() if suspect.tables else None, self.wide)
            suspect.bend_loop(loop)
            for name in suspect.engine_cases():
                self._traces[name] = loop.run(name)
        return self._traces[case]


def engine_key(subject: Subject, wide: bool = False) -> str:
    """What bounds on the engine of this mode belong to, as the bounds file spells it.

    Raises Undecided where no engine of this mode and width was calibrated.
    """
    mode = f"{subject.mode}{'-fp32' if wide else ''}"
    keys = sorted({bound.engine for bound in subject.bounds.all if bound.rung == "engine"
                   and bound.engine.endswith(f":{mode}:h{subject.geometry.hidden}")})
    if not keys:
        raise Undecided(f"no bound covers an engine in mode {mode}", where="bounds", fix="run harness calibrate")
    return keys[0]


def widened(subject: Subject) -> Mapping[str, Tensor]:
    """The checkpoint in float32, a copy of its own."""
    if "widened" not in subject.memory:
        subject.memory["widened"] = {name: value.float() for name, value in subject.checkpoint.tensors()}
    return {name: value.clone() for name, value in subject.memory["widened"].items()}
