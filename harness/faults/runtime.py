"""Runtime and state: what an engine and its host keep, lose or leak from call to call and from request to request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from harness.faults import fault
from harness.faults.hands import wrap
from harness.faults.loop import Loop
from harness.graph.contract import NO_SHIFT

FIRST = "decoder.layers.00|kv.keys.00|kv.values.00"


def _decoding(loop: Loop) -> bool:
    return loop.calls >= -(-loop.subject.recorded(loop.name).inputs.length // loop.chunk)


@fault("engine", "engine", FIRST, source="P09")
def shift_leaks_into_the_next_prompt(loop: Loop) -> None:
    """the rope shift of the last image stays for the next text"""
    last = [(NO_SHIFT, 0)]

    def shift(plain):
        if loop.host.shift_start != NO_SHIFT:
            last[0] = plain()
        return last[0]

    wrap(loop, "shift", shift)


@fault("engine", "engine", FIRST, source="P09")
def shift_of_the_request_before(loop: Loop) -> None:
    """every request runs with the rope shift of the one before"""
    held = {"": (NO_SHIFT, 0)}

    def shift(plain):
        held[loop.name] = plain()
        return list(held.values())[-2]

    wrap(loop, "shift", shift)


@fault("engine", "engine", FIRST, source="P22")
def shift_only_in_the_first_chunk(loop: Loop) -> None:
    """the rope shift is computed from the first chunk, and later calls have none"""
    wrap(loop, "shift", lambda plain: plain() if loop.calls == 0 else (NO_SHIFT, 0))


@fault("engine", "engine", FIRST, source="P24")
def positions_restart_with_each_chunk(loop: Loop) -> None:
    """the second chunk is handed the positions of the first"""
    def ramp(plain, count):
        whole = plain(count)
        return np.concatenate([whole[:-count], whole[:count]]) if 0 < loop.length and count > 1 else whole

    wrap(loop, "ramp", ramp)


@fault("engine", "engine", FIRST, source="P09")
def stale_shift_while_decoding(loop: Loop) -> None:
    """decode steps run one position late"""
    wrap(loop, "shift", lambda plain: (0, 1 + plain()[1]) if _decoding(loop) else plain())


@fault("engine", "engine", FIRST, source="R12")
def cache_survives_the_conversation(loop: Loop) -> None:
    """the cache is not cleared, and every later call counts one stale slot"""
    def reset(plain, length):
        if loop.cache is None:
            plain(length)

    def shifted(plain, graph, ids):
        rows = plain(graph, ids)
        loop.cache[0][:, 0, :, loop.length:] = 0.5  # what an earlier prompt left behind this one's end
        return rows

    def ramp(plain, count):
        return plain(count + 1) if loop.calls else plain(count)

    wrap(loop, "reset", reset)
    wrap(loop, "step", shifted)
    wrap(loop, "ramp", ramp)


@fault("engine", "engine", FIRST, source="R12")
def cache_zeroed_between_calls(loop: Loop) -> None:
    """the state is reset behind every call"""
    wrap(loop, "after", lambda plain: [state.zero_() for state in loop.cache])


@fault("engine", "engine", FIRST, source="A09")
def writes_of_a_call_dropped(loop: Loop) -> None:
    """behind decode calls the state is what it was before"""
    held = []

    def step(plain, graph, ids):
        held[:] = [state.clone() for state in loop.cache]
        rows = plain(graph, ids)
        if len(ids) == 1:
            for state, old in zip(loop.cache, held):
                state.copy_(old)
        return rows

    wrap(loop, "step", step)


@fault("engine", "engine", "kv.keys.02|kv.values.02|decoder.layers.02", source="R09")
def one_slot_corrupt_late(loop: Loop) -> None:
    """one cache slot of one layer is overwritten at step 20"""
    def after(plain):
        if loop.length == loop.subject.recorded(loop.name).inputs.length + 20:
            loop.cache[0][2, 0, :, 3] = 1.0

    wrap(loop, "after", after)


@fault("engine", "engine", "vision.embed|decoder.embed", source="D10")
def first_image_answered_for_all(loop: Loop) -> None:
    """the vision tower is fed the first request's image for ever"""
    first = []

    def pixels(plain, inputs):
        if not first:
            first.append(plain(inputs).flip(0))
        return first[0] if first[0].shape == plain(inputs).shape else plain(inputs)

    wrap(loop, "pixels", pixels)


@fault("engine", "engine", "decoder.embed", source="D10")
def image_buffer_stale(loop: Loop) -> None:
    """the image buffer of the request before is still bound"""
    def bind(plain, graph, inputs):
        old = loop.image
        plain(graph, inputs)
        if old is not None and inputs.patches is not None and old.shape == loop.image.shape:
            loop.image = old

    wrap(loop, "bind", bind)


