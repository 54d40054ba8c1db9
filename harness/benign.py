"""Healthy variations of a conversion: the same mathematics in another order. What they differ by is noise, not fault.

Each is a function that changes a freshly loaded `Reference` in place; its name stands in the `because` of the bounds that
were set from it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.graph import decoder, vision
from harness.graph.norms import RMSNorm
from harness.graph.reference import Reference

Variation = Callable[[Reference], None]


def as_it_is(graph: Reference) -> None:
    """our graph as it is"""


def fused_attention(graph: Reference) -> None:
    """the fused attention kernel"""
    for module in _modules(graph, vision.Attention):
        module.attend = lambda q, k, v, scale=module.scale: F.scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scale)[0]
    for module in _modules(graph, decoder.Attention):
        module.attend = lambda q, k, v, visible, scale=module.scale: F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale)


def scale_in_query(graph: Reference) -> None:
    """the attention scale folded into q"""
    for module in (*_modules(graph, vision.Attention), *_modules(graph, decoder.Attention)):
        plain, scale = module.attend, module.scale
        module.scale = 1.0
        module.attend = lambda q, *rest, plain=plain, scale=scale: plain(q * scale, *rest)


def another_order_of_sums(graph: Reference, seed: int = 0) -> None:
    """every matrix product summed in another order"""
    generator = torch.Generator().manual_seed(seed)
    for module in _modules(graph, nn.Linear):
        order = torch.randperm(module.in_features, generator=generator)
        module.forward = lambda x, m=module, order=order: F.linear(x[..., order], m.weight[:, order], m.bias)


def sums_in_two_halves(graph: Reference) -> None:
    """every matrix product as the sum of two"""
    for module in _modules(graph, nn.Linear):
        half = module.in_features // 2
        module.forward = lambda x, m=module, half=half: (
            F.linear(x[..., :half], m.weight[:, :half], m.bias) + F.linear(x[..., half:], m.weight[:, half:]))


def fused_projections(graph: Reference) -> None:
    """q, k and v, gate and up in one matrix product each"""
    for layer in graph.decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        _fuse([mlp.gate_proj, mlp.up_proj])


def norm_by_division(graph: Reference) -> None:
    """RMSNorm as a division by the norm, LayerNorm from its moments"""
    for module in _modules(graph, RMSNorm):
        module.forward = lambda x, m=module: m.weight * (
            x / torch.sqrt(x.float().square().sum(-1, keepdim=True) / x.shape[-1] + m.eps)).to(x.dtype)
    for module in _modules(graph, nn.LayerNorm):
        module.forward = lambda x, m=module: _layer_norm(x, m)


VARIATIONS: dict[str, Variation] = {make.__name__: make for make in (
    as_it_is, fused_attention, scale_in_query, another_order_of_sums, sums_in_two_halves, fused_projections,
    norm_by_division)}


def _layer_norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    spread = (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    return (x - mean) / torch.sqrt(spread + module.eps) * module.weight + module.bias


def _fuse(parts: list[nn.Linear]) -> None:
    """Joined when called: the weights of a graph that streams are not there before."""
    start = 0
    for part in parts:
        rows = slice(start, start + part.out_features)
        part.forward = lambda x, rows=rows: F.linear(x, torch.cat([one.weight for one in parts]))[..., rows]
        start += part.out_features


def _modules(graph: Reference, kind: type) -> list:
    return [module for tower in (graph.vision, graph.decoder) for module in tower.modules() if isinstance(module, kind)]
