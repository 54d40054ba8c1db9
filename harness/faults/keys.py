"""Attention once more: who sees which key, one head, one tile, one entry point, and where a cache entry lands."""

from __future__ import annotations

import torch

from harness.faults import fault
from harness.faults.hands import bend_attention, bend_decoder, wrap
from harness.graph.reference import Reference

CONTEXT = "attn.context"


def _scores(attention, q, keys):
    return q @ keys.transpose(2, 3) * attention.scale


@fault("graph", "contract", "decoder.layers.00", CONTEXT, source="A01")
def mask_is_strict(graph: Reference) -> None:
    """no token but the first sees its own key"""
    decoder = bend_decoder(graph)
    wrap(decoder, "seen", lambda plain, planes, place, total: plain(planes, (place - 1).clamp(min=0), total))


@fault("graph", "contract", "decoder.layers.02", CONTEXT)
def last_query_blind_to_itself(graph: Reference) -> None:
    """the last query of a call does not see its own key, in one layer"""
    def attend(plain, q, keys, values, visible):
        seen = visible.clone()
        seen[-1, -1] = seen.shape[1] == 1
        return plain(q, keys, values, seen)

    wrap(graph.decoder.layers[2].self_attn, "attend", attend)


@fault("graph", "contract", "decoder.layers.03", CONTEXT, source="A13")
def window_of_256_in_one_layer(graph: Reference) -> None:
    """the last layer attends to 256 keys only"""
    _window(graph.decoder.layers[3].self_attn, 256)


@fault("graph", "contract|decode", "decoder.layers.01", CONTEXT, source="A13")
def window_of_200_while_decoding(graph: Reference) -> None:
    """calls of one token see the last 200 keys, in one layer"""
    _window(graph.decoder.layers[1].self_attn, 200, only_single=True)


def _window(attention, size: int, only_single: bool = False) -> None:
    def attend(plain, q, keys, values, visible):
        if only_single and q.shape[2] > 1:
            return plain(q, keys, values, visible)
        last = visible.shape[1] - q.shape[2] + torch.arange(q.shape[2])
        return plain(q, keys, values, visible & (last[:, None] - torch.arange(visible.shape[1])[None] < size))

    wrap(attention, "attend", attend)


@fault("graph", "contract|decode", "decoder.layers.02|kv.keys.02|kv.values.02", source="A13")
def slots_reused_past_256(graph: Reference) -> None:
    """a ring of 256: a decode step past it overwrites the oldest slot of one layer"""
    attention = graph.decoder.layers[2].self_attn

    def remember(plain, state, new, visible):
        total = visible.shape[1]
        if new.shape[2] == 1 and total > 256:
            state[attention.layer, :, :, (total - 1) % 256] = new[:, :, 0]
        return plain(state, new, visible)

    wrap(attention, "remember", remember)


@fault("graph", "contract", "decoder.layers.00", CONTEXT, source="A15")
def scale_a_thousandth_large(graph: Reference) -> None:
    """the first layer's attention scale times 1.001"""
    graph.decoder.layers[0].self_attn.scale *= 1.001


@fault("graph", "contract", "decoder.layers.01", CONTEXT, source="A15")
def scale_of_one_head(graph: Reference) -> None:
    """one query head of one layer scored 1 % higher"""
    factors = torch.tensor([1, 1, 1.01, 1])[None, :, None, None]
    wrap(graph.decoder.layers[1].self_attn, "attend", lambda plain, q, *rest: plain(q * factors, *rest))


@fault("graph", "contract", "vision.layers.03", CONTEXT, source="A15")
def vision_scale_a_thousandth_small(graph: Reference) -> None:
    """the last vision block's attention scale times 0.999"""
    graph.vision.blocks[3].attn.scale *= 0.999


@fault("graph", "contract|vision", "vision.layers.00", CONTEXT, source="A18")
def last_patch_never_attended(graph: Reference) -> None:
    """the first vision block masks the last patch: a padding mask one short"""
    wrap(graph.vision.blocks[0].attn, "attend", lambda plain, q, k, v: plain(q, k[:, :-1], v[:, :-1]))


