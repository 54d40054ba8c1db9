"""A decoder's program as one conversation: tokens in, logits and tapped values out, the cache in between.

A program of one token a call runs in layer-major order where its structure allows it: many tokens a pass, each weight
dequantized once for all of them. A program of any count takes chunks; one of a fixed count (a prefill function) takes
full chunks and leaves the rest to the one beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.engines.replay.compile import Compiled, Constants, compiled, new_states
from harness.engines.replay.contract import STATES, Layout, layout
from harness.engines.replay.plan import Kind
from harness.engines.replay.program import Function, Value
from harness.engines.replay.recorded import Recorded
from harness.errors import HarnessError

STEPS = {"input_ids": Kind.STACKED, "position_ids": Kind.LISTED}
ORDERS = ("layers", "steps")
NEAR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a recorded call may be from a plain one, relative to the largest logit: they sum over other lengths."""


class Decoder:
    """A compiled decoder. order: `layers` or `steps`, for a program of one token a call; taps: seam -> value.

    record: replay a recorded call for single tokens, which a GPU can (see `recorded`); fuse: see `fusing`.
    """

    def __init__(self, function: Function, constants: Constants, taps: Mapping[str, Value], order: str = "layers", *,
                 record: bool = False, fuse: bool = False) -> None:
        self.function, self.constants, self.taps, self.order = function, constants, taps, order
        self.layout: Layout = layout(function)
        self.record, self.fuse = record and self.layout.tokens == 1, fuse
        self._compiled: dict[str, Compiled] = {}

    def step(self, tapped: bool = False) -> Compiled:
        """One call of the program as it stands."""
        return self._get(f"step {tapped}", taps=self.taps if tapped else None)

    def layers(self, tapped: bool = False) -> Compiled:
        """Many calls in layer-major order. Raises HarnessError where the structure does not allow it."""
        return self._get(f"layers {tapped}", steps=STEPS, taps=self.taps if tapped else None)

    def padded(self) -> Compiled:
        """One call whose shapes are the same for many lengths. Raises HarnessError where the structure is another."""
        return self._get("padded", padded=True)

    def _get(self, key: str, **settings: Any) -> Compiled:
        if key not in self._compiled:
            self._compiled[key] = compiled(self.function, self.constants, fuse=self.fuse, **settings)
        return self._compiled[key]


