"""What a user may choose for a run, the defaults, and bad choices as one sentence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.bounds import BOUNDS
from harness.cases import CASES
from harness.errors import HarnessError
from harness.policy import POLICY

OURS = "harness.graph.reference:factory"
ENGINES = ("coreai", "replay", "replay:fp32", "replay:fp16", "replay:coreai-cpu")


@dataclass(frozen=True)
class Options:
    """What a user may choose; None means the default: the embedded checkpoint, our graph, an oracle and a bundle of our own.

    mode: fp16, int8lin or int8hu: of the bundle that we export (int8hu by default), or of a given one whose metadata does
    not say. grid: rows and columns of patches that the bundle is made for. work: where what is made goes. engine: what runs
    the bundle: Apple's runtime, or replay of its own program, in an arithmetic. memory: bytes that recording, and what streams,
    may hold.
    """

    checkpoint: str | None = None
    revision: str | None = None
    graph: str = OURS
    bundle: Path | None = None
    vision_bundle: Path | None = None
    oracle: Path | None = None
    mode: str | None = None
    device: str = "cpu"
    memory: int | None = None
    cases: Path = CASES
    bounds: Path = BOUNDS
    policy: Path = POLICY
    work: Path = Path("reports/latest")
    grid: tuple[int, int] = (28, 28)
    context: int = 512
    timeout_s: float = 900.0
    engine: str = "coreai"

    @property
    def replays(self) -> str | None:
        """The arithmetic that `engine` asks replay for; None for Apple's runtime. Raises HarnessError for a bad choice."""
        if self.engine not in ENGINES:
            raise HarnessError(f"{self.engine!r} is not known", where="--engine", fix=f"known are {', '.join(ENGINES)}")
        return None if self.engine == "coreai" else self.engine.partition(":")[2] or "fp32"


def factory_of(graph: str) -> Callable[..., Any]:
    """The factory that `module:factory` names. Raises HarnessError where it cannot be imported or called."""
    module, _, name = graph.partition(":")
    where, fix = f"--graph {graph}", "give module:factory, with the module on PYTHONPATH"
    try:
        factory = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the module is someone else's: importing it may raise anything, or exit
        raise HarnessError(f"cannot be imported ({type(error).__name__}: {error})", where=where, fix=fix) from error
    if not callable(factory):
        raise HarnessError(f"is a {type(factory).__name__}, not a function", where=where, fix=fix)
    return factory


@contextmanager
def readable(place: object) -> Iterator[None]:
    """A file from elsewhere may hold a value of another type than its reader expects: HarnessError, never a crash."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HarnessError(f"holds a value of the wrong type ({error})", where=place) from error
