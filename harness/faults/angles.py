"""Positions once more: a constant slightly off, one lane, one head, one entry point, and what large positions do."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from harness.faults import fault
from harness.faults.hands import bend_attention, bend_decoder, wrap
from harness.faults.suspect import Host
from harness.graph.contract import rope_axis
from harness.graph.norms import inverse_frequencies
from harness.graph.reference import Reference

ROPE, TURN, PLANES = "decoder.layers.00", "attn.q_rope|attn.k_rope", "graph.positions|decoder.positions"


@fault("graph", "contract", ROPE, TURN, source="P06")
def theta_a_little_large(graph: Reference) -> None:
    """rope theta 5.0001e6 for 5e6"""
    graph.decoder.rope.inv_freq = inverse_frequencies(graph.geometry.rope_theta * 1.00002, graph.geometry.head_dim // 2)


@fault("graph", "contract", ROPE, TURN, source="P01")
def sections_moved_by_one(graph: Reference) -> None:
    """one lane moved from w to h: sections as of another size"""
    first, second, third = graph.geometry.mrope_section
    axis = rope_axis((first, second + 1, third - 1), graph.geometry.head_dim // 2)
    graph.decoder.rope.axis = torch.from_numpy(axis)


@fault("graph", "contract", ROPE, TURN, source="P04")
def last_lane_turns_with_w(graph: Reference) -> None:
    """the very last lane takes w where t belongs"""
    graph.decoder.rope.axis = graph.decoder.rope.axis.clone()
    graph.decoder.rope.axis[-1] = 2


@fault("graph", "contract", ROPE, TURN, source="P13")
def positions_in_half(graph: Reference) -> None:
    """positions pass through fp16, which holds whole numbers up to 2048 only"""
    wrap(graph.decoder.rope, "forward", lambda plain, planes: plain(planes.half().float()))


@fault("graph", "contract", ROPE, TURN, source="P15")
def table_of_a_thousand_positions(graph: Reference) -> None:
    """a table of 1024 angles: later positions take its last row"""
    wrap(graph.decoder.rope, "forward", lambda plain, planes: plain(planes.clamp(max=1023)))


@fault("graph", "contract", ROPE, TURN)
def positions_wrap_at_2048(graph: Reference) -> None:
    """a ring of 2048 angles: later positions start again at 0"""
    wrap(graph.decoder.rope, "forward", lambda plain, planes: plain(planes % 2048))


@fault("graph", "contract", ROPE, TURN, source="P15")
def angles_reduced_by_a_short_pi(graph: Reference) -> None:
    """angles reduced by 6.28318 before cos and sin: right for short prompts"""
    rope = graph.decoder.rope
    period = 6.28318

    def forward(planes):
        t, h, w = planes.float()[:, :, None]
        angles = torch.where(rope.axis == 1, h, torch.where(rope.axis == 2, w, t)) * rope.inv_freq
        angles = angles - period * torch.floor(angles / period)
        angles = torch.cat([angles, angles], dim=-1)[None, :, None]
        return angles.cos(), angles.sin()

    rope.forward = forward


@fault("graph", "contract|decode", ROPE + "|graph.positions", source="P22")
def one_token_calls_ignore_the_shift(graph: Reference) -> None:
    """a call of one token takes its place for its position: the rope shift is lost in decode"""
    wrap(graph.decoder.rope, "planes", lambda plain, ids, place, start, amount: plain(
        ids, place, start, amount if len(place) > 1 else torch.zeros_like(amount)))


@fault("graph", "contract|decode", ROPE + "|graph.positions|calls.chunked", source="P24")
def shift_counted_from_the_chunk(graph: Reference) -> None:
    """the shift's start is compared with the place inside the call, not inside the prompt"""
    wrap(graph.decoder.rope, "planes", lambda plain, ids, place, start, amount: plain(
        ids, place, start + place[:1], amount))


@fault("graph", "contract", "decoder.layers.03", TURN, source="P10")
def rows_and_columns_exchanged_in_one_layer(graph: Reference) -> None:
    """h and w exchanged in the last layer only"""
    decoder = bend_decoder(graph)
    decoder.angles = lambda number, rope, planes: decoder.rope(planes[[0, 2, 1]]) if number == 3 else rope


@fault("graph", "contract", "decoder.layers.01", TURN, source="P12")
def frequencies_in_bfloat16_in_one_layer(graph: Reference) -> None:
    """one layer's fused kernel holds its frequencies in bfloat16"""
    decoder = bend_decoder(graph)

    def angles(number, rope, planes):
        if number != 1:
            return rope
        kept = decoder.rope.inv_freq
        decoder.rope.inv_freq = kept.bfloat16().float()
        turned = decoder.rope(planes)
        decoder.rope.inv_freq = kept
        return turned

    decoder.angles = angles


@fault("graph", "contract", PLANES, source="P10")
def rows_by_a_rounded_reciprocal(graph: Reference) -> None:
    """slot / width as a product with an fp16 reciprocal: full rows fall back by one"""
    rope = graph.decoder.rope
    reciprocal = torch.tensor(1 / rope.width).half().float()

    def around(plain, ids, place, start, amount):
        slot = (ids - rope.vocab).clamp(min=0)
        row = (slot.float() * reciprocal).floor().int()
        first = place - slot
        image = torch.stack([first, first + row, first + slot - row * rope.width])
        return torch.where(ids >= rope.vocab, image, plain(ids, place, start, amount))

    wrap(rope, "planes", around)