@fault("graph", "contract|vision", "vision.layers.02", CONTEXT, source="A18")
def keys_behind_the_last_whole_tile(graph: Reference) -> None:
    """a vision kernel in tiles of 256 keys drops the remainder"""
    def attend(plain, q, k, v):
        whole = max(k.shape[1] // 256 * 256, min(256, k.shape[1]))
        return plain(q, k[:, :whole], v[:, :whole])

    wrap(graph.vision.blocks[2].attn, "attend", attend)


@fault("graph", "contract", "decoder.layers.02", CONTEXT, source="A22")
def second_tile_not_rescaled(graph: Reference) -> None:
    """a tiled softmax in one layer forgets to rescale its sum where a later tile holds the maximum"""
    attention = graph.decoder.layers[2].self_attn

    def attend(q, keys, values, visible):
        scores = _scores(attention, q, keys).masked_fill(~visible, -1e4)
        tiles = [(scores[..., at:at + 128], values[:, :, at:at + 128]) for at in range(0, scores.shape[-1], 128)]
        top = tiles[0][0].amax(-1, keepdim=True)
        total = weighted = 0
        for tile, held in tiles:
            new = torch.maximum(top, tile.amax(-1, keepdim=True))
            power = (tile - new).exp()
            total = total + power.sum(-1, keepdim=True)  # the missing factor: exp(top - new)
            weighted = weighted * (top - new).exp() + power @ held
            top = new
        return weighted / total

    attention.attend = attend


@fault("graph", "contract", "decoder.layers.00", CONTEXT)
def last_head_reads_the_first_group(graph: Reference) -> None:
    """the last query head of the first layer reads the keys and values of group 0"""
    attention = graph.decoder.layers[0].self_attn
    wrap(attention, "remember", lambda plain, *arguments: _first_for_last(plain(*arguments)))


def _first_for_last(read):
    return torch.cat([read[:, :-1], read[:, :1]], 1)


@fault("graph", "contract|decode", "decoder.layers.02", CONTEXT, source="A12")
def values_of_the_layer_before_while_decoding(graph: Reference) -> None:
    """calls of one token read one layer's older values from the cache of the layer before"""
    attention = bend_attention(graph, 2)

    def recall(plain, cache, k, v, visible):
        keys, values = plain(cache, k, v, visible)
        if k.shape[2] == 1:
            wrong = cache[1][1, :, :, :visible.shape[1] - 1].repeat_interleave(attention.groups, dim=1)
            values = torch.cat([wrong, values[:, :, -1:]], 2)
        return keys, values

    wrap(attention, "recall", recall)


@fault("graph", "contract|decode", "kv.keys.03|decoder.layers.03", source="A04")
def one_layer_writes_a_slot_early(graph: Reference) -> None:
    """a decode step writes the last layer's key over the one before it as well"""
    attention = graph.decoder.layers[3].self_attn
    calls = [0]

    def remember(plain, state, new, visible):
        calls[0] += 1
        if new.shape[2] == 1 and calls[0] % 2 and visible.shape[1] > 1:
            state[attention.layer, :, :, visible.shape[1] - 2] = new[:, :, 0]
        return plain(state, new, visible)

    wrap(attention, "remember", remember)


@fault("graph", "contract|decode", "kv.keys.02", source="A12")
def keys_kept_in_bfloat16(graph: Reference) -> None:
    """one layer's keys pass through bfloat16 on their way into the cache"""
    attention = bend_attention(graph, 2)
    wrap(attention, "recall", lambda plain, cache, k, v, visible: plain(cache, k.bfloat16().float(), v, visible))


@fault("graph", "contract|decode", "kv.values.01", source="Q15")
def one_value_head_kept_in_eight_bits(graph: Reference) -> None:
    """one value head of one layer stored as int8 with a single scale"""
    attention = bend_attention(graph, 1)

    def recall(plain, cache, k, v, visible):
        v = v.clone()
        step = v[:, 1].abs().amax() / 127
        v[:, 1] = (v[:, 1] / step).round() * step
        return plain(cache, k, v, visible)

    wrap(attention, "recall", recall)


@fault("graph", "contract|vision", "vision.layers.01", CONTEXT)
def vision_weights_in_bfloat16(graph: Reference) -> None:
    """one vision block's attention weights rounded to bfloat16"""
    attention = graph.vision.blocks[1].attn
    attention.attend = lambda q, k, v: (q @ k.transpose(1, 2) * attention.scale).softmax(-1).bfloat16().float() @ v


@fault("graph", "contract", "decoder.layers.01", CONTEXT)
def softmax_with_a_quiet_key(graph: Reference) -> None:
    """one layer's softmax divides by one more than the sum: a sink that this family has not"""
    attention = graph.decoder.layers[1].self_attn

    def attend(q, keys, values, visible):
        scores = _scores(attention, q, keys).masked_fill(~visible, float("-inf"))
        return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1] @ values

    attention.attend = attend


