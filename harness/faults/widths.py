"""Overflow and width once more: models without room in other places, one prompt, one step, and products in fewer bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from harness.faults import fault
from harness.faults.hands import wrap
from harness.faults.loop import Loop
from harness.graph.reference import Reference

Weights = dict[str, torch.Tensor]
TEXT, BLOCKS = "model.language_model.layers", "model.visual.blocks"


@fault("model", "headroom", "decoder.layers.01.attn.k_norm|decoder.layers.01.attn.k_rope|decoder.layers.01",
       source="O03")
def key_norm_huge(weights: Weights) -> None:
    """a key norm that brings k to the limit, its query norm as small"""
    weights[f"{TEXT}.1.self_attn.k_norm.weight"] *= 2.0**14
    weights[f"{TEXT}.1.self_attn.q_norm.weight"] /= 2.0**14


@fault("model", "headroom", "decoder.layers.00", "input_norm", source="O07")
def normed_input_huge(weights: Weights) -> None:
    """an input norm whose output leaves fp16, the projections behind it as small"""
    weights[f"{TEXT}.0.input_layernorm.weight"] *= 2.0**15
    for part in "qkv":
        weights[f"{TEXT}.0.self_attn.{part}_proj.weight"] /= 2.0**15


@fault("model", "headroom", "decoder.norm", source="O06")
def final_norm_huge(weights: Weights) -> None:
    """a final norm whose output leaves fp16, the head as small"""
    weights["model.language_model.norm.weight"] *= 2.0**14
    weights["lm_head.weight"] /= 2.0**14


@fault("model", "headroom", "vision.layers.01", "attn.v|attn.context", source="O01")
def vision_values_huge(weights: Weights) -> None:
    """values of one vision block past fp16, its output unchanged"""
    third = len(weights[f"{BLOCKS}.1.attn.qkv.weight"]) * 2 // 3
    for part in ("weight", "bias"):
        weights[f"{BLOCKS}.1.attn.qkv.{part}"][third:] *= 2.0**17
    weights[f"{BLOCKS}.1.attn.proj.weight"] /= 2.0**17


@fault("model", "headroom", "vision.deepstack.1", "norm", source="O01")
def merger_norm_huge(weights: Weights) -> None:
    """one DeepStack merger's norm past fp16, the projection behind it as small"""
    name = "model.visual.deepstack_merger_list.1"
    for part in ("weight", "bias"):
        weights[f"{name}.norm.{part}"] *= 2.0**16
    weights[f"{name}.linear_fc1.weight"] /= 2.0**16


@fault("model", "headroom", "decoder.embed", source="O07")
def embedding_huge(weights: Weights) -> None:
    """text embeddings past fp16"""
    weights["model.language_model.embed_tokens.weight"] *= 2.0**20


@fault("graph", "contract|decoder", "decoder.layers.00", "attn.context", source="O03")
def scores_in_half(graph: Reference) -> None:
    """the product of q and k in fp16 before the scale, in the first layer"""
    attention = graph.decoder.layers[0].self_attn

    def attend(q, keys, values, visible):
        scores = (q.half().float() @ keys.half().float().transpose(2, 3)).half().float() * attention.scale
        return scores.masked_fill(~visible, -1e4).softmax(-1) @ values

    attention.attend = attend


@fault("graph", "contract|decoder", "decoder.layers.02", "output|mlp.out", source="O09")
def residual_in_half(graph: Reference) -> None:
    """one layer's stream rounded to fp16 where it leaves the layer"""
    wrap(graph.decoder.layers[2].mlp, "forward", lambda plain, *arguments: plain(*arguments).half().float())


@fault("graph", "contract|decoder", "decoder.layers.01", "attn.out", source="O03")
def output_in_tf32(graph: Reference) -> None:
    """one output projection with 10-bit mantissas, as TF32 products have"""
    linear = graph.decoder.layers[1].self_attn.o_proj
    linear.forward = lambda x: F.linear(_tf32(x), _tf32(linear.weight))


@fault("graph", "contract|vision", "vision.layers.02", "mlp.fc1", source="O04")
def vision_projection_in_bfloat16(graph: Reference) -> None:
    """one vision projection takes bfloat16"""
    linear = graph.vision.blocks[2].mlp.linear_fc1
    wrap(linear, "forward", lambda plain, x: plain(x.bfloat16().float()))


@fault("graph", "contract|decoder", "logits", source="O09")
def logits_in_bfloat16(graph: Reference) -> None:
    """logits leave in bfloat16"""
    wrap(graph.decoder.lm_head, "forward", lambda plain, x: plain(x).bfloat16().float())


def _tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _bend(loop: Loop, seam: str, change, when=lambda: True) -> None:
    wrap(loop, "bend", lambda plain, name, value: change(plain(name, value)) if name == seam and when() else plain(
        name, value))


@fault("engine", "engine", "vision.layers.03", source="O01")
def one_prompt_overflows(loop: Loop) -> None:
    """the last vision block saturates for one prompt only"""
    _bend(loop, "vision.layers.03", lambda value: value.clamp(-0.5 * value.abs().max(), 0.5 * value.abs().max()),
          lambda: loop.name == "early-image-two-turns")


@fault("engine", "engine", "decoder.layers.03", source="O07")
def overflow_at_the_last_step(loop: Loop) -> None:
    """one channel of the last layer is infinite at the very last step"""
    def change(value):
        value = value.clone()
        value[-1, -1] = float("inf")
        return value

    _bend(loop, "decoder.layers.03", change, lambda: loop.length == loop.subject.recorded(loop.name).inputs.length + 23)


@fault("engine", "engine", "logits", source="O07")
def last_logit_at_the_limit(loop: Loop) -> None:
    """the last logit of every row clamped at the smallest fp16"""
    def read(plain, logits):
        logits = plain(logits).copy()
        logits[:, -1] = -65504
        return logits

    wrap(loop, "read", read)


@fault("engine", "engine", "decoder.layers.01|kv.values.01", "output|values", source="O06")
def values_clamped(loop: Loop) -> None:
    """values of one layer clamped at eight tenths of the largest"""
    _bend(loop, "decoder.layers.01.attn.v", lambda value: value.clamp(-0.8 * value.abs().max(), 0.8 * value.abs().max()))


@fault("engine", "engine", "vision.layers.01", source="O04")
def one_block_in_bfloat16(loop: Loop) -> None:
    """one vision block leaves in bfloat16"""
    _bend(loop, "vision.layers.01", lambda value: value.bfloat16().float())


@fault("engine", "engine", "decoder.layers.02", source="O09")
def one_layer_in_bfloat16(loop: Loop) -> None:
    """one decoder layer leaves in bfloat16"""
    _bend(loop, "decoder.layers.02", lambda value: value.bfloat16().float())


@fault("engine", "engine", "vision.merger|decoder.embed", source="O06")
def image_rows_clamped(loop: Loop) -> None:
    """image embeddings clamped at seven tenths of the largest as they are handed over"""
    def bind(plain, *arguments):
        plain(*arguments)
        loop.image = loop.image.clamp(-0.7 * loop.image.abs().max(), 0.7 * loop.image.abs().max())

    wrap(loop, "bind", bind)


@fault("engine", "engine", "decoder.layers.00|kv.keys.00", source="O03")
def rotated_keys_lose_digits(loop: Loop) -> None:
    """keys of the first layer with seven bits of mantissa"""
    _bend(loop, "decoder.layers.00.attn.k_rope", lambda value: value.bfloat16().float())
