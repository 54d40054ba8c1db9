"""Attention: scale, mask, softmax, grouping of heads, and the KV cache it reads."""

from __future__ import annotations

import torch

from harness.faults import fault
from harness.faults.hands import bend_attention, bend_decoder, wrap
from harness.graph.reference import Reference

CONTEXT = "attn.context"


@fault("graph", "contract", "decoder.layers.00", CONTEXT, source="A01")
def mask_by_rope_position(graph: Reference) -> None:
    """the causal mask made from rope positions: tokens of an image row see each other's future"""
    decoder, seen_before = bend_decoder(graph), []

    def seen(planes, place, total):
        if total == len(place):
            seen_before.clear()
        seen_before.append(planes[0])
        past = torch.cat(seen_before)
        return past[None, -total:] <= planes[0][:, None]

    decoder.seen = seen


@fault("graph", "contract", "decoder.layers.00", CONTEXT)
def mask_lets_one_future_token(graph: Reference) -> None:
    """every query also sees the key after its own"""
    decoder = bend_decoder(graph)
    plain = decoder.seen
    decoder.seen = lambda planes, place, total: plain(planes, place + 1, total)


@fault("graph", "contract", "decoder.layers.00", CONTEXT)
def mask_open_inside_the_image(graph: Reference) -> None:
    """image tokens attend to one another in both directions"""
    decoder = bend_decoder(graph)
    wrap(decoder, "seen", lambda plain, planes, place, total: plain(planes, place, total) | (
        (planes[1] != planes[0]) | (planes[2] != planes[0]))[:, None] & (
        torch.arange(total)[None] <= place.max()) & (torch.arange(total)[None] >= place.min()))


@fault("graph", "contract", "decoder.layers.00", CONTEXT, source="A03")
def no_mask_in_later_chunks(graph: Reference) -> None:
    """no mask where a cache exists and more than one token comes"""
    decoder = bend_decoder(graph)
    wrap(decoder, "seen", lambda plain, planes, place, total: torch.ones(len(place), total, dtype=torch.bool)
         if 1 < len(place) < total else plain(planes, place, total))


@fault("graph", "decode", "kv.keys.01", source="A04")
def key_written_one_slot_late(graph: Reference) -> None:
    """a decode step writes its key one slot off, and a hole is left"""
    _late_write(graph.decoder.layers[1].self_attn, "keys")


@fault("graph", "decode", "kv.values.02", source="A04")
def value_written_one_slot_late(graph: Reference) -> None:
    """a decode step writes its value one slot off, and a hole is left"""
    _late_write(graph.decoder.layers[2].self_attn, "values")


def _late_write(attention, which: str) -> None:
    plain, calls = attention.remember, [0]

    def remember(state, new, visible):
        calls[0] += 1
        if new.shape[2] > 1 or (calls[0] % 2 == 1) != (which == "keys"):
            return plain(state, new, visible)
        total = visible.shape[1]
        slot = min(total, state.shape[3] - 1)
        state[attention.layer, :, :, slot] = new[:, :, 0]
        return state[attention.layer, :, :, :total].repeat_interleave(attention.groups, dim=1)

    attention.remember = remember


@fault("graph", "decode", "kv.keys.00", source="A06")
def prefill_remembers_one_token(graph: Reference) -> None:
    """prefill writes only the first token's key and value; attention reads fresh ones"""
    for layer in graph.decoder.layers:
        wrap(layer.self_attn, "remember", _first_only)


def _first_only(plain, state, new, visible):
    kept, read = state.clone(), plain(state, new, visible)
    if new.shape[2] > 1:
        start = visible.shape[1] - new.shape[2]
        state[..., start + 1:visible.shape[1], :] = kept[..., start + 1:visible.shape[1], :]
    return read


@fault("graph", "decode", "kv.keys.00|kv.values.00", source="A09")
def decode_never_writes(graph: Reference) -> None:
    """single-step writes of the cache are dropped: the state's mutation is not in the program"""
    for layer in graph.decoder.layers:
        wrap(layer.self_attn, "remember", _drop_single)


@fault("graph", "decode", "kv.keys.03|kv.values.03", source="A10")
def last_layer_never_writes(graph: Reference) -> None:
    """the last layer's single-step writes are dropped"""
    wrap(graph.decoder.layers[3].self_attn, "remember", _drop_single)


def _drop_single(plain, state, new, visible):
    kept, read = state.clone(), plain(state, new, visible)
    if new.shape[2] == 1:
        state.copy_(kept)
    return read


@fault("graph", "decode", "kv.keys.01", source="A12")
def keys_cached_before_rope(graph: Reference) -> None:
    """the cache of one layer holds keys before rotation"""
    attention = bend_attention(graph, 1)
    plain, turn, turned = attention.recall, attention.turn, []

    def remember_turn(x, cos, sin):
        turned.append((cos, sin))
        return turn(x, cos, sin)

    def recall(cache, k, v, visible):
        cos, sin = (part.transpose(1, 2) for part in turned[-1])
        turned.clear()
        read = plain(cache, k, v, visible)
        start = visible.shape[1] - k.shape[2]
        cache[0][attention.layer, :, :, start:visible.shape[1]] = turn(k, cos, -sin)
        return read

    attention.turn, attention.recall = remember_turn, recall


