"""Seams (named points where an activation is compared) and Traces (what an engine computed there).

Every array of a Trace has its tokens on axis 0: patches for the vision blocks, merged image tokens for mergers and
DeepStack outputs, sequence positions for the decoder. What follows axis 0 are channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

VISION_INSIDE = ("norm1", "attn.q_rope", "attn.k_rope", "attn.v", "attn.context", "attn.out", "norm2",
                 "mlp.fc1", "mlp.act", "mlp.out")
MERGER_INSIDE = ("norm", "fc1", "act")
DECODER_INSIDE = ("input_norm", "attn.q_norm", "attn.k_norm", "attn.v", "attn.q_rope", "attn.k_rope", "attn.context",
                  "attn.out", "post_norm", "mlp.gate", "mlp.up", "mlp.act", "mlp.out")


class Depths(Protocol):
    """What the seam names of a model depend on; `checkpoint.Geometry` is one."""

    layers: int
    vision_layers: int
    deepstack_taps: tuple[int, ...]


def vision_seams(depths: Depths, inside: bool = False) -> tuple[str, ...]:
    """Vision seams in the order of computation.

    `vision.embed` [P, C] is patch embedding plus position embedding; `vision.layers.NN` [P, C] a block's output;
    `vision.deepstack.K` and `vision.merger` [N, h] what the decoder receives.
    """
    names = ["vision.embed"]
    for layer in range(depths.vision_layers):
        if inside:
            names += [f"vision.layers.{layer:02d}.{part}" for part in VISION_INSIDE]
        names.append(f"vision.layers.{layer:02d}")
        if layer in depths.deepstack_taps:
            tap = depths.deepstack_taps.index(layer)
            if inside:
                names += [f"vision.deepstack.{tap}.{part}" for part in MERGER_INSIDE]
            names.append(f"vision.deepstack.{tap}")
    if inside:
        names += [f"vision.merger.{part}" for part in MERGER_INSIDE]
    return (*names, "vision.merger")


def decoder_seams(depths: Depths, inside: bool = False) -> tuple[str, ...]:
    """Decoder seams in the order of computation.

    `decoder.embed` [T, h] is the input stream with image rows in place; `decoder.layers.NN` [T, h] a layer's output
    before, `decoder.layers.NN.deepstack` after the DeepStack addition (first layers only); then `decoder.norm` [T, h]
    and `logits` [T, V].
    """
    names = ["decoder.embed"]
    for layer in range(depths.layers):
        if inside:
            names += [f"decoder.layers.{layer:02d}.{part}" for part in DECODER_INSIDE]
        names.append(f"decoder.layers.{layer:02d}")
        if layer < len(depths.deepstack_taps):
            names.append(f"decoder.layers.{layer:02d}.deepstack")
    return (*names, "decoder.norm", "logits")


def layer_of(seam: str) -> int | None:
    """The layer number in a seam's name, or None: `decoder.layers.17.attn.q_rope` -> 17."""
    match = re.search(r"\.layers\.(\d+)", seam)
    return int(match[1]) if match else None


def stream_input(seam: str, depths: Depths) -> str | None:
    """The seam that holds the residual stream entering the layer, merger or head that computes `seam`.

    Feeding a component with the oracle's values at this seam gives its local error. None for the embeddings.
    """
    order = [name for name in (*vision_seams(depths), *decoder_seams(depths))
             if not name.startswith("vision.deepstack") and name != "vision.merger"]
    if seam.startswith("vision.deepstack"):
        return f"vision.layers.{depths.deepstack_taps[int(seam.split('.')[2])]:02d}"
    if seam.startswith("vision.merger"):
        return f"vision.layers.{depths.vision_layers - 1:02d}"
    block = re.match(r"(vision|decoder)\.layers\.\d+(\.deepstack)?", seam)
    name = block[0] if block else seam
    place = order.index(name)
    return None if name in ("vision.embed", "decoder.embed") else order[place - 1]


@dataclass
class Trace(Mapping[str, np.ndarray]):
    """Arrays by seam, and plain facts about the run (times in seconds, engine name, versions)."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, seam: str) -> np.ndarray:
        return self.arrays[seam]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def only(self, seams: Sequence[str]) -> Trace:
        """The same trace restricted to `seams`; seams it lacks stay lacking."""
        return Trace({name: self.arrays[name] for name in seams if name in self.arrays}, self.facts)
