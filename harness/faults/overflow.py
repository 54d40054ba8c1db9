"""Overflow and width: values past fp16, sums in too few bits, and models whose activations leave no room."""

from __future__ import annotations

import torch

from harness.faults import fault
from harness.faults.hands import wrap
from harness.faults.loop import Loop

Weights = dict[str, torch.Tensor]
TEXT, BLOCKS = "model.language_model.layers", "model.visual.blocks"


def _scaled(weights: Weights, up: str, down: str, factor: float) -> None:
    """The same function with the values between two layers `factor` times as large."""
    weights[up] = weights[up] * factor
    weights[down] = weights[down] / factor


@fault("model", "headroom", "decoder.layers.02.mlp.up|decoder.layers.02.mlp.act", "mlp.up|mlp.act", source="O06")
def inner_activation_near_the_limit(weights: Weights) -> None:
    """one MLP's inner activation at the edge of fp16, its output unchanged"""
    _scaled(weights, f"{TEXT}.2.mlp.up_proj.weight", f"{TEXT}.2.mlp.down_proj.weight", 2.0**14)


@fault("model", "headroom", "decoder.layers.01.attn.v", "attn.v|attn.context", source="O07")
def values_past_the_limit(weights: Weights) -> None:
    """attention values past fp16 inside one layer, its output unchanged"""
    _scaled(weights, f"{TEXT}.1.self_attn.v_proj.weight", f"{TEXT}.1.self_attn.o_proj.weight", 2.0**17)


@fault("model", "headroom", "vision.layers.03", "mlp.out", source="O01")
def last_vision_block_large(weights: Weights) -> None:
    """the last vision block's output past fp16"""
    for part in ("weight", "bias"):
        weights[f"{BLOCKS}.3.mlp.linear_fc2.{part}"] *= 2.0**17


@fault("model", "headroom", "decoder.layers.03", "attn.q_norm|attn.q_rope", source="O03")
def query_norm_huge(weights: Weights) -> None:
    """a query norm whose weight brings q to the limit"""
    weights[f"{TEXT}.3.self_attn.q_norm.weight"] *= 2.0**14


@fault("model", "headroom", "logits")
def logits_huge(weights: Weights) -> None:
    """a head whose logits leave fp16"""
    weights["lm_head.weight"] *= 2.0**13


@fault("engine", "engine", "vision.layers.03", source="O01")
def last_block_saturates(loop: Loop) -> None:
    """the largest values of the last vision block saturate"""
    wrap(loop, "bend", lambda plain, name, value: value.clamp(-0.6 * value.abs().max(), 0.6 * value.abs().max())
         if name == "vision.layers.03" else value)


@fault("engine", "engine", "decoder.layers.01", source="O07")
def not_a_number_in_one_token(loop: Loop) -> None:
    """an overflow inside an op: one token of one layer is NaN at the second call"""
    def bend(plain, name, value):
        if name == "decoder.layers.01" and loop.calls == 1:
            value = value.clone()
            value[-1] = float("nan")
        return value

    wrap(loop, "bend", bend)


@fault("engine", "engine", "decoder.layers.00|kv.keys.00|kv.values.00", source="O03")
def projections_lose_digits(loop: Loop) -> None:
    """q, k and v of every layer 1.3 % off, at random"""
    generator = torch.Generator().manual_seed(3)
    wrap(loop, "bend", lambda plain, name, value: value * (1 + 0.013 * torch.randn(value.shape, generator=generator))
         if name.endswith(("attn.q_norm", "attn.k_norm", "attn.v")) and name.startswith("decoder") else value)


@fault("engine", "engine", "decoder.layers.00", source="O03")
def scores_a_little_small(loop: Loop) -> None:
    """attention scores times 0.95 on the engine"""
    plain = loop.graph

    def graph(grid):
        made = plain(grid)
        for layer in made.decoder.layers:
            layer.self_attn.scale = 0.95 * made.geometry.head_dim**-0.5
        return made

    loop.graph = graph


@fault("engine", "engine", "vision.layers.02", source="O04")
def a_few_rows_of_one_block_fail(loop: Loop) -> None:
    """three patches of one vision block lose half their value"""
    def bend(plain, name, value):
        if name == "vision.layers.02":
            value = value.clone()
            value[[5, 77, 91]] *= 0.5
        return value

    wrap(loop, "bend", bend)


@fault("engine", "engine", "decoder.layers.02", source="O09")
def subnormals_flushed_high(loop: Loop) -> None:
    """values below 2^-4 become zero in one layer"""
    wrap(loop, "bend", lambda plain, name, value: torch.where(value.abs() < 2.0**-4, 0.0, value)
         if name == "decoder.layers.02" else value)


@fault("engine", "engine", "logits", source="O07")
def logits_overflow(loop: Loop) -> None:
    """one logit of each row infinite"""
    def read(plain, logits):
        logits = plain(logits).copy()
        logits[:, 7] = float("inf")
        return logits

    wrap(loop, "read", read)


@fault("engine", "engine", "decoder.layers.03", source="O06")
def largest_values_clamped(loop: Loop) -> None:
    """one layer clamped at nine tenths of its largest value"""
    wrap(loop, "bend", lambda plain, name, value: value.clamp(-0.9 * value.abs().max(), 0.9 * value.abs().max())
         if name == "decoder.layers.03" else value)


@fault("engine", "none", "none", equivalent=True, source="B01")
def rounded_twice(loop: Loop) -> None:
    """every second seam rounded once more, from slightly below"""
    wrap(loop, "bend", lambda plain, name, value: (value * (1 - 2.0**-13)).half().float()
         if name.endswith(".out") and not loop.wide else value)
