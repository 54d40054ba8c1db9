"""Norms and activations once more: one norm's eps, a table in place of a function, the order of scale and shift."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from harness.faults import fault
from harness.faults.hands import layer_norms, rms, wrap
from harness.graph.reference import Reference


@fault("graph", "contract", "decoder.layers.03", "attn.k_norm", source="N01")
def eps_of_one_key_norm(graph: Reference) -> None:
    """eps 1e-5 in one single k_norm"""
    graph.decoder.layers[3].self_attn.k_norm.eps = 1e-5


@fault("graph", "contract", "decoder.layers.01", "input_norm", source="N01")
def eps_a_tenth_large(graph: Reference) -> None:
    """eps 1.1e-6 in one norm"""
    graph.decoder.layers[1].input_layernorm.eps = 1.1e-6


@fault("graph", "contract", "decoder.norm", source="N01")
def eps_of_the_final_norm_tiny(graph: Reference) -> None:
    """eps 1e-8 in the final norm"""
    graph.decoder.norm.eps = 1e-8


@fault("graph", "contract", "vision.layers.03", "norm1", source="N04")
def eps_of_one_vision_norm(graph: Reference) -> None:
    """eps 1e-5 in the first norm of the last vision block"""
    graph.vision.blocks[3].norm1.eps = 1e-5


@fault("graph", "contract", "vision.merger", "norm", source="N12")
def eps_of_the_main_merger(graph: Reference) -> None:
    """the main merger's norm with eps 1e-12"""
    graph.vision.merger.norm.eps = 1e-12


@fault("graph", "contract", "decoder.layers.02", "post_norm", source="N03")
def eps_grows_by_prescaling(graph: Reference) -> None:
    """one norm divides by 64 to stay within fp16 and adds the same eps after"""
    module = graph.decoder.layers[2].post_attention_layernorm
    wrap(module, "forward", lambda plain, x: plain(x / 64))


@fault("graph", "contract", "decoder.layers.00", "post_norm")
def eps_as_a_floor(graph: Reference) -> None:
    """one norm takes the larger of mean square and eps instead of their sum"""
    module = graph.decoder.layers[0].post_attention_layernorm
    module.forward = lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=module.eps))


@fault("graph", "contract", "decoder.layers.00", "attn.q_norm")
def query_norm_by_length(graph: Reference) -> None:
    """one q_norm as x / max(|x|, eps): no eps under the root"""
    module = graph.decoder.layers[0].self_attn.q_norm
    module.forward = lambda x: module.weight * F.normalize(x, dim=-1, eps=module.eps) * math.sqrt(x.shape[-1])


@fault("graph", "contract", "decoder.layers.02", "attn.k_norm")
def weight_before_the_mean(graph: Reference) -> None:
    """one k_norm multiplies by its weight before it takes the mean of squares"""
    module = graph.decoder.layers[2].self_attn.k_norm

    def forward(x):
        x = module.weight * x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps)

    module.forward = forward


@fault("graph", "contract", "decoder.layers.03", "input_norm")
def mean_over_a_padded_row(graph: Reference) -> None:
    """one norm divides by one element more than the row has"""
    module = graph.decoder.layers[3].input_layernorm
    module.forward = lambda x: module.weight * x * torch.rsqrt(
        x.square().sum(-1, keepdim=True) / (x.shape[-1] + 1) + module.eps)


@fault("graph", "contract|decoder", "decoder.layers.01", "attn.q_norm")
def statistic_of_the_first_head(graph: Reference) -> None:
    """every query head of one layer normalised by the first head's mean"""
    module = graph.decoder.layers[1].self_attn.q_norm
    module.forward = lambda x: module.weight * x * torch.rsqrt(
        x[..., :1, :].square().mean(-1, keepdim=True) + module.eps)


@fault("graph", "contract|decode", "decoder.layers.01|kv.keys.02|kv.values.02", "post_norm|keys|values", source="R10")
def another_eps_while_decoding(graph: Reference) -> None:
    """calls of one token add 1e-3 in one norm: the decode function was exported apart"""
    module = graph.decoder.layers[1].post_attention_layernorm
    _single(module, lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3))


@fault("graph", "contract|decode", "decoder.layers.02|kv.keys.03|kv.values.03", "input_norm", source="N10")
def half_statistics_while_decoding(graph: Reference) -> None:
    """calls of one token take one norm's mean in bfloat16"""
    module = graph.decoder.layers[2].input_layernorm
    _single(module, lambda x: module.weight * x * torch.rsqrt(
        x.bfloat16().square().mean(-1, keepdim=True).float() + module.eps))


def _single(module, other) -> None:
    wrap(module, "forward", lambda plain, x: other(x) if x.shape[1] == 1 else plain(x))


@fault("graph", "contract", "vision.layers.01", "norm1", source="N12")
def variance_from_moments_in_half(graph: Reference) -> None:
    """one vision norm takes E[x^2] - E[x]^2 in fp16"""
    module = graph.vision.blocks[1].norm1

    def forward(x):
        half = x.half()
        mean = half.mean(-1, keepdim=True)
        spread = (half.square().mean(-1, keepdim=True) - mean.square()).float().clamp(min=0)
        return (x - mean.float()) * torch.rsqrt(spread + module.eps) * module.weight + module.bias

    module.forward = forward