@fault("engine", "engine", "decoder.layers.00.deepstack", source="D10")
def deepstack_buffer_stale(loop: Loop) -> None:
    """the DeepStack buffer of the request before is still bound"""
    def bind(plain, graph, inputs):
        old = loop.deepstack
        plain(graph, inputs)
        if old is not None and inputs.patches is not None and old.shape == loop.deepstack.shape:
            loop.deepstack = old

    wrap(loop, "bind", bind)


@fault("engine", "engine", "decoder.layers.00.deepstack", source="D10")
def deepstack_lives_on_while_decoding(loop: Loop) -> None:
    """decode steps add the image's last row again"""
    def bend(plain, name, value):
        if name.endswith("00.deepstack") and value.shape[0] == 1 and loop.subject.cases[loop.name].images:
            return value + loop.deepstack[loop.graph(loop.subject.grid(loop.name)).slots - 1]
        return value

    wrap(loop, "bend", bend)


@fault("engine", "engine", "decoder.layers.01", source="R01")
def live_buffer_clobbered(loop: Loop) -> None:
    """garbage in one channel of an unrelated live tensor"""
    def bend(plain, name, value):
        if name == "decoder.layers.01" and loop.calls == 2:
            value = value.clone()
            value[0, 5] = 37.0
        return value

    wrap(loop, "bend", bend)


@fault("engine", "engine", "logits", source="R06")
def logits_read_with_another_stride(loop: Loop) -> None:
    """the host reads the logits one column off, as a row of another width would be"""
    wrap(loop, "read", lambda plain, logits: np.roll(plain(logits), 1, axis=1))


@fault("engine", "engine", "logits", source="R07")
def logits_of_the_call_before(loop: Loop) -> None:
    """the output buffer is read before the call has filled it"""
    held = []

    def read(plain, logits):
        held.append(logits.copy())
        return held[-2] if len(held) > 1 and held[-2].shape == logits.shape else logits

    wrap(loop, "read", read)


@fault("engine", "engine", "vision.layers.02", source="R04")
def one_block_on_another_unit(loop: Loop) -> None:
    """one vision block computed in 8-bit floats"""
    wrap(loop, "bend", lambda plain, name, value: value.to(torch.float8_e4m3fn).float()
         if name == "vision.layers.02" else value)


@fault("engine", "engine", "decoder.layers.00", source="R10")
def decode_entry_point_has_another_theta(loop: Loop) -> None:
    """the decode function was exported with another rope theta than prefill"""
    def step(plain, graph, ids):
        rope = graph.decoder.rope
        kept = rope.inv_freq
        if len(ids) == 1:
            rope.inv_freq = kept * 0.9
        rows = plain(graph, ids)
        rope.inv_freq = kept
        return rows

    wrap(loop, "step", step)


@fault("engine", "engine", "decoder.layers.02|kv.keys.02|kv.values.02", source="Q15")
def cache_quantized_by_the_first_token(loop: Loop) -> None:
    """an int8 cache whose scale was taken from the first token only"""
    def after(plain):
        for state in loop.cache:
            held = state[2, 0, :, :loop.length]
            scale = held[:, :1].abs().amax(-1, keepdim=True).clamp(min=1e-3) / 127
            state[2, 0, :, :loop.length] = (held / scale).round().clamp(-128, 127) * scale

    wrap(loop, "after", after)


@fault("engine", "engine", "decoder.embed", source="T07")
def pixels_never_passed(loop: Loop) -> None:
    """the image buffers stay zero: the host hands no picture over"""
    def bind(plain, graph, inputs):
        plain(graph, inputs)
        loop.image, loop.deepstack = torch.zeros_like(loop.image), torch.zeros_like(loop.deepstack)

    wrap(loop, "bind", bind)


@fault("engine", "engine", "decoder.embed")
def slots_counted_from_one(loop: Loop) -> None:
    """the host counts image slots from one"""
    def prepare(plain, ids, inputs):
        made = plain(ids, inputs)
        vocab, slots = loop.geometry.vocab, loop.graph(loop.subject.grid(loop.name)).slots
        return replace(made, ids=np.where(made.ids >= vocab, np.minimum(made.ids + 1, vocab + slots - 1), made.ids))

    wrap(loop, "prepare", prepare)


@fault("engine", "none", "none", equivalent=True, source="B04")
def other_chunks(loop: Loop) -> None:
    """prefill in calls of another length"""
    loop.chunk = 37


@fault("engine", "none", "none", equivalent=True, source="B15")
def cache_in_int8(loop: Loop) -> None:
    """an int8 cache with a scale for each head and token"""
    def after(plain):
        for state in loop.cache if not loop.wide else ():
            held = state[:, :, :, loop.length - 1:loop.length]
            scale = held.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
            state[:, :, :, loop.length - 1:loop.length] = (held / scale).round() * scale

    wrap(loop, "after", after)