class Conversation:
    """A cache and the count of tokens in it. fixed: the inputs besides ids and positions, as tensors.

    prefill: a function of a fixed count of tokens beside the decoder's, which takes full chunks of that count.
    """

    def __init__(self, decoder: Decoder, fixed: Mapping[str, Tensor], context: int | None,
                 prefill: Decoder | None = None) -> None:
        self.decoder, self.prefill, self.length, self.calls = decoder, prefill, 0, 0
        names = {value.name for value in decoder.function.inputs}
        if "image_embeds" in fixed and "image_embeds" not in names:
            raise HarnessError("the request has an image, but the decoder has no input image_embeds",
                               fix="run its text cases only")
        self.context = decoder.layout.context or context
        if self.context is None:
            raise HarnessError("leaves the length of its cache open", fix="give the context of the bundle's metadata")
        constants = decoder.constants
        self.states = new_states(decoder.function, constants, dict.fromkeys(STATES, self.context))
        held = {value.name: constants.arithmetic.held(value.dtype) for value in decoder.function.inputs}
        self._recorded: Recorded | None = None
        self.fixed = {name: fixed[name].to(constants.device, held[name]) if name in fixed else
                      torch.zeros(_shape(value), dtype=held[name], device=constants.device)
                      for value in decoder.function.inputs if (name := value.name) not in STEPS}

    def feed(self, ids: np.ndarray, tapped: bool = False, chunk: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [S, V] and tapped values [S, ...] of ids [S]; chunk: tokens a call or a pass takes at most.

        Raises HarnessError where the cache would be too short.
        """
        full = self.prefill.layout.tokens if self.prefill and not tapped else None
        if full and len(ids) >= full:
            cut = len(ids) - len(ids) % full
            parts = [self._single(self.prefill, ids[start:start + full])[0] for start in range(0, cut, full)]
            rest = [self.feed(ids[cut:], chunk=chunk)[0]] if cut < len(ids) else []
            return torch.cat([*parts, *rest]), {}
        if self.length + len(ids) > self.context:
            raise HarnessError(f"{self.length + len(ids)} tokens are fed, the cache has {self.context} slots")
        per_call = self.decoder.layout.tokens
        stacked = per_call == 1 and self.decoder.order == "layers" and len(ids) > 1
        size = (chunk or len(ids)) if stacked or per_call is None else per_call
        if len(ids) % size and per_call not in (1, None):
            raise HarnessError(f"{len(ids)} tokens are no multiple of the {size} that a call takes")
        parts = [self._call(ids[start:start + size], stacked, tapped) for start in range(0, len(ids), size)]
        taps = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
        return torch.cat([part[0] for part in parts]), taps

    def _call(self, ids: np.ndarray, stacked: bool, tapped: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if self.decoder.record and not stacked and not tapped:
            return self._replayed(int(ids[0])), {}
        if not stacked:
            return self._single(self.decoder, ids, tapped)
        given, ramp, run = *self._given(ids), self.decoder.layers(tapped)
        places: Any = [ramp[:, :total] for total in range(self.length - len(ids) + 1, self.length + 1)]
        outputs, taps = run(self.states, input_ids=given[:, None, None], position_ids=places, **self.fixed)
        return outputs["logits"][:, 0, -1], {name: _rows(value, len(ids)) for name, value in taps.items()}

    def _single(self, decoder: Decoder, ids: np.ndarray, tapped: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """One call of a program as it stands."""
        given, ramp = self._given(ids)
        outputs, taps = decoder.step(tapped)(self.states, input_ids=given[None], position_ids=ramp, **self.fixed)
        return outputs["logits"][0], {name: _rows(value, len(ids)) for name, value in taps.items()}

    def _given(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """The ids, and the ramp of all places up to them, which are taken from now on."""
        self.length, self.calls = self.length + len(ids), self.calls + 1
        if self.length > self.context:
            raise HarnessError(f"{self.length} tokens are fed, the cache has {self.context} slots")
        device = self.decoder.constants.device
        return (torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int32)).to(device),
                torch.arange(self.length, dtype=torch.int32, device=device)[None])

    def _replayed(self, token: int) -> Tensor:
        """A single token by a recorded call. The first one is computed both ways: Raises HarnessError where they differ."""
        place, self.length, self.calls = self.length, self.length + 1, self.calls + 1
        first = self._recorded is None
        if first:
            self._recorded = Recorded(self.decoder.padded(), self.states, self.fixed, self.context)
        given = torch.tensor([[token]], dtype=torch.int32, device=self.decoder.constants.device)
        logits = self._recorded.call(given, place).clone()
        if first:
            ramp = torch.arange(self.length, dtype=torch.int32, device=given.device)[None]
            plain = self.decoder.step()(self.states, input_ids=given, position_ids=ramp, **self.fixed)[0]["logits"][0]
            apart = (plain.float() - logits.float()).abs().max() / plain.float().abs().max()
            if not apart <= NEAR[plain.dtype]:
                raise HarnessError(f"a recorded call differs from a plain one by {float(apart):.2g} of the largest logit")
        return logits

    def kv(self) -> dict[str, Tensor]:
        """`kv.keys` and `kv.values` [L, kv_heads, T, head_dim], as they are held."""
        return {f"kv.{part}": self.states[name][:, 0, :, :self.length]
                for part, name in zip(("keys", "values"), STATES)}


def _rows(value: Tensor, tokens: int) -> Tensor:
    """[tokens, everything else], copied: later calls may write where the value lies."""
    return value.reshape(tokens, -1).clone()


def _shape(value: Value) -> tuple[int, ...]:
    if None in value.shape:
        raise HarnessError(f"input {value.name} leaves its length open")
    return tuple(size for size in value.shape if size is not None)
