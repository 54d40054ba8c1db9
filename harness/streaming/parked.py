"""A forward of the upstream model that waits at every module of a stage until that module has its weights.

Hugging Face's own forward runs, whole and unchanged, as a coroutine; where it calls a module of a stage it stops
and hands the call to whoever drives it. So all cases can be brought to one layer, the layer loaded once and run for each,
and nothing of the model between its layers (masks, rotary angles, DeepStack additions) is written a second time.

The coroutine is a greenlet, since what stops is some frames of transformers below: it shares the driver's thread, and a
hand-over takes microseconds. A thread instead wakes on another core, some 70 times a pass, and each time a GPU runs dry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn


@dataclass(frozen=True)
class Call:
    """A call that a forward waits in: the module, and what it was called with."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class Fork:
    """Calls that a forward makes one after another. What they do to each other they do layer by layer (a cache), so at
    each stage all of them are brought through, in their order, before the next stage."""

    calls: tuple[Callable[[], Any], ...]
    module: None = None


class _Forward(greenlet):
    """Known by its class: a program that uses us may run in a greenlet of its own."""


class Parked:
    """Drive it: `at` is the call it waits in (None when it is done), `go(value)` returns a value from that call.

    It is driven in the thread that made it. Gradients are off in it.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.at: Call | Fork | None = None
        self.result: Any = None
        self._line = _Forward(lambda _: run())
        self.go(None)  # to its first wait

    def go(self, value: Any) -> None:
        """Go on until the next call of a staged module, or the end. Raises what the forward raises."""
        self.at = None
        self._line.parent = getcurrent()  # who drives gets the next call, and what is raised
        with torch.no_grad():  # a switch of the thread's: set here, it never outlives the forward's turn
            came = self._line.switch(value)
        if self._line.dead:
            self.result = came
        else:
            self.at = came

    def close(self) -> None:
        """End a forward that is not done; its references are let go."""
        if not self._line.dead:
            self._line.parent, self.at = getcurrent(), None
            self._line.throw(GreenletExit)


def driven() -> bool:
    """Whether this is a forward that somebody drives."""
    return isinstance(getcurrent(), _Forward)


def fork(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Results of calls that the forward that runs here makes in turn; see `Fork`."""
    return getcurrent().parent.switch(Fork(tuple(calls)))


@contextmanager
def parking(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Callable[..., Any]]]:
    """While it lasts, forwards under way wait at these modules; gives what each of them really does."""
    real = {module: module.forward for module in modules}
    own = {module: "forward" in module.__dict__ for module in real}
    for module in real:
        module.forward = _stop(module)
    try:
        yield real
    finally:
        for module, forward in real.items():
            if own[module]:
                module.forward = forward
            else:
                del module.forward


def _stop(module: nn.Module) -> Callable[..., Any]:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        return getcurrent().parent.switch(Call(module, arguments, keywords))

    return forward