@fault("graph", "contract", PLANES)
def image_begins_one_early(graph: Reference) -> None:
    """image positions counted from the token before the image"""
    wrap(graph.decoder.rope, "planes", lambda plain, ids, place, start, amount: plain(
        ids, place, start, amount) - (ids >= graph.decoder.vocab).int())


@fault("graph", "contract", PLANES, source="P10")
def rows_counted_from_one(graph: Reference) -> None:
    """the h plane of the image begins at one"""
    def around(plain, ids, place, start, amount):
        planes = plain(ids, place, start, amount).clone()
        planes[1] += (ids >= graph.decoder.vocab).int()
        return planes

    wrap(graph.decoder.rope, "planes", around)


@fault("graph", "contract", ROPE, TURN)
def rotation_scaled(graph: Reference) -> None:
    """cos and sin times 1.005: an attention factor of a long-context rope"""
    def around(plain, planes):
        cos, sin = plain(planes)
        return 1.005 * cos, 1.005 * sin

    wrap(graph.decoder.rope, "forward", around)


@fault("graph", "contract", ROPE, TURN, source="P12")
def rotation_tables_in_bfloat16(graph: Reference) -> None:
    """cos and sin stored in bfloat16"""
    wrap(graph.decoder.rope, "forward", lambda plain, planes: tuple(part.bfloat16().float() for part in plain(planes)))


@fault("graph", "contract", "decoder.layers.01", "attn.k_rope", source="P18")
def last_key_head_not_turned(graph: Reference) -> None:
    """the last key head of one layer is never rotated"""
    attention = bend_attention(graph, 1)
    plain = attention.turn

    def turn(x, cos, sin):
        turned = plain(x, cos, sin)
        return turned if x.shape[2] > 2 else torch.cat([turned[:, :, :-1], x[:, :, -1:]], 2)

    attention.turn = turn


@fault("graph", "contract", "decoder.layers.03", TURN, source="E04")
def only_three_quarters_turned(graph: Reference) -> None:
    """partial rotation in one layer: the slowest quarter of the lanes stays"""
    attention = bend_attention(graph, 3)
    plain, size = attention.turn, graph.geometry.head_dim // 2
    moves = (torch.arange(2 * size) % size < 3 * size // 4).float()
    attention.turn = lambda x, cos, sin: plain(x, cos * moves + 1 - moves, sin * moves)


@fault("graph", "contract", ROPE, TURN, source="P09")
def slow_lanes_interpolated(graph: Reference) -> None:
    """a long-context rope's rule applied: lanes slower than a turn in 4096 positions at half their frequency"""
    held = graph.decoder.rope.inv_freq
    graph.decoder.rope.inv_freq = torch.where(held < 2 * math.pi / 4096 / 100, held / 2, held)


def _shifted(host: Host, change) -> None:
    plain = host.contract
    host.contract = lambda ids, image_token, vocab, merged: (
        plain(ids, image_token, vocab, merged) if merged is None else change(plain(ids, image_token, vocab, merged), merged))


@fault("host", "contract", "host.*", source="P07")
def shift_by_the_smaller_side(host: Host) -> None:
    """the host advances by the smaller side of the image"""
    _shifted(host, lambda made, merged: replace(made, shift_amount=merged[0] * merged[1] - min(merged)))


@fault("host", "none", "none", equivalent=True, source="P07")
def shift_starts_inside_the_image(host: Host) -> None:
    """the shift begins at the image's last token, whose position no shift concerns"""
    _shifted(host, lambda made, merged: replace(made, shift_start=made.shift_start - 1))


@fault("host", "contract", "host.*", source="V09")
def slots_numbered_down_the_columns(host: Host) -> None:
    """image slots counted column by column"""
    def change(made, merged):
        ids = made.ids.copy()
        places = ids >= host.subject.geometry.vocab
        ids[places] = ids[places].reshape(merged).T.ravel()
        return replace(made, ids=ids)

    _shifted(host, change)


@fault("host", "contract", "host.*")
def slots_shifted_by_one(host: Host) -> None:
    """extension ids begin one too high, the last slot twice"""
    def change(made, merged):
        vocab = host.subject.geometry.vocab
        last = vocab + merged[0] * merged[1] - 1
        ids = made.ids.copy()
        ids[ids >= vocab] = (ids[ids >= vocab] + 1).clip(max=last)
        return replace(made, ids=ids)

    _shifted(host, change)


@fault("host", "contract", "host.*", source="P09")
def text_gets_a_shift(host: Host) -> None:
    """a prompt without an image is shifted by one from its middle on"""
    plain = host.contract

    def contract(ids, image_token, vocab, merged):
        made = plain(ids, image_token, vocab, merged)
        return replace(made, shift_start=len(ids) // 2, shift_amount=1) if merged is None else made

    host.contract = contract
