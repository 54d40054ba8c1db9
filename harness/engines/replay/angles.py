"""The position arithmetic of a shipped decoder, evaluated by itself: what it turns queries and keys by, for any tokens.

The part of the program between its inputs and the cosine is cut out and run alone, so every place of the context and every
slot of the image can be tried in moments.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from harness.engines.replay.arithmetic import Fp32
from harness.engines.replay.compile import Compiled, Constants, compiled
from harness.engines.replay.decoder import STEPS
from harness.engines.replay.flow import Flow
from harness.engines.replay.program import Function, Value
from harness.errors import HarnessError


class Angles:
    """Of a decoder; slots: rows of its image, context: slots of its cache, None where left open. Raises HarnessError where its program shows no such part, or one that rests on more than ids, places
    and the shift."""

    def __init__(self, function: Function) -> None:
        flow = Flow(function)
        value = _angles(flow)
        self.slots = next((one.shape[0] for one in function.inputs if one.name == "image_embeds"), 0)
        self.context = next(one for one in function.states if one.name == "keyCache").shape[3]
        inputs = tuple(one for one in function.inputs if one.name in flow.of(value))
        strange = flow.of(value) - {one.name for one in function.inputs}
        if strange or "position_ids" not in {one.name for one in inputs}:
            raise HarnessError(f"its angles rest on {', '.join(sorted(strange)) or 'no position'}", where=function.name)
        self._names = {one.name for one in inputs}
        ids = next(one for one in function.inputs if one.name == "input_ids")
        self._single = ids.shape[1] == 1
        if ids.shape[1] not in (1, None):
            raise HarnessError(f"takes {ids.shape[1]} tokens a call", where=function.name)
        part = replace(function, inputs=inputs, outputs={"angles": value}, states=(),
                       nodes=tuple(flow.between(value, frozenset())))
        steps = {name: kind for name, kind in STEPS.items() if name in self._names}
        self._run: Compiled = compiled(part, Constants(Fp32()), steps=steps if self._single else None)

    def of(self, ids: np.ndarray, shift_start: int, shift_amount: int) -> np.ndarray:
        """ids [S] int32, extension ids of one conversation -> angles [S, lanes] float32."""
        places = torch.arange(len(ids), dtype=torch.int32)[None]
        given = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int32))
        values = {"input_ids": given[:, None, None] if self._single else given[None],
                  "position_ids": [places[:, :total + 1] for total in range(len(ids))] if self._single else places,
                  "rope_shift_start": torch.tensor([shift_start], dtype=torch.int32),
                  "rope_shift_amount": torch.tensor([shift_amount], dtype=torch.int32)}
        outputs, _ = self._run({}, **{name: value for name, value in values.items() if name in self._names})
        found = outputs["angles"]
        return (torch.stack(found) if isinstance(found, list) else found).reshape(len(ids), -1).numpy()


def _angles(flow: Flow) -> Value:
    """What both the cosine and the sine are taken of."""
    taken = {op: [node for node in flow.function.nodes if node.op == op] for op in ("cos", "sin")}
    if any(len(nodes) != 1 for nodes in taken.values()):
        raise HarnessError("shows no single cosine and sine", where=flow.function.name)
    cosine, sine = (flow.source(nodes[0].operands[0]) for nodes in taken.values())
    if cosine.id != sine.id:
        raise HarnessError("takes cosine and sine of different values", where=flow.function.name)
    return cosine
