"""Healthy variations beyond those that bounds are set from: the same mathematics by other formulas, kernels and layouts.

Not one of them was measured when the bounds were made, so what they show is the room that the bounds leave.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.faults.hands import bend_attention, bend_decoder, layer_norms, rms, wrap
from harness.faults.healthy_hosts import HOST, LOOP
from harness.faults.loop import Loop
from harness.graph.reference import Reference


def rope_in_float64(graph: Reference) -> None:
    """rotary angles taken in float64, cos and sin rounded at last"""
    rope = graph.decoder.rope

    def forward(planes: Tensor) -> tuple[Tensor, Tensor]:
        t, h, w = planes.double()[:, :, None]
        angles = torch.where(rope.axis == 1, h, torch.where(rope.axis == 2, w, t)) * rope.inv_freq.double()
        angles = torch.cat([angles, angles], -1)[None, :, None]
        return angles.cos().float(), angles.sin().float()

    rope.forward = forward


def rotation_by_complex_numbers(graph: Reference) -> None:
    """q and k rotated as complex numbers"""
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = x.shape[-1] // 2
        turned = torch.complex(x[..., :size], x[..., size:]) * torch.complex(cos, sin)[..., :size]
        return torch.cat([turned.real, turned.imag], -1)

    for layer in range(graph.geometry.layers):
        bend_attention(graph, layer).turn = turn


def scale_on_both_sides(graph: Reference) -> None:
    """q and k each multiplied by the root of the scale"""
    for attention in _attentions(graph):
        root, attention.scale = math.sqrt(attention.scale), 1.0
        wrap(attention, "attend", lambda plain, q, k, *rest, root=root: plain(q * root, k * root, *rest))


def mask_of_minus_infinity(graph: Reference) -> None:
    """hidden scores replaced by minus infinity"""
    _decoder_softmax(graph, lambda scores: scores.softmax(-1))


def softmax_without_the_maximum(graph: Reference) -> None:
    """softmax as exp over its sum, no maximum subtracted"""
    def softmax(scores: Tensor) -> Tensor:
        power = scores.exp()
        return power / power.sum(-1, keepdim=True)

    _decoder_softmax(graph, softmax)


def softmax_in_float64(graph: Reference) -> None:
    """softmax in float64"""
    _decoder_softmax(graph, lambda scores: scores.double().softmax(-1).float())


def softmax_by_logarithm(graph: Reference) -> None:
    """softmax as exp of scores less their log of sums"""
    _decoder_softmax(graph, lambda scores: (scores - scores.logsumexp(-1, keepdim=True)).exp())


def _decoder_softmax(graph: Reference, softmax: Callable[[Tensor], Tensor]) -> None:
    for layer in graph.decoder.layers:
        layer.self_attn.attend = lambda q, keys, values, visible, a=layer.self_attn: softmax(
            (q @ keys.transpose(2, 3) * a.scale).masked_fill(~visible, float("-inf"))) @ values


def softmax_in_tiles(graph: Reference) -> None:
    """attention over tiles of 128 keys with a running maximum and sum"""
    for layer in graph.decoder.layers:
        layer.self_attn.attend = lambda q, keys, values, visible, a=layer.self_attn: _tiled(
            (q @ keys.transpose(2, 3) * a.scale).masked_fill(~visible, -1e4), values)
    for block in graph.vision.blocks:
        block.attn.attend = lambda q, k, v, a=block.attn: _tiled(q @ k.transpose(1, 2) * a.scale, v)


def _tiled(scores: Tensor, values: Tensor) -> Tensor:
    top, total, weighted = scores.new_full((*scores.shape[:-1], 1), -1e30), 0.0, 0.0
    for at in range(0, scores.shape[-1], 128):
        tile = scores[..., at:at + 128]
        new = torch.maximum(top, tile.amax(-1, keepdim=True))
        power, fade = (tile - new).exp(), (top - new).exp()
        total = total * fade + power.sum(-1, keepdim=True)
        weighted = weighted * fade + power @ values[..., at:at + 128, :]
        top = new
    return weighted / total


def attention_head_by_head(graph: Reference) -> None:
    """every head in a product of its own"""
    for attention in _attentions(graph):
        axis = 1 if hasattr(attention, "q_proj") else 0
        wrap(attention, "attend", lambda plain, q, k, v, *rest, axis=axis: torch.cat([
            plain(*parts, *rest) for parts in zip(*(part.split(1, axis) for part in (q, k, v)))], axis))


def norms_by_the_library(graph: Reference) -> None:
    """RMSNorm by torch's own function"""
    for module in rms(graph, ""):
        module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.eps)


