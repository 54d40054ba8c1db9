"""Calls of models that stream, as many together as the memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from harness.streaming.room import DEFAULT, Load, Watch, give_back, load, plan_sweeps
from harness.subject.given import Given

if TYPE_CHECKING:
    from harness.cases import FrozenInputs
    from harness.graph.streamed import StreamedReference

T = TypeVar("T")


def together(subject: Given, what: str, models: Sequence[StreamedReference], loads: Sequence[Load],
             calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of calls, in order, each weight read once a pass for all that fit together; the plan is told before.

    Each call is a thread, and each thread keeps what it has freed: it is handed back after every stage.

    Raises HarnessError where `--memory` is too little for one of them.
    """
    from harness.graph.streamed import together as swept

    made = plan_sweeps(models[0].stages, loads, subject.options.memory or DEFAULT)
    subject.watch = subject.watch or Watch()
    subject.say(made.describe(what))
    return [result for group in made.groups
            for result in swept(models, [calls[number] for number in group], lambda stage: give_back(), made.slots)]


def load_of(subject: Given, inputs: FrozenInputs, tokens: int) -> Load:
    """What a call over a prompt and so many tokens behind it takes."""
    return load(subject.geometry, inputs.length + tokens, 0 if inputs.patches is None else len(inputs.patches))


def for_all(subject: Given, what: str, model: Callable[[tuple[int, int]], Any], call: Callable[[str], T],
            cases: Sequence[str] | None = None) -> dict[str, T]:
    """call(case) for these cases, or for every one. model(grid): what the calls use."""
    names = list(subject.cases if cases is None else cases)
    held = [subject.recorded(name) for name in names]
    loads = [load_of(subject, one.inputs, len(one.rollout.tokens)) for one in held]
    grids = dict.fromkeys(subject.grid(name) for name in names)
    return dict(zip(names, together(subject, what, [model(grid) for grid in grids], loads,
                                    [lambda name=name: call(name) for name in names])))
