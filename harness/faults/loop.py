"""An engine to be bent: the twin in fp16-like arithmetic, with all that a runtime and a native host keep between calls.

Image buffers, cache and rope shift are attributes that live on from one request to the next, as a static input stays
bound until it is overwritten; each step of the loop is a method that a fault can replace on the instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.cases import FrozenInputs
from harness.graph.contract import HostInputs, host_inputs
from harness.graph.quantize import RECIPES, twin_weights
from harness.graph.reference import Reference
from harness.subject import Subject
from harness.trace import Trace


class Loop:
    """Runs the cases of a Subject: the prompt in calls of `chunk` tokens, then the twin's tokens one a call.

    wide: activations stay float32.
    """

    chunk = 64

    def __init__(self, subject: Subject, weights: Mapping[str, Tensor] | None = None, wide: bool = False) -> None:
        self.subject, self.geometry, self.wide = subject, subject.geometry, wide
        recipe = RECIPES[subject.mode]
        # A graph of its own: a fault may bend it, and the judge's twin must stay what it is.
        held = weights if weights is not None else twin_weights(subject.checkpoint, recipe)
        self.weights = {name: value.clone() for name, value in held.items()}
        self.recipe, self._graphs = recipe, {}
        self.context = 512
        self.image: Tensor | None = None
        self.deepstack: Tensor | None = None
        self.cache: tuple[Tensor, Tensor] | None = None
        self.host: HostInputs | None = None
        self.length, self.calls, self.name = 0, 0, ""

    def graph(self, grid: tuple[int, int]) -> Reference:
        """What the bundle computes, made once a grid."""
        if grid not in self._graphs:
            self._graphs[grid] = Reference(self.recipe.geometry(self.geometry), grid, self.weights)
        return self._graphs[grid]

    @torch.no_grad()
    def run(self, name: str) -> Trace:
        """One conversation, as `harness.engines.Engine.run` answers a request."""
        inputs, tokens = self.subject.recorded(name).inputs, self.subject.twin_tokens(name)
        self.name, self.length, self.calls, self._parts = name, 0, 0, {}
        graph = self.graph(self.subject.grid(name))
        ids = np.concatenate([inputs.ids, np.array(tokens, dtype=np.int64)])
        self.bind(graph, inputs)
        self.host = self.prepare(ids, inputs)
        self.reset(len(ids))
        parts = [self.host.ids[start:start + self.chunk] for start in range(0, inputs.length, self.chunk)]
        parts[-1] = parts[-1][:inputs.length - (len(parts) - 1) * self.chunk]
        parts += [self.host.ids[at:at + 1] for at in range(inputs.length, len(ids))]
        rows = [self.step(graph, part) for part in parts]
        return self.answer(np.concatenate(rows))

    def bind(self, graph: Reference, inputs: FrozenInputs) -> None:
        """Run the vision tower into the image buffers; zeros for a text."""
        slots, taps, hidden = graph.slots, len(self.geometry.deepstack_taps), self.geometry.hidden
        if inputs.patches is None:
            self.image, self.deepstack = torch.zeros(slots, hidden), torch.zeros(taps * slots, hidden)
        else:
            self.image, self.deepstack = graph.encode(self.pixels(inputs), self.tap)

    def pixels(self, inputs: FrozenInputs) -> Tensor:
        """What goes into the vision tower."""
        return self.rounded(torch.from_numpy(inputs.patches))

    def prepare(self, ids: np.ndarray, inputs: FrozenInputs) -> HostInputs:
        """Extension ids and rope shift of the whole conversation."""
        merge = self.geometry.merge
        merged = (inputs.grid[1] // merge, inputs.grid[2] // merge) if inputs.grid else None
        return host_inputs(ids, self.geometry.image_token, self.geometry.vocab, merged)

    def reset(self, length: int) -> None:
        """A cache of zeros at the start of a conversation."""
        geometry = self.geometry
        shape = (geometry.layers, 1, geometry.kv_heads, max(self.context, length + 1), geometry.head_dim)
        self.cache = torch.zeros(shape), torch.zeros(shape)

    def ramp(self, count: int) -> np.ndarray:
        """position_ids of a call that brings `count` tokens."""
        return np.arange(self.length + count)

    def shift(self) -> tuple[int, int]:
        """Rope shift of a call: start, amount."""
        return self.host.shift_start, self.host.shift_amount

    def step(self, graph: Reference, ids: np.ndarray) -> np.ndarray:
        """One call; logits [S, V] float32."""
        ramp = torch.from_numpy(self.ramp(len(ids)).astype(np.int32))[None]
        shift = [torch.tensor([value], dtype=torch.int32) for value in self.shift()]
        logits = graph.decode(torch.from_numpy(ids.astype(np.int32))[None], ramp, self.image, self.deepstack, *shift,
                              self.cache, self.tap)
        self.length += len(ids)
        self.calls += 1
        self.after()
        return self.read(self.rounded(logits[0]).numpy())

    def tap(self, name: str, value: Tensor) -> Tensor:
        """Round to fp16, as a bundle's values are, and keep what is asked for."""
        bent = self.bend(name, self.rounded(value))
        self._parts.setdefault(name, []).append(bent.numpy().copy())
        return bent

    def rounded(self, value: Tensor) -> Tensor:
        """As the bundle's activations hold it: fp16, or float32 in the sharp twin."""
        return value.half().float() if value.is_floating_point() and not self.wide else value

    def bend(self, name: str, value: Tensor) -> Tensor:
        """What a runtime makes of a value."""
        return value

    def after(self) -> None:
        """What happens to the state behind a call."""

    def read(self, logits: np.ndarray) -> np.ndarray:
        """How the host reads the logits buffer."""
        return logits

    def answer(self, logits: np.ndarray) -> Trace:
        """The trace: seams, logits, cache."""
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        arrays |= {f"kv.{part}": state[:, 0, :, :self.length].numpy().copy()
                   for part, state in zip(("keys", "values"), self.cache)}
        return Trace(arrays | {"logits": logits})