def norms_in_float64(graph: Reference) -> None:
    """every norm in float64"""
    for module in layer_norms(graph):
        module.forward = lambda x, m=module: F.layer_norm(
            x.double(), x.shape[-1:], m.weight.double(), m.bias.double(), m.eps).float()
    for module in rms(graph, ""):
        module.forward = lambda x, m=module: (m.weight.double() * x.double() * torch.rsqrt(
            x.double().square().mean(-1, keepdim=True) + m.eps)).float()


def norm_with_the_root_last(graph: Reference) -> None:
    """RMSNorm as weight * x over the root of mean and eps"""
    for module in rms(graph, ""):
        module.forward = lambda x, m=module: m.weight * x / (x.square().mean(-1, keepdim=True) + m.eps).sqrt()


def gelu_by_sigmoid(graph: Reference) -> None:
    """the tanh GELU as x * sigmoid(2 u), the same function"""
    _block_gelu(graph, lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_by_powers(graph: Reference) -> None:
    """the tanh GELU written out, x cubed as a product"""
    _block_gelu(graph, lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))))


def _block_gelu(graph: Reference, activation: Callable[[Tensor], Tensor]) -> None:
    for block in graph.vision.blocks:
        block.mlp.forward = lambda x, name, tap, m=block.mlp: tap(f"{name}.out", m.linear_fc2(tap(
            f"{name}.act", activation(tap(f"{name}.fc1", m.linear_fc1(x))))))


def gelu_by_the_normal_distribution(graph: Reference) -> None:
    """the exact GELU as x times the normal distribution's function"""
    for merger in (graph.vision.merger, *graph.vision.deepstack_merger_list):
        def forward(x: Tensor, name: str, tap: Any, m: Any = merger) -> Tensor:
            x = m.norm(x.reshape(-1, m.joined)) if m.norm_after_join else m.norm(x).reshape(-1, m.joined)
            wide = tap(f"{name}.fc1", m.linear_fc1(tap(f"{name}.norm", x)))
            return tap(name, m.linear_fc2(tap(f"{name}.act", wide * torch.special.ndtr(wide))))

        merger.forward = forward


def silu_by_tanh(graph: Reference) -> None:
    """SiLU as x / 2 * (1 + tanh(x / 2)), the same function"""
    for layer in graph.decoder.layers:
        def forward(x: Tensor, name: str, tap: Any, m: Any = layer.mlp) -> Tensor:
            gate, up = (tap(f"{name}.{part}", linear(x)[0])[None] for part, linear in (
                ("gate", m.gate_proj), ("up", m.up_proj)))
            act = tap(f"{name}.act", (0.5 * gate * (1 + torch.tanh(gate / 2)) * up)[0])[None]
            return tap(f"{name}.out", m.down_proj(act)[0])[None]

        layer.mlp.forward = forward


def patch_features_in_another_order(graph: Reference) -> None:
    """patch features and the kernel's columns reordered alike"""
    linear, geometry = graph.vision.patch_embed.proj, graph.geometry
    order = torch.arange(geometry.patch_features).reshape(geometry.channels, geometry.temporal_patch, -1).permute(
        1, 2, 0).reshape(-1)
    linear.forward = lambda x: F.linear(x[:, order], linear.weight[:, order], linear.bias)