@fault("graph", "contract", "decoder.layers.03", CONTEXT, source="A16")
def mask_added_as_a_one(graph: Reference) -> None:
    """the boolean mask added to the scores as 1 and 0, in one layer"""
    attention = graph.decoder.layers[3].self_attn
    attention.attend = lambda q, keys, values, visible: (_scores(attention, q, keys) + visible.float()).softmax(-1) @ values


@fault("graph", "contract|decode", "decoder.layers.00", CONTEXT, source="A18")
def padding_attended_while_decoding(graph: Reference) -> None:
    """calls of one token attend to the zero keys that fill the cache up to a multiple of 64, in the first layer"""
    attention = graph.decoder.layers[0].self_attn

    def attend(plain, q, keys, values, visible):
        count = -keys.shape[2] % 64 if q.shape[2] == 1 else 0
        pad = keys.new_zeros(1, keys.shape[1], count, keys.shape[3])
        seen = torch.cat([visible, visible.new_ones(len(visible), count)], 1)
        return plain(q, torch.cat([keys, pad], 2), torch.cat([values, pad], 2), seen)

    wrap(attention, "attend", attend)


@fault("graph", "contract|decode", "kv.keys.00|kv.values.00|calls.chunked", source="A06")
def prefill_forgets_its_last_token(graph: Reference) -> None:
    """a call of several tokens leaves its last slot unwritten"""
    def around(plain, state, new, visible):
        last = visible.shape[1] - 1
        kept, read = state[..., last, :].clone(), plain(state, new, visible)
        if new.shape[2] > 1:
            read = read.clone()
            state[..., last, :] = kept
        return read

    for layer in graph.decoder.layers:
        wrap(layer.self_attn, "remember", around)


@fault("graph", "contract", "decoder.layers.00", CONTEXT)
def scores_capped(graph: Reference) -> None:
    """scores pass through 50 tanh(s / 50) in the first layer, as another family's do"""
    attention = graph.decoder.layers[0].self_attn
    attention.attend = lambda q, keys, values, visible: (50 * torch.tanh(_scores(attention, q, keys) / 50)).masked_fill(
        ~visible, -1e4).softmax(-1) @ values


@fault("graph", "contract|decoder", "decoder.layers.03", CONTEXT)
def heads_joined_lane_by_lane(graph: Reference) -> None:
    """one layer's heads joined without bringing tokens forward first"""
    wrap(graph.decoder.layers[3].self_attn, "attend", lambda plain, q, *rest: (
        plain(q, *rest).reshape(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)))


@fault("graph", "contract|decode", "calls.chunked|decoder.layers.00", source="A03")
def chunk_blind_to_the_key_before(graph: Reference) -> None:
    """the first query of a later chunk does not see the key just before it"""
    decoder = bend_decoder(graph)

    def seen(plain, planes, place, total):
        made = plain(planes, place, total).clone()
        if 1 < len(place) < total:
            made[0, total - len(place) - 1] = False
        return made

    wrap(decoder, "seen", seen)
