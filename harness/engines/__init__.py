"""The interface of an engine: it runs a Request into a Trace.

An engine's arithmetic is part of its name: `coreai-cpu-linux` accumulates fp16 products in fp16, a GPU does not, and
the bounds of the engine rung belong to one engine and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from harness.cases import FrozenInputs
from harness.trace import Trace


@dataclass(frozen=True)
class Request:
    """One run: the prompt, then `forced` tokens teacher-forced, then `free` greedy tokens of the engine's own.

    `seams` are read at every position of prompt + forced. The Trace answers with `logits` [T + len(forced) + free, V]
    always (row i predicts token i + 1), the other seams for the positions they cover, and with `kv` also
    `kv.keys` and `kv.values` [L, kv_heads, T + n, head_dim] as they stand at the end.
    `facts["tokens"]` holds the greedy tokens chosen freely.
    """

    inputs: FrozenInputs
    forced: tuple[int, ...] = ()
    free: int = 0
    seams: frozenset[str] = field(default_factory=frozenset)
    kv: bool = False


class Engine(Protocol):
    """Anything that computes the model."""

    name: str
    """With its arithmetic: `torch-fp32`, `coreai-cpu-linux`."""

    def seams(self) -> frozenset[str]:
        """Seams that `run` can answer."""
        ...

    def check(self, request: Request) -> object:
        """Raises HarnessError where this engine cannot run the request."""
        ...

    def run(self, requests: Sequence[Request]) -> Iterator[Trace]:
        """One Trace a request, in order, as they come. Raises Undecided where the engine crashed, hung or is not there."""
        ...


def streams(conversion: Any) -> bool:
    """Whether a conversion reads its weights for each call: then calls are made together, and little of them is kept."""
    return getattr(conversion, "streams", False)
