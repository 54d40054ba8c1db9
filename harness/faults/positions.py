"""Positions: planes, section lanes, frequencies and the rotation itself; and the host's rope shift."""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.faults import fault
from harness.faults.hands import bend_attention, bend_decoder, wrap
from harness.faults.suspect import Host
from harness.graph.contract import HostInputs
from harness.graph.norms import inverse_frequencies
from harness.graph.reference import Reference

ROPE = "decoder.layers.00"
TURN = "attn.q_rope|attn.k_rope"


@fault("graph", "contract", ROPE, TURN, source="P01")
def sections_contiguous(graph: Reference) -> None:
    """t, h and w lanes in contiguous sections, as Qwen2-VL has them"""
    first, second, third = graph.geometry.mrope_section
    graph.decoder.rope.axis = torch.tensor([0] * first + [1] * second + [2] * third, dtype=torch.int32)


@fault("graph", "contract", ROPE, TURN, source="P04")
def lanes_rolled(graph: Reference) -> None:
    """t, h and w lanes rolled by one: a strided write gone wrong"""
    graph.decoder.rope.axis = torch.roll(graph.decoder.rope.axis, 1)


@fault("graph", "contract", ROPE, TURN, source="P04")
def slow_w_lanes_take_h(graph: Reference) -> None:
    """only the slower half of the w lanes turns with h"""
    axis = graph.decoder.rope.axis.clone()
    lanes = torch.arange(len(axis))
    axis[(axis == 2) & (lanes >= len(axis) // 2)] = 1
    graph.decoder.rope.axis = axis


@fault("graph", "contract", ROPE, TURN)
def last_h_lane_takes_t(graph: Reference) -> None:
    """the h section ends one lane early"""
    axis = graph.decoder.rope.axis.clone()
    axis[torch.nonzero(axis == 1)[-1]] = 0
    graph.decoder.rope.axis = axis


@fault("graph", "contract", "decoder.layers.02", TURN, source="P03")
def one_layer_reads_t_only(graph: Reference) -> None:
    """a fused kernel in one layer reads only the t row of the positions"""
    decoder = bend_decoder(graph)
    decoder.angles = lambda number, rope, planes: decoder.rope(planes[:1].expand(3, -1)) if number == 2 else rope


@fault("graph", "contract", ROPE, TURN, source="P06")
def theta_default(graph: Reference) -> None:
    """rope theta fell back to 1e6"""
    graph.decoder.rope.inv_freq = inverse_frequencies(1e6, graph.geometry.head_dim // 2)


@fault("graph", "contract", ROPE, TURN)
def theta_nearly_right(graph: Reference) -> None:
    """rope theta off by one part in a thousand"""
    graph.decoder.rope.inv_freq = inverse_frequencies(graph.geometry.rope_theta * 1.001, graph.geometry.head_dim // 2)


@fault("graph", "contract", ROPE, TURN, source="P12")
def frequencies_in_half(graph: Reference) -> None:
    """rotary frequencies stored in fp16"""
    graph.decoder.rope.inv_freq = graph.decoder.rope.inv_freq.half().float()


@fault("graph", "contract", ROPE, TURN)
def slowest_frequency_zero(graph: Reference) -> None:
    """the slowest rotary lane stands still: its frequency underflowed"""
    graph.decoder.rope.inv_freq = graph.decoder.rope.inv_freq.clone()
    graph.decoder.rope.inv_freq[-1] = 0


@fault("graph", "contract", ROPE, TURN, source="P12")
def angles_in_half(graph: Reference) -> None:
    """rotary angles rounded to fp16 before cos and sin"""
    rope = graph.decoder.rope

    def forward(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t, h, w = planes.float()[:, :, None]
        place = torch.where(rope.axis == 1, h, torch.where(rope.axis == 2, w, t))
        angles = (place * rope.inv_freq).half().float()
        angles = torch.cat([angles, angles], dim=-1)[None, :, None]
        return angles.cos(), angles.sin()

    rope.forward = forward


@fault("graph", "contract", ROPE, TURN, source="P13")
def positions_in_bfloat16(graph: Reference) -> None:
    """positions pass through bfloat16, which holds whole numbers up to 256 only"""
    wrap(graph.decoder.rope, "forward", lambda plain, planes: plain(planes.bfloat16().float()))


@fault("graph", "contract", ROPE, TURN, source="P15")
def trigonometry_folded(graph: Reference) -> None:
    """cos of an angle past 128 folded to 0.5"""
    rope = graph.decoder.rope
    fastest = int(rope.inv_freq.argmax())

    def around(plain, planes):
        cos, sin = plain(planes)
        far = (planes.float().amax(0) * rope.inv_freq[fastest] > 128)[None, :, None]
        cos = cos.clone()
        for lane in (fastest, fastest + len(rope.inv_freq)):
            cos[..., lane] = torch.where(far, 0.5, cos[..., lane])
        return cos, sin

    wrap(rope, "forward", around)


@fault("graph", "decoder", "decoder.layers.01", "attn.q_norm|attn.k_norm|attn.q_rope|attn.k_rope", source="P16")
def norm_after_rope(graph: Reference) -> None:
    """q and k normalised after rotation instead of before, in one layer"""
    bend_attention(graph, 1).norm_last = True


@fault("graph", "contract", "decoder.layers.02", TURN, source="P18")
def rotation_backwards(graph: Reference) -> None:
    """rotate_half with the other sign, in one layer"""
    attention = bend_attention(graph, 2)
    plain = attention.turn
    attention.turn = lambda x, cos, sin: plain(x, cos, -sin)


@fault("graph", "contract", "decoder.layers.01", TURN, source="P25")
def lanes_paired_neighbourly(graph: Reference) -> None:
    """lane 2j paired with 2j + 1 where the weights expect j and j + D/2, in one layer"""
    def turn(x, cos, sin):
        even, odd = x[..., ::2], x[..., 1::2]
        half = x.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    bend_attention(graph, 1).turn = turn


@fault("graph", "contract", ROPE, TURN, source="P19")
def frequencies_of_half_a_head(graph: Reference) -> None:
    """frequencies built for half the head size, then repeated"""
    lanes = graph.geometry.head_dim // 2
    graph.decoder.rope.inv_freq = inverse_frequencies(graph.geometry.rope_theta, lanes // 2).repeat(2)


@fault("graph", "contract", ROPE, TURN, source="P18")
def frequency_exponent_halved(graph: Reference) -> None:
    """frequencies with the exponent's denominator halved"""
    graph.decoder.rope.inv_freq = graph.decoder.rope.inv_freq.square()


@fault("graph", "contract", "graph.positions", source="P10")
def rows_and_columns_exchanged(graph: Reference) -> None:
    """h and w planes exchanged"""
    wrap(graph.decoder.rope, "planes", lambda plain, *arguments: plain(*arguments)[[0, 2, 1]])


@fault("graph", "contract", "graph.positions", source="P10")
def image_in_one_dimension(graph: Reference) -> None:
    """image tokens count on as text does"""
    wrap(graph.decoder.rope, "planes",
         lambda plain, ids, place, start, amount: torch.where(ids >= graph.decoder.vocab, place, plain(
             ids, place, start, amount)))


@fault("graph", "contract", "graph.positions")
def width_taken_for_height(graph: Reference) -> None:
    """slots divided by the grid's height instead of its width"""
    graph.decoder.rope.width = graph.decoder.slots // graph.decoder.rope.width


@fault("graph", "contract", "graph.positions")
def shift_one_token_late(graph: Reference) -> None:
    """the rope shift begins one token after the image's end"""
    wrap(graph.decoder.rope, "planes", lambda plain, ids, place, start, amount: plain(ids, place, start + 1, amount))


@fault("graph", "contract", "graph.positions", source="P07")
def no_shift_after_the_image(graph: Reference) -> None:
    """text after an image advances by its tokens: the rope shift is ignored"""
    wrap(graph.decoder.rope, "planes",
         lambda plain, ids, place, start, amount: plain(ids, place, start, torch.zeros_like(amount)))


@fault("graph", "contract", "graph.positions", source="P10")
def temporal_plane_moves(graph: Reference) -> None:
    """t advances with the rows of the image"""
    def around(plain, ids, place, start, amount):
        planes = plain(ids, place, start, amount).clone()
        planes[0] = torch.where(ids >= graph.decoder.vocab, planes[1], planes[0])
        return planes

    wrap(graph.decoder.rope, "planes", around)


def _shifted(host: Host, change) -> None:
    plain = host.contract

    def contract(ids, image_token, vocab, merged) -> HostInputs:
        made = plain(ids, image_token, vocab, merged)
        return made if merged is None else change(made, merged)

    host.contract = contract


@fault("host", "contract", "host.positions", source="P07")
def shift_by_height_only(host: Host) -> None:
    """the host takes the image's height for its larger side"""
    _shifted(host, lambda made, merged: replace(made, shift_amount=merged[0] * merged[1] - merged[0]))


@fault("host", "contract", "host.positions", source="P07")
def shift_by_premerge_size(host: Host) -> None:
    """the host takes the side of the patch grid before merging"""
    _shifted(host, lambda made, merged: replace(made, shift_amount=merged[0] * merged[1] - 2 * max(merged)))


@fault("host", "contract", "host.positions", source="P07")
def shift_one_too_many(host: Host) -> None:
    """the host advances by the larger side plus one"""
    _shifted(host, lambda made, merged: replace(made, shift_amount=made.shift_amount - 1))


@fault("host", "contract", "host.positions", source="P07")
def shift_starts_at_the_image(host: Host) -> None:
    """the host begins the shift at the vision_end token's successor"""
    _shifted(host, lambda made, merged: replace(made, shift_start=made.shift_start + 1))


@fault("graph", "none", "none", equivalent=True, source="B12")
def positions_offset_together(graph: Reference) -> None:
    """all rope positions five further: attention sees differences only"""
    wrap(graph.decoder.rope, "planes", lambda plain, *arguments: plain(*arguments) + 5)
