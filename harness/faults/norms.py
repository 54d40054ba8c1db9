"""Norms and activations: eps, its place, the width of the statistics, and the flavour of GELU and SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from harness.faults import fault
from harness.faults.hands import layer_norms, rms, wrap
from harness.graph.norms import RMSNorm
from harness.graph.reference import Reference


@fault("graph", "contract", "decoder.layers.00", "input_norm", source="N01")
def eps_of_a_library(graph: Reference) -> None:
    """every text norm with eps 1e-5"""
    for module in rms(graph, ""):
        module.eps = 1e-5


@fault("graph", "contract", "decoder.layers.00", "post_norm", source="N01")
def eps_of_post_attention_norms(graph: Reference) -> None:
    """eps 1e-5 in the post-attention norms only"""
    for module in rms(graph, "post_attention_layernorm"):
        module.eps = 1e-5


@fault("graph", "contract", "decoder.layers.00", "attn.q_norm|attn.k_norm", source="N01")
def eps_of_head_norms(graph: Reference) -> None:
    """eps 1e-5 in q_norm and k_norm only"""
    for module in rms(graph, "q_norm") + rms(graph, "k_norm"):
        module.eps = 1e-5


@fault("graph", "contract", "decoder.norm", source="N01")
def eps_of_final_norm(graph: Reference) -> None:
    """eps 1e-5 in the final norm only"""
    graph.decoder.norm.eps = 1e-5


@fault("graph", "contract", "decoder.layers.02", "input_norm")
def eps_forgotten(graph: Reference) -> None:
    """no eps at all in one norm"""
    graph.decoder.layers[2].input_layernorm.eps = 0.0


@fault("graph", "contract", "decoder.layers.00", "input_norm", source="N03")
def eps_inflated_by_rescaling(graph: Reference) -> None:
    """rows divided by their largest value before the norm, eps added after"""
    for module in rms(graph, "input_layernorm"):
        module.forward = lambda x, m=module: _rescaled(x, m)


def _rescaled(x, module: RMSNorm):
    top = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return module.weight * (x / top) * torch.rsqrt((x / top).square().mean(-1, keepdim=True) + module.eps)


@fault("graph", "contract", "decoder.layers.01", "post_norm")
def eps_outside_the_root(graph: Reference) -> None:
    """eps added to the root instead of under it, in one norm"""
    module = graph.decoder.layers[1].post_attention_layernorm
    module.forward = lambda x: module.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + module.eps)


@fault("graph", "contract", "vision.layers.00", "norm1", source="N04")
def vision_eps_of_a_library(graph: Reference) -> None:
    """every vision norm with eps 1e-5, torch's default"""
    for module in layer_norms(graph):
        module.eps = 1e-5


@fault("graph", "contract", "vision.deepstack.1", "norm", source="N12")
def one_merger_eps(graph: Reference) -> None:
    """one DeepStack merger's norm with another eps"""
    graph.vision.deepstack_merger_list[1].norm.eps = 1e-5


@fault("graph", "contract", "vision.layers.02", "norm2", source="N12")
def vision_variance_unbiased(graph: Reference) -> None:
    """one fused LayerNorm divides by n - 1"""
    module = graph.vision.blocks[2].norm2
    module.forward = lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        x.var(-1, keepdim=True) + module.eps) * module.weight + module.bias


@fault("graph", "contract", "vision.layers.00", "mlp.act", source="N06")
def block_gelu_exact(graph: Reference) -> None:
    """vision blocks with the exact GELU instead of the tanh one"""
    for block in graph.vision.blocks:
        block.mlp.forward = lambda x, name, tap, m=block.mlp: _mlp(m, x, name, tap, F.gelu)


@fault("graph", "contract", "vision.layers.03", "mlp.act")
def block_gelu_quick(graph: Reference) -> None:
    """one vision block with x * sigmoid(1.702 x)"""
    mlp = graph.vision.blocks[3].mlp
    mlp.forward = lambda x, name, tap: _mlp(mlp, x, name, tap, lambda wide: wide * torch.sigmoid(1.702 * wide))


def _mlp(mlp, x, name, tap, activation):
    wide = tap(f"{name}.fc1", mlp.linear_fc1(x))
    return tap(f"{name}.out", mlp.linear_fc2(tap(f"{name}.act", activation(wide))))