@fault("graph", "decode", "kv.keys.02|kv.values.02", source="A12")
def keys_and_values_exchanged_in_cache(graph: Reference) -> None:
    """one layer's keys and values leave in each other's cache"""
    attention = bend_attention(graph, 2)
    wrap(attention, "recall", lambda plain, cache, k, v, visible: plain((cache[1], cache[0]), k, v, visible))


@fault("graph", "contract", "decoder.layers.00", CONTEXT, source="A13")
def window_of_128(graph: Reference) -> None:
    """queries see the last 128 keys only"""
    decoder = bend_decoder(graph)
    wrap(decoder, "seen", lambda plain, planes, place, total: plain(planes, place, total) & (
        place[:, None] - torch.arange(total)[None] < 128))


@fault("graph", "contract", "decoder.layers.00", CONTEXT, source="A13")
def oldest_key_forgotten(graph: Reference) -> None:
    """from 256 tokens on the first key is no longer seen: a ring that wraps one early"""
    decoder = bend_decoder(graph)
    wrap(decoder, "seen", lambda plain, planes, place, total: plain(planes, place, total) & (
        (torch.arange(total)[None] > 0) | (place[:, None] < 256)))


@fault("graph", "contract", "decoder.layers.02", CONTEXT, source="A15")
def scale_a_tenth_too_large(graph: Reference) -> None:
    """one layer's attention scale times 1.1"""
    graph.decoder.layers[2].self_attn.scale *= 1.1


@fault("graph", "contract", "decoder.layers.00", CONTEXT, source="A15")
def scale_slightly_small(graph: Reference) -> None:
    """every attention scale times 0.987"""
    for layer in graph.decoder.layers:
        layer.self_attn.scale *= 0.987


@fault("graph", "contract", "vision.layers.01", CONTEXT, source="A15")
def vision_scale_by_heads(graph: Reference) -> None:
    """one vision block divides by the root of the number of heads"""
    graph.vision.blocks[1].attn.scale = graph.geometry.vision_heads**-0.5


@fault("graph", "contract", "vision.layers.00", CONTEXT, source="A16")
def vision_attends_in_halves(graph: Reference) -> None:
    """vision attention is blocked by wrong lengths: the image falls in two"""
    for block in graph.vision.blocks:
        wrap(block.attn, "attend", lambda plain, q, k, v: torch.cat([
            plain(*parts) for parts in zip(*(part.tensor_split(2, dim=1) for part in (q, k, v)))], dim=1))


@fault("graph", "contract", "decoder.layers.01", CONTEXT, source="A18")
def padding_attended(graph: Reference) -> None:
    """four zero keys of padding are attended in one layer"""
    def attend(plain, q, keys, values, visible):
        pad = keys.new_zeros(1, keys.shape[1], 4, keys.shape[3])
        seen = torch.cat([visible, visible.new_ones(len(visible), 4)], dim=1)
        return plain(q, torch.cat([keys, pad], 2), torch.cat([values, pad], 2), seen)

    wrap(graph.decoder.layers[1].self_attn, "attend", attend)


@fault("graph", "contract", "decoder.layers.03", CONTEXT)
def groups_interleaved(graph: Reference) -> None:
    """query heads share key-value heads in turn instead of in groups, in one layer"""
    attention = graph.decoder.layers[3].self_attn

    def around(plain, state, new, visible):
        plain(state, new, visible)
        return state[attention.layer, :, :, :visible.shape[1]].repeat(1, attention.groups, 1, 1)

    wrap(attention, "remember", around)


@fault("graph", "contract", "decoder.layers.02", CONTEXT, source="A22")
def softmax_fails_past_4032_keys(graph: Reference) -> None:
    """softmax over more than 4032 keys loses its tail"""
    def attend(plain, q, keys, values, visible):
        return plain(q, keys[:, :, -4032:], values[:, :, -4032:], visible[:, -4032:])

    wrap(graph.decoder.layers[2].self_attn, "attend", attend)


@fault("graph", "contract", "decoder.layers.01", CONTEXT)
def softmax_in_half(graph: Reference) -> None:
    """softmax and its sums in fp16, in one layer"""
    attention = graph.decoder.layers[1].self_attn

    def attend(q, keys, values, visible):
        scores = (q @ keys.transpose(2, 3) * attention.scale).masked_fill(~visible, -1e4)
        return scores.half().softmax(-1).to(q.dtype) @ values

    attention.attend = attend


@fault("graph", "contract", "decoder.layers.02|calls.repeated", CONTEXT, source="A07")
def long_calls_differ_from_run_to_run(graph: Reference) -> None:
    """attention over more than 16 queries gives other numbers each time"""
    generator = torch.Generator().manual_seed(1)
    wrap(graph.decoder.layers[2].self_attn, "attend", lambda plain, q, *rest: plain(q, *rest) if q.shape[2] <= 16 else
         plain(q, *rest) * (1 + 1e-3 * torch.randn(1, generator=generator)))


@fault("graph", "none", "none", equivalent=True, source="B06")
def scale_folded_into_query(graph: Reference) -> None:
    """the scale multiplied into q instead of the scores"""
    attention = graph.decoder.layers[1].self_attn
    scale, attention.scale = attention.scale, 1.0
    wrap(attention, "attend", lambda plain, q, *rest: plain(q * scale, *rest))
