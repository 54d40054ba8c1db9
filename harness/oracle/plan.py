"""What a recording needs in memory, from the geometry and the cases, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.cases import FrozenInputs
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.oracle.drain import PENDING
from harness.streaming.room import DEFAULT, LIBRARIES, gib, inner_values, resident
from harness.streaming.stages import Stage, head_rows

__all__ = ["DEFAULT", "Plan", "gib", "plan"]
CONTEXT = 1 << 30
"""Bytes that CUDA's context and the workspaces of its kernels take of a GPU."""


@dataclass(frozen=True)
class Plan:
    """slots: buffers for the weights of one stage (2: the next is read while one runs); keep: all stages stay in memory.

    parts: bytes by what they are for.
    """

    parts: dict[str, int]
    memory: int
    slots: int
    keep: bool

    @property
    def total(self) -> int:
        """Bytes at most."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """One line: the total, what is allowed, and the largest parts."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:4]
        return f"memory: {gib(self.total)} planned of {gib(self.memory)} allowed: " + \
            ", ".join(f"{gib(size)} {name}" for name, size in largest)


def plan(geometry: Geometry, stages: Sequence[Stage], cases: Sequence[tuple[FrozenInputs, int]], memory: int,
         inside: bool, process: int | None = None) -> Plan:
    """The fastest way that fits: all weights kept, or two stages in turn, or one. cases: inputs and tokens to decode.

    process: bytes that are taken whatever is computed (default: what this process holds now, and its libraries).

    Raises HarnessError naming the least memory that works.
    """
    largest = 4 * max(stage.elements for stage in stages)
    every = 4 * sum(stage.elements for stage in stages)
    rest = {"the process and its libraries": resident() + LIBRARIES if process is None else process,
            "streams of all cases": sum(_stream(geometry, inputs, decode) for inputs, decode in cases),
            "rows that choose the tokens": sum(4 * 4 * decode * geometry.vocab for _, decode in cases),
            "activations of one case in one stage": max(_inside(geometry, inputs, decode) for inputs, decode in cases),
            "parts on their way to the disk, or caches of a draft": max(
                PENDING * max(_part(geometry, inputs, decode, inside) for inputs, decode in cases),
                sum(_cache(geometry, inputs, decode) for inputs, decode in cases))}
    for name, size, slots, keep in (("all weights in float32", every, 0, True),
                                    ("weights of two stages in float32", 2 * largest, 2, False),
                                    ("weights of one stage in float32", largest, 1, False)):
        found = Plan({name: size, **rest}, memory, slots, keep)
        if found.total <= memory:
            return found
    raise HarnessError(f"{gib(memory)} are too little for this checkpoint and {len(cases)} cases", where="--memory",
                       fix=f"the least that works is {gib(found.total + (1 << 26))}; fewer cases need less")


def _shape(inputs: FrozenInputs, decode: int) -> tuple[int, int]:
    return inputs.length + decode, 0 if inputs.patches is None else len(inputs.patches)


def _stream(geometry: Geometry, inputs: FrozenInputs, decode: int) -> int:
    """What a forward holds between stages: its stream before and after, image rows and DeepStack rows, patches, angles."""
    tokens, patches = _shape(inputs, decode)
    images = patches // geometry.merge**2 * geometry.hidden * (2 + len(geometry.deepstack_taps))
    vision = patches * (2 * geometry.patch_features + 3 * geometry.vision_hidden)
    return 4 * (3 * (tokens + decode) * geometry.hidden + images + vision + 4 * tokens * geometry.head_dim)


def _inside(geometry: Geometry, inputs: FrozenInputs, decode: int) -> int:
    """Intermediate values of the widest stage, all of them at once, scores of attention included."""
    tokens, patches = _shape(inputs, decode)
    return 4 * max(*inner_values(geometry, tokens, patches, tokens, 2), tokens * head_rows(geometry))


def _cache(geometry: Geometry, inputs: FrozenInputs, decode: int) -> int:
    """Keys and values of all layers, which only decoding one token a step holds together."""
    return 4 * 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * (inputs.length + decode)


def _part(geometry: Geometry, inputs: FrozenInputs, decode: int, inside: bool) -> int:
    tokens, patches = _shape(inputs, decode)
    cache = 2 * geometry.kv_heads * geometry.head_dim
    decoder = tokens * (2 * geometry.hidden + cache)
    vision = patches * geometry.vision_hidden
    if inside:
        decoder += tokens * (5 * geometry.hidden + 4 * geometry.intermediate + 6 * geometry.heads * geometry.head_dim)
        vision += patches * (8 * geometry.vision_hidden + 2 * geometry.vision_intermediate)
    return 4 * max(decoder, vision, tokens * head_rows(geometry))