def positions_by_the_library(graph: Reference) -> None:
    """learned positions resampled by torch's own function, in float32"""
    from harness.graph.vision import block_major

    side, place = graph.geometry.position_side, block_major(*graph.grid, graph.geometry.merge)
    image = F.interpolate(graph._positions.float().T.reshape(1, -1, side, side), graph.grid, mode="bilinear",
                          align_corners=True)
    graph.vision.positions.data = image[0][:, place[:, 0], place[:, 1]].T.contiguous()


def vision_projection_split(graph: Reference) -> None:
    """q, k and v of the vision tower in three products"""
    for block in graph.vision.blocks:
        linear = block.attn.qkv
        linear.forward = lambda x, m=linear: torch.cat([F.linear(x, weight, bias) for weight, bias in zip(
            m.weight.chunk(3), m.bias.chunk(3))], -1)


def products_in_float64(graph: Reference) -> None:
    """every matrix product in float64, rounded at last"""
    for tower in (graph.vision, graph.decoder):
        for module in tower.modules():
            if isinstance(module, nn.Linear):
                module.forward = lambda x, m=module: F.linear(
                    x.double(), m.weight.double(), None if m.bias is None else m.bias.double()).float()


def head_in_blocks(graph: Reference) -> None:
    """logits in blocks of 100 tokens of the vocabulary"""
    head = graph.decoder.lm_head
    head.forward = lambda x: torch.cat([F.linear(x, part) for part in head.weight.split(100)], -1)


def rows_multiplied_by_the_mask(graph: Reference) -> None:
    """DeepStack rows times a mask of ones and zeros"""
    bend_decoder(graph).extra = lambda number, slot, is_image, deepstack, place: (
        deepstack[slot + number * graph.slots] * is_image[:, None].float())


def image_rows_scattered(graph: Reference) -> None:
    """image rows written into the text's by their index"""
    def mix(text: Tensor, image: Tensor, slot: Tensor, is_image: Tensor) -> Tensor:
        made = text.clone()
        made[is_image] = image[slot[is_image]]
        return made

    bend_decoder(graph).mix = mix


def coordinates_far_away(graph: Reference) -> None:
    """rows and columns of the vision rotation counted from 3 and from 7"""
    from harness.graph.norms import inverse_frequencies
    from harness.graph.vision import block_major

    size = graph.geometry.vision_hidden // graph.geometry.vision_heads
    place = block_major(*graph.grid, graph.geometry.merge) + torch.tensor([3, 7])
    angles = (place.float()[:, :, None] * inverse_frequencies(1e4, size // 4)).flatten(1)
    angles = torch.cat([angles, angles], -1)
    graph.vision.cos, graph.vision.sin = angles.cos(), angles.sin()


GRAPH = (rope_in_float64, rotation_by_complex_numbers, scale_on_both_sides, mask_of_minus_infinity,
         softmax_without_the_maximum, softmax_in_float64, softmax_by_logarithm, softmax_in_tiles, attention_head_by_head,
         norms_by_the_library, norms_in_float64, norm_with_the_root_last, gelu_by_sigmoid, gelu_by_powers,
         gelu_by_the_normal_distribution, silu_by_tanh, patch_features_in_another_order, positions_by_the_library,
         vision_projection_split, products_in_float64, head_in_blocks, rows_multiplied_by_the_mask, image_rows_scattered,
         coordinates_far_away)
CHUNKS = (7, 128)


def rows() -> Iterator[tuple[str, str, Callable[[Any], None]]]:
    """(name, target, change) of each."""
    for target, changes in (("graph", GRAPH), ("engine", LOOP), ("host", HOST)):
        for change in changes:
            yield f"{change.__name__}: {change.__doc__}", target, change
    for chunk in CHUNKS:
        yield f"calls of {chunk} tokens", "engine", functools.partial(_chunked, chunk=chunk)


def _chunked(loop: Loop, chunk: int) -> None:
    loop.chunk = chunk


def _attentions(graph: Reference) -> list[Any]:
    return [*(block.attn for block in graph.vision.blocks), *(layer.self_attn for layer in graph.decoder.layers)]