@fault("graph", "contract|vision", "vision.layers.02", "norm2", source="N12")
def bias_before_the_weight(graph: Reference) -> None:
    """one vision norm adds its bias before it multiplies"""
    module = graph.vision.blocks[2].norm2
    module.forward = lambda x: (F.layer_norm(x, x.shape[-1:], eps=module.eps) + module.bias) * module.weight


@fault("graph", "contract|vision", "vision.layers.00", "norm2")
def vision_norm_keeps_the_mean(graph: Reference) -> None:
    """one vision norm forgets to subtract the mean"""
    module = graph.vision.blocks[0].norm2
    module.forward = lambda x: x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + module.eps) * module.weight + module.bias


def _merger_gelu(merger, activation) -> None:
    def forward(x, name, tap):
        x = merger.norm(x.reshape(-1, merger.joined)) if merger.norm_after_join else merger.norm(x).reshape(
            -1, merger.joined)
        wide = tap(f"{name}.fc1", merger.linear_fc1(tap(f"{name}.norm", x)))
        return tap(name, merger.linear_fc2(tap(f"{name}.act", activation(wide))))

    merger.forward = forward


def _block_gelu(mlp, activation) -> None:
    mlp.forward = lambda x, name, tap: tap(f"{name}.out", mlp.linear_fc2(tap(f"{name}.act", activation(
        tap(f"{name}.fc1", mlp.linear_fc1(x))))))


@fault("graph", "contract", "vision.deepstack.2", "act", source="N06")
def one_merger_gelu_tanh(graph: Reference) -> None:
    """the last DeepStack merger with the tanh GELU"""
    _merger_gelu(graph.vision.deepstack_merger_list[2], lambda x: F.gelu(x, approximate="tanh"))


@fault("graph", "contract", "vision.layers.02", "mlp.act", source="N06")
def one_block_gelu_exact(graph: Reference) -> None:
    """one vision block with the exact GELU"""
    _block_gelu(graph.vision.blocks[2].mlp, F.gelu)


@fault("graph", "contract", "vision.layers.01", "mlp.act", source="N06")
def gelu_constant_short(graph: Reference) -> None:
    """one block's tanh GELU with 0.0447 for 0.044715"""
    _block_gelu(graph.vision.blocks[1].mlp, lambda x: 0.5 * x * (1 + torch.tanh(
        math.sqrt(2 / math.pi) * (x + 0.0447 * x**3))))


@fault("graph", "contract", "vision.merger", "act", source="N06")
def gelu_table_ends_at_three(graph: Reference) -> None:
    """the main merger's GELU from a table on [-3, 3], a straight line past it"""
    _merger_gelu(graph.vision.merger, lambda x: torch.where(x.abs() < 3, F.gelu(x), x.clamp(min=0)))


@fault("graph", "contract", "vision.deepstack.0", "act", source="N06")
def one_merger_gelu_quick(graph: Reference) -> None:
    """the first DeepStack merger with x * sigmoid(1.702 x)"""
    _merger_gelu(graph.vision.deepstack_merger_list[0], lambda x: x * torch.sigmoid(1.702 * x))


def _silu(mlp, activation) -> None:
    def forward(x, name, tap):
        gate, up = (tap(f"{name}.{part}", linear(x)[0])[None] for part, linear in (
            ("gate", mlp.gate_proj), ("up", mlp.up_proj)))
        act = tap(f"{name}.act", (activation(gate) * up)[0])[None]
        return tap(f"{name}.out", mlp.down_proj(act)[0])[None]

    mlp.forward = forward


@fault("graph", "contract", "decoder.layers.03", "mlp.act", source="N09")
def silu_table_ends_at_eight(graph: Reference) -> None:
    """one SiLU from a table on [-8, 8], a straight line past it"""
    _silu(graph.decoder.layers[3].mlp, lambda x: torch.where(x.abs() < 8, F.silu(x), x.clamp(min=0)))


@fault("graph", "contract", "decoder.layers.00", "mlp.act", source="N09")
def silu_in_bfloat16(graph: Reference) -> None:
    """one SiLU computed in bfloat16"""
    _silu(graph.decoder.layers[0].mlp, lambda x: F.silu(x.bfloat16()).float())


@fault("graph", "contract", "decoder.layers.02", "mlp.act", source="N09")
def silu_hard(graph: Reference) -> None:
    """one SiLU as x * hard_sigmoid(x)"""
    _silu(graph.decoder.layers[2].mlp, F.hardswish)


@fault("graph", "contract", "vision.layers.00", "norm1", source="N04")
def first_norms_unbiased(graph: Reference) -> None:
    """the first norm of every vision block divides by n - 1"""
    for module in layer_norms(graph, "norm1"):
        module.forward = lambda x, m=module: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
            x.var(-1, keepdim=True) + m.eps) * m.weight + m.bias


@fault("graph", "contract", "decoder.layers.00", "input_norm|attn.q_norm", source="N10")
def reciprocal_root_in_half(graph: Reference) -> None:
    """the reciprocal root of every text norm rounded to fp16"""
    for module in rms(graph, ""):
        module.forward = lambda x, m=module: m.weight * x * torch.rsqrt(
            x.square().mean(-1, keepdim=True) + m.eps).half().float()
