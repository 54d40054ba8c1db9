"""A function of a program -> a Python function: text, then code, with its constants on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.engines.replay import runtime
from harness.engines.replay.arithmetic import Arithmetic
from harness.engines.replay.padding import check_padding
from harness.engines.replay.plan import Kind, Plan, plan
from harness.engines.replay.program import Function, Value
from harness.engines.replay.source import Label, Writer
from harness.engines.replay.weights import Weight, linear, tensor


@dataclass
class Compiled:
    """source: the text. Calling it runs the function: (outputs, taps) by name; states are changed in place.

    In layer-major order, inputs named in `steps` carry a row (or a list entry) a step, and so does all that comes back.
    """

    function: Function
    source: str
    arithmetic: Arithmetic
    device: str
    _main: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]] = field(repr=False)
    _stored: Mapping[int, Tensor] = field(repr=False)
    _wide: Mapping[int, Any] = field(repr=False)

    def __call__(self, states: Mapping[str, Tensor], **inputs: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with torch.no_grad():
            return self._main(self.arithmetic, self._stored, self._wide, states, self.device, **inputs)


class Constants:
    """Constants of a program on one device, shared by all functions compiled from it: R and W of the source.

    dense: hold every matrix as computed with, which takes 2 or 4 bytes a weight; else codes stay as they are stored and
    are dequantized where they are used.
    """

    def __init__(self, arithmetic: Arithmetic, device: str = "cpu", *, dense: bool = False) -> None:
        self.arithmetic, self.device, self.dense = arithmetic, device, dense
        self._tensors: dict[int, Tensor] = {}
        self._tables: dict[tuple[int, ...], Weight] = {}

    def stored(self, value: Value) -> Tensor:
        """As the file holds it."""
        key = id(value.constant)
        if key not in self._tensors:
            self._tensors[key] = tensor(value.constant, self.device)
        return self._tensors[key]

    def table(self, data: Value, companions: tuple[Value, ...], casts: tuple[str, ...]) -> Weight:
        """A matrix that products take."""
        key = (id(data.constant), hash(casts))
        if key not in self._tables:
            coded = bool(companions or casts)
            held = (lambda value: tensor(value.constant, self.device)) if self.dense and coded else self.stored
            parts = [None if value.constant.fill == 0 else held(value) for value in companions]
            weight = Weight(held(data), *parts, casts=casts)
            self._tables[key] = weight.hold(self.arithmetic) if self.dense else weight
        return self._tables[key]


def new_states(function: Function, constants: Constants, lengths: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Zeroed states; `lengths`: slots of a state whose length is left open, by its name."""
    shapes = {value.name: [(lengths or {})[value.name] if size is None else size for size in value.shape]
              for value in function.states}
    return {value.name: torch.zeros(shapes[value.name], dtype=constants.arithmetic.held(value.dtype),
                                    device=constants.device) for value in function.states}


def compiled(function: Function, constants: Constants, *, steps: Mapping[str, Kind] | None = None,
             taps: Mapping[str, Value] | None = None, label: Label = lambda node: "", padded: bool = False,
             fuse: bool = False) -> Compiled:
    """Compile a function. Raises HarnessError for what no rule covers, and for `steps` that its structure does not allow.

    taps: name -> value to hand out besides the outputs. padded: the cache is read up to the length of `position_ids`, the
    newest token's place is given as `newest` [1] int64 on the device; see `padding`. fuse: norms as one
    kernel each; see `fusing`.
    """
    taps = taps or {}
    made = plan(function, steps, [value.id for value in taps.values()], fuse=fuse)
    if padded:
        check_padding(made)
    writer = Writer(made, taps, label, padded=padded)
    source = writer.write()
    scope: dict[str, Any] = {"torch": torch, "np": np, "linear": linear,
                             **{name: getattr(runtime, name) for name in runtime.NAMES}}
    exec(compile(source, f"<{function.name}>", "exec"), scope)  # text that `source` wrote; no word of it is the bundle's
    stored, wide = _held(made, writer, constants)
    with torch.no_grad():
        scope["load"](constants.arithmetic, stored, wide, constants.device)
    return Compiled(function, source, constants.arithmetic, constants.device, scope["main"], stored, wide)


def _held(made: Plan, writer: Writer, constants: Constants) -> tuple[dict[int, Tensor], dict[int, Any]]:
    stored = {number: constants.stored(value) for number, value in writer.stored_constants.items()}
    wide: dict[int, Any] = {number: constants.arithmetic.widen(constants.stored(value))
                            for number, value in writer.wide_constants.items()}
    wide |= {number: constants.table(table.data, table.companions, table.casts) for number, table in made.tables.items()}
    return stored, wide
