"""Runtime and state once more: one head, one slot, the second request, a chunk's edge, a late step, a short context."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from harness.faults import fault
from harness.faults.hands import wrap
from harness.faults.loop import Loop
from harness.graph.contract import NO_SHIFT

FIRST = "decoder.layers.00|kv.keys.00|kv.values.00"


def _prompt(loop: Loop) -> int:
    return loop.subject.recorded(loop.name).inputs.length


def _after(loop: Loop, change) -> None:
    def after(plain):
        plain()
        change()

    wrap(loop, "after", after)


@fault("engine", "engine", "decoder.layers.00|kv.keys.00|kv.values.00", source="A13")
def ring_of_200_slots(loop: Loop) -> None:
    """a ring of 200 slots: what comes past it lands on the oldest"""
    def change():
        for state in loop.cache:
            if loop.length > 200:
                state[:, :, :, loop.length - 201] = state[:, :, :, loop.length - 1]

    _after(loop, change)


@fault("engine", "engine", "kv.keys.03|decoder.layers.03", source="A09")
def one_key_head_not_written_while_decoding(loop: Loop) -> None:
    """decode steps leave one key head of the last layer unwritten"""
    def change():
        if loop.length > _prompt(loop):
            loop.cache[0][3, 0, 1, loop.length - 1] = 0

    _after(loop, change)


@fault("engine", "engine", "kv.values.01|decoder.layers.01", source="R12")
def third_call_lost(loop: Loop) -> None:
    """the values of the third call of one layer never reach the cache"""
    def change():
        if loop.calls == 3:
            loop.cache[1][1, 0, :, 2 * loop.chunk:loop.length] = 0

    _after(loop, change)


@fault("engine", "engine", FIRST, source="A04")
def last_prompt_slot_overwritten(loop: Loop) -> None:
    """decoding begins one slot early: the prompt's last key and value are overwritten"""
    def change():
        if loop.length == _prompt(loop):
            for state in loop.cache:
                state[:, :, :, loop.length - 1] = state[:, :, :, loop.length - 2]

    _after(loop, change)


@fault("engine", "engine", "decoder.embed|" + FIRST, source="T04")
def token_fed_one_step_late(loop: Loop) -> None:
    """decode steps are fed the token before"""
    held = []

    def step(plain, graph, ids):
        held.append(ids[-1:])
        return plain(graph, held[-2] if len(ids) == 1 and loop.length > _prompt(loop) else ids)

    wrap(loop, "step", step)


@fault("engine", "engine", "decoder.embed|" + FIRST, source="P24")
def chunk_repeats_its_predecessor(loop: Loop) -> None:
    """a later call begins with the last token of the call before"""
    held = []

    def step(plain, graph, ids):
        given = np.concatenate([held[-1][-1:], ids[:-1]]) if loop.calls and len(ids) > 1 else ids
        held.append(ids)
        return plain(graph, given)

    wrap(loop, "step", step)


@fault("engine", "engine", FIRST, source="P22")
def position_stands_still_late(loop: Loop) -> None:
    """from the tenth decode step on the rope position no longer advances"""
    def shift(plain):
        start, amount = plain()
        late = loop.length - _prompt(loop) - 10
        return (0, amount + late) if late > 0 else (start, amount)

    wrap(loop, "shift", shift)


@fault("engine", "engine", FIRST, source="P09")
def shift_start_of_the_request_before(loop: Loop) -> None:
    """the shift begins where the image of the request before ended"""
    starts = [NO_SHIFT]

    def prepare(plain, ids, inputs):
        made = plain(ids, inputs)
        starts.append(made.shift_start)
        return replace(made, shift_start=starts[-2]) if made.shift_start != NO_SHIFT else made

    wrap(loop, "prepare", prepare)


@fault("engine", "engine", FIRST, source="P09")
def shift_lost_after_the_first_image(loop: Loop) -> None:
    """only the first request with an image is given its rope shift"""
    seen = []

    def prepare(plain, ids, inputs):
        made = plain(ids, inputs)
        if made.shift_start == NO_SHIFT:
            return made
        seen.append(loop.name)
        return made if len(seen) == 1 else replace(made, shift_start=NO_SHIFT, shift_amount=0)

    wrap(loop, "prepare", prepare)


@fault("engine", "engine", "decoder.layers.00.deepstack", source="D10")
def deepstack_added_up(loop: Loop) -> None:
    """the DeepStack buffer is added to, not overwritten, by the next image"""
    def bind(plain, graph, inputs):
        old = loop.deepstack
        plain(graph, inputs)
        if old is not None and inputs.patches is not None and old.shape == loop.deepstack.shape:
            loop.deepstack = loop.deepstack + 0.25 * old

    wrap(loop, "bind", bind)


