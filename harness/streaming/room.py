"""What calls of a graph that streams need in memory, and how many of them may be under way at once."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError
from harness.geometry import Geometry

if TYPE_CHECKING:
    from harness.streaming.stages import Stage

DEFAULT = 4 << 30
"""Bytes that may be taken unless the user says otherwise."""
LIBRARIES = 160 << 20
"""Bytes that torch's kernels, threads and buffers take once they run, on top of what is there before (measured: 90 to 130
MiB with 2 threads)."""
LOGITS_BYTES = 1 << 29
"""Bytes of logits that are filled at a time; the head is read once for each such group of forwards."""
LIBRARIES_MAPPED = 300 << 20
"""Bytes of torch's and transformers' own files that stay mapped (measured: 240 to 290 MiB)."""
JUDGED = 8
"""Times the largest activation (logits) that comparing it with another takes: two ways, the reference as it is joined, the
regions of all of them, blocks in float64 (measured on 131 MB of logits: 0.85 GiB)."""


@dataclass(frozen=True)
class Load:
    """held: bytes that a call keeps from stage to stage. busy: what it takes besides, while it is in one. logits: in it."""

    held: int
    busy: int
    logits: int


def inner_values(geometry: Geometry, tokens: int, patches: int, keys: int, scores: int) -> tuple[int, int]:
    """Intermediate values of a decoder layer and of a vision block, all of each at once; scores: how many times attention
    holds its [heads, tokens, keys]."""
    decoder = tokens * (4 * geometry.heads * geometry.head_dim + 4 * geometry.intermediate + 4 * geometry.hidden) \
        + scores * geometry.heads * tokens * keys
    vision = patches * (8 * geometry.vision_hidden + 3 * geometry.vision_intermediate) \
        + scores * geometry.vision_heads * patches**2
    return decoder, vision


def load(geometry: Geometry, tokens: int, patches: int = 0, context: int | None = None, layers: int | None = None) -> Load:
    """Of a call of so many tokens with an image of so many patches (or none), behind a cache of `context` slots.

    layers: those whose cache is held (default: all). Attention holds its scores four times over.
    """
    depth = geometry.layers if layers is None else layers
    cache = 2 * depth * geometry.kv_heads * geometry.head_dim * (tokens if context is None else context)
    image = patches * (2 * geometry.patch_features + 3 * geometry.vision_hidden) \
        + patches // geometry.merge**2 * geometry.hidden * (2 + len(geometry.deepstack_taps))
    decoder, vision = inner_values(geometry, tokens, patches, context or tokens, 4)
    logits = 4 * tokens * geometry.vocab
    return Load(4 * (cache + image + 3 * tokens * geometry.hidden + 4 * tokens * geometry.head_dim),
                max(4 * decoder, 4 * vision, JUDGED * logits), logits)


@dataclass(frozen=True)
class Sweeps:
    """slots: buffers for the weights of a stage. groups: numbers of the calls that go together. total: bytes at most."""

    slots: int
    groups: tuple[tuple[int, ...], ...]
    total: int
    memory: int
    parts: dict[str, int]

    def describe(self, what: str) -> str:
        """One line, for people."""
        sweeps = f"{len(self.groups)} sweep{'s' * (len(self.groups) > 1)} over the weights"
        return f"memory: {what}: {gib(self.total)} planned of {gib(self.memory)} allowed, {sweeps}: " + ", ".join(
            f"{gib(size)} {name}" for name, size in sorted(self.parts.items(), key=lambda part: -part[1]))


def plan_sweeps(stages: Sequence[Stage], loads: Sequence[Load], memory: int) -> Sweeps:
    """As many calls at once as fit, beside two stages' weights, or one's where nothing fits beside two.

    Raises HarnessError naming the least memory that works.
    """
    largest = 4 * max(stage.elements for stage in stages)
    busy = max(one.busy for one in loads) + min(LOGITS_BYTES, sum(one.logits for one in loads))
    process, most = resident() + LIBRARIES, max(one.held for one in loads)
    for slots in (2, 1):
        room = memory - process - slots * largest - busy
        if room >= most:
            break
    else:
        raise HarnessError(f"{gib(memory)} are too little for one call of this model beside one stage of its weights",
                           where="--memory", fix=f"the least that works is {gib(memory + most - room + (1 << 26))}")
    groups: list[list[int]] = []
    held = room + 1
    for number, one in enumerate(loads):
        if held + one.held > room:
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += one.held
    largest_group = max(sum(loads[number].held for number in group) for group in groups)
    parts = {f"weights of {'two stages' if slots == 2 else 'one stage'} in float32": slots * largest,
             "the process and its libraries": process, "calls between stages": largest_group,
             "activations of one stage, and judging them": busy}
    return Sweeps(slots, tuple(map(tuple, groups)), sum(parts.values()), memory, parts)


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 28 else f"{size / 2**20:.0f} MiB"


def resident() -> int:
    """Bytes of memory that this process holds now; a usual figure where the system does not say.

    Pages of mapped files are not counted but for those that libraries take: the system takes the others back.
    """
    give_back()
    anonymous, files = _held()
    return anonymous + min(files, LIBRARIES_MAPPED)


def _held() -> tuple[int, int]:
    """Bytes of anonymous memory, and of mapped files."""
    try:
        status = Path("/proc/self/status").read_text()
        return tuple(int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 for name in ("RssAnon", "RssFile"))
    except (OSError, TypeError):
        return 450 << 20, 0


def give_back() -> None:
    """Hand freed memory back (glibc keeps it: 1.1 GiB at the end of an 8B export); elsewhere the allocator does so."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class Watch:
    """Looks at this process's memory ten times a second from when it is made; children are not counted."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        threading.Thread(target=self._look, name="memory", daemon=True).start()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.most = max(self.most, _held()[0])

    def describe(self, allowed: int | None) -> str:
        """What was held at most, in one line."""
        self._over.set()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return f"memory: {gib(self.most)} held at most of {gib(allowed or DEFAULT)} allowed; {gib(peak)} with the pages of " \
            "files that were mapped, which the system takes back"
