"""A forward of the upstream model that waits at every module of a stage until that module has its weights.

Hugging Face's own forward runs, whole and unchanged, in a thread of its own; where it calls a module of a stage it stops
and hands the call to whoever drives it. So all cases can be brought to one layer, the layer loaded once and run for each,
and nothing of the model between its layers (masks, rotary angles, DeepStack additions) is written a second time. At any
moment one thread runs and all others wait, so nothing here is concurrent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_HERE = threading.local()


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


class _Abandoned(BaseException):
    """Unwinds a forward that nobody drives any more."""


class Parked:
    """Drive it: `at` is the call it waits in (None when it is done), `go(value)` returns a value from that call."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.at: Call | Fork | None = None
        self.result: Any = None
        self._error: BaseException | None = None
        self._value: Any = None
        self._abandoned = False
        # Locks that are handed over: a semaphore is Python code, and between two of them a GPU runs dry.
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, args=(run,), name="forward", daemon=True)
        self._thread.start()
        self.go(None)  # to its first wait

    def go(self, value: Any) -> None:
        """Go on until the next call of a staged module, or the end. Raises what the forward raises."""
        self._value, self.at = value, None
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End a forward that is not done; its references are let go."""
        if self._thread.is_alive():
            self._abandoned = True
            self._turn.release()
            self._thread.join()

    def wait(self, call: Call | Fork) -> Any:
        """Called in the forward's own thread."""
        self.at = call
        self._back.release()
        self._turn.acquire()
        if self._abandoned:
            raise _Abandoned
        value, self._value = self._value, None
        return value

    @torch.no_grad()
    def _run(self, run: Callable[[], Any]) -> None:
        self._turn.acquire()
        _HERE.forward = self
        try:
            if not self._abandoned:
                self.result = run()
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  it is raised where the forward is driven
            self._error = error
        finally:
            self._back.release()


def driven() -> bool:
    """Whether this thread is a forward that somebody drives."""
    return getattr(_HERE, "forward", None) is not None


def fork(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Results of calls that the forward of this thread makes in turn; see `Fork`."""
    return _HERE.forward.wait(Fork(tuple(calls)))


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
        return _HERE.forward.wait(Call(module, arguments, keywords))

    return forward