@fault("engine", "engine", "decoder.layers.01.deepstack", source="D13")
def middle_tap_not_bound(loop: Loop) -> None:
    """the middle third of the DeepStack buffer stays zero"""
    def bind(plain, graph, inputs):
        plain(graph, inputs)
        slots = len(loop.deepstack) // 3
        loop.deepstack = loop.deepstack.clone()
        loop.deepstack[slots:2 * slots] = 0

    wrap(loop, "bind", bind)


@fault("engine", "engine", "decoder.embed", source="V10")
def second_half_of_the_image_lost(loop: Loop) -> None:
    """the last slots of the image buffer are not transferred"""
    def bind(plain, graph, inputs):
        plain(graph, inputs)
        loop.image = loop.image.clone()
        loop.image[-4:] = 0

    wrap(loop, "bind", bind)


@fault("engine", "engine", "vision.embed", source="O04")
def patches_handed_over_in_bfloat16(loop: Loop) -> None:
    """the host hands patches over in bfloat16"""
    wrap(loop, "pixels", lambda plain, inputs: plain(inputs).bfloat16().float())


@fault("engine", "engine", "logits", source="R06")
def vocabulary_cut_short(loop: Loop) -> None:
    """the host reads 500 logits and fills the rest with zero"""
    wrap(loop, "read", lambda plain, logits: np.where(np.arange(logits.shape[1]) < 500, plain(logits), 0))


@fault("engine", "engine", "logits", source="R07")
def first_decode_logits_stale(loop: Loop) -> None:
    """the first decode step answers with the logits of the prompt's last token"""
    held = []

    def read(plain, logits):
        held.append(plain(logits).copy())
        return held[-2][-1:] if loop.length == _prompt(loop) + 1 else held[-1]

    wrap(loop, "read", read)


@fault("engine", "engine", "logits", source="R07")
def rows_of_a_call_reversed(loop: Loop) -> None:
    """logits of a call with several tokens come out last row first"""
    wrap(loop, "read", lambda plain, logits: plain(logits)[::-1].copy())


@fault("engine", "engine", "logits", source="R09")
def last_step_fails(loop: Loop) -> None:
    """the last decode step's logits are those of one step before"""
    held = []

    def read(plain, logits):
        held.append(plain(logits).copy())
        return held[-2] if loop.length == _prompt(loop) + 24 else held[-1]

    wrap(loop, "read", read)


@fault("engine", "engine", "kv.keys.02|kv.values.02|decoder.layers.02", source="Q15")
def cache_in_eight_bit_floats(loop: Loop) -> None:
    """one layer's cache holds 8-bit floats"""
    def change():
        for state in loop.cache:
            state[2, 0, :, :loop.length] = state[2, 0, :, :loop.length].to(torch.float8_e4m3fn).float()

    _after(loop, change)


@fault("engine", "engine", FIRST, source="R12")
def slot_of_another_request(loop: Loop) -> None:
    """one slot of the first layer holds what the request before left there"""
    old = []

    def reset(plain, length):
        old[:] = [loop.cache[0][0, 0, :, 30].clone()] if loop.cache else []
        plain(length)

    def change():
        if old and loop.length > 30:
            loop.cache[0][0, 0, :, 30] = old[0]

    wrap(loop, "reset", reset)
    _after(loop, change)


@fault("engine", "engine", FIRST, source="R10")
def context_of_256(loop: Loop) -> None:
    """what comes past 256 tokens is written into the last slot"""
    def change():
        for state in loop.cache:
            if loop.length > 256:
                state[:, :, :, 255] = state[:, :, :, loop.length - 1]

    _after(loop, change)


@fault("engine", "engine", "decoder.layers.01", source="R10")
def decode_entry_point_scales_otherwise(loop: Loop) -> None:
    """the decode function was exported with another attention scale in one layer"""
    def step(plain, graph, ids):
        attention = graph.decoder.layers[1].self_attn
        kept = attention.scale
        attention.scale = kept * (1.05 if len(ids) == 1 else 1)
        rows = plain(graph, ids)
        attention.scale = kept
        return rows

    wrap(loop, "step", step)


@fault("engine", "engine", "decoder.layers.02", source="R01")
def one_token_of_one_layer_stale(loop: Loop) -> None:
    """one layer's output buffer keeps one token of the call before"""
    held = []

    def bend(plain, name, value):
        value = plain(name, value)
        if name == "decoder.layers.02":
            value = value.clone()
            if held and len(value) > 1:
                value[1] = held[-1]
            held[:] = [value[-1].clone()]
        return value

    wrap(loop, "bend", bend)