@fault("graph", "contract", "vision.merger|vision.deepstack.0", "act", source="N06")
def merger_gelu_tanh(graph: Reference) -> None:
    """mergers with the tanh GELU instead of the exact one"""
    for merger in (graph.vision.merger, *graph.vision.deepstack_merger_list):
        merger.forward = lambda x, name, tap, m=merger: _merge(m, x, name, tap)


def _merge(merger, x, name, tap):
    x = merger.norm(x.reshape(-1, merger.joined)) if merger.norm_after_join else merger.norm(x).reshape(-1, merger.joined)
    wide = tap(f"{name}.fc1", merger.linear_fc1(tap(f"{name}.norm", x)))
    return tap(name, merger.linear_fc2(tap(f"{name}.act", F.gelu(wide, approximate="tanh"))))


@fault("graph", "contract", "vision.merger", "norm", source="N07")
def merger_norm_after_join(graph: Reference) -> None:
    """the main merger normalises after the 2x2 join, its weights repeated"""
    merger = graph.vision.merger
    weight, bias = merger.norm.weight.repeat(4), merger.norm.bias.repeat(4)
    merger.norm.forward = lambda x: F.layer_norm(x.reshape(-1, merger.joined), (merger.joined,), weight, bias,
                                                 merger.norm.eps).reshape(x.shape)


@fault("graph", "contract", "decoder.layers.02", "mlp.act", source="N09")
def silu_is_gelu(graph: Reference) -> None:
    """one MLP with GELU where SiLU belongs"""
    mlp = graph.decoder.layers[2].mlp

    def forward(x, name, tap):
        gate, up = (tap(f"{name}.{part}", linear(x)[0])[None] for part, linear in (
            ("gate", mlp.gate_proj), ("up", mlp.up_proj)))
        act = tap(f"{name}.act", (F.gelu(gate) * up)[0])[None]
        return tap(f"{name}.out", mlp.down_proj(act)[0])[None]

    mlp.forward = forward


@fault("graph", "contract", "decoder.layers.01", "mlp.act", source="N09")
def gate_and_up_exchanged(graph: Reference) -> None:
    """SiLU taken of the other projection in one MLP"""
    mlp = graph.decoder.layers[1].mlp

    def forward(x, name, tap):
        gate, up = (tap(f"{name}.{part}", linear(x)[0])[None] for part, linear in (
            ("gate", mlp.gate_proj), ("up", mlp.up_proj)))
        act = tap(f"{name}.act", (gate * F.silu(up))[0])[None]
        return tap(f"{name}.out", mlp.down_proj(act)[0])[None]

    mlp.forward = forward


@fault("graph", "contract", "decoder.layers.03", "input_norm", source="N10")
def statistics_in_half(graph: Reference) -> None:
    """the mean of squares taken in fp16 in one norm: big rows overflow"""
    module = graph.decoder.layers[3].input_layernorm
    module.forward = lambda x: module.weight * x * torch.rsqrt(
        x.half().square().mean(-1, keepdim=True).float() + module.eps)


@fault("graph", "contract", "decoder.layers.00", "input_norm|q_norm|attn.q_norm")
def weight_plus_one(graph: Reference) -> None:
    """norms multiply by 1 + weight, as another family does"""
    for module in rms(graph, ""):
        wrap(module, "forward", lambda plain, x, m=module: plain(x) + plain(x) / m.weight)


@fault("graph", "contract", "decoder.layers.02", "attn.q_norm")
def mean_subtracted(graph: Reference) -> None:
    """one q_norm subtracts the mean: LayerNorm in place of RMSNorm"""
    module = graph.decoder.layers[2].self_attn.q_norm
    wrap(module, "forward", lambda plain, x: plain(x - x.mean(-1, keepdim=True)))


@fault("graph", "contract", "decoder.layers.02", "attn.k_norm")
def norm_over_all_heads(graph: Reference) -> None:
    """one k_norm takes its statistics over all heads together"""
    module = graph.decoder.layers[2].self_attn.k_norm
    module.forward = lambda x: module.weight * x * torch.rsqrt(
        x.square().mean((-2, -1), keepdim=True) + module.eps)


@fault("graph", "none", "none", equivalent=True, source="B06")
def norm_by_another_formula(graph: Reference) -> None:
    """RMSNorm written as a division by the norm"""
    for module in rms(graph, ""):
        module.forward = lambda x, m=module: m.weight * (x / torch.sqrt(x.square().sum(-1, keepdim=True) / x.shape[-1]
                                                                        + m.eps))
