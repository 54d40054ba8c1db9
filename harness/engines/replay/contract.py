"""The port's contract, asked of a program: which inputs, states and outputs a decoder and a vision tower have."""

from __future__ import annotations

from dataclasses import dataclass

from harness.engines.replay.program import Function, Value
from harness.errors import HarnessError

DECODER_INPUTS = ("input_ids", "position_ids", "image_embeds", "deepstack_embeds", "rope_shift_start",
                  "rope_shift_amount")
OPTIONAL = frozenset(DECODER_INPUTS[2:])
STATES = ("keyCache", "valueCache")
EMBEDS = ("image_embeds", "deepstack_embeds")


@dataclass(frozen=True)
class Layout:
    """tokens: how many a call takes, None for any count. context: slots of the cache, None where left open. slots: image
    rows, 0 where the decoder takes no image."""

    vocab: int
    layers: int
    context: int | None
    tokens: int | None
    slots: int
    dtype: str


def layout(function: Function) -> Layout:
    """Of a decoder. Raises HarnessError for another contract, naming what was found."""
    inputs = {value.name: value for value in function.inputs}
    states = {value.name: value for value in function.states}
    _expect("inputs", inputs, DECODER_INPUTS, OPTIONAL)
    _expect("states", states, STATES)
    _expect("outputs", dict(function.outputs), ("logits",))
    cache, ids = states["keyCache"].shape, inputs["input_ids"].shape
    if len(cache) != 5 or cache[1] != 1 or cache != states["valueCache"].shape:
        raise HarnessError(f"keyCache has shape {list(cache)}; the contract asks for "
                           "[layers, 1, kv_heads, context, head_dim]", where=function.name)
    if len(ids) != 2 or ids[0] != 1:
        raise HarnessError(f"input_ids has shape {list(ids)}; the contract asks for [1, tokens]", where=function.name)
    slots = inputs["image_embeds"].shape[0] if "image_embeds" in inputs else 0
    return Layout(function.outputs["logits"].shape[-1], cache[0], cache[3], ids[1], slots, states["keyCache"].dtype)


def check_vision(function: Function) -> None:
    """Raises HarnessError where it is no vision tower of the contract."""
    _expect("inputs", {value.name: value for value in function.inputs}, ("patches",))
    _expect("states", {value.name: value for value in function.states}, ())
    _expect("outputs", dict(function.outputs), EMBEDS)


def _expect(what: str, found: dict[str, Value], known: tuple[str, ...], optional: frozenset[str] = frozenset()) -> None:
    if not set(known) - optional <= set(found) or not set(found) <= set(known):
        listed = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in found.items()) or "none"
        raise HarnessError(f"its {what} are {listed}; the contract asks for {', '.join(known) or 'none'}",
                           fix="replay runs bundles of the Qwen3-VL port's contract")
