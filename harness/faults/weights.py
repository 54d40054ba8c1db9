"""Weights: a tensor lost, copied, cut, turned, stale in one row, or standing in another's place."""

from __future__ import annotations

import torch

from harness.faults import fault
from harness.graph.reference import Reference

TEXT, VISION = "model.language_model.layers", "model.visual"


@fault("graph", "weights", "lm_head.weight", source="W01")
def head_is_embedding(graph: Reference) -> None:
    """the embedding copied over an untied head"""
    graph.decoder.lm_head.weight = graph.decoder.embed_tokens.weight


@fault("graph", "weights", f"{TEXT}.1.self_attn.q_proj.weight", "q_proj|attn.q_norm", source="W03")
def query_never_loaded(graph: Reference) -> None:
    """one query projection left at its random initialisation"""
    weight = graph.decoder.layers[1].self_attn.q_proj.weight.data
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std())


@fault("graph", "weights", f"{VISION}.patch_embed.proj.weight", source="W04")
def one_temporal_slice(graph: Reference) -> None:
    """the patch kernel's second temporal slice lost"""
    geometry, weight = graph.geometry, graph.vision.patch_embed.proj.weight.data
    weight.view(-1, geometry.channels, geometry.temporal_patch, geometry.patch**2)[:, :, 1] = 0


@fault("graph", "weights", f"{VISION}.patch_embed.proj.bias", source="W04")
def patch_bias_lost(graph: Reference) -> None:
    """the patch embedding's bias is None"""
    graph.vision.patch_embed.proj.bias.data.zero_()


@fault("graph", "weights", f"{TEXT}.2.self_attn.k_proj.weight", "k_proj|attn.k_norm", source="W06")
def key_rows_interleaved(graph: Reference) -> None:
    """key rows permuted for the other pairing of rotary lanes, in one layer"""
    attention = graph.decoder.layers[2].self_attn
    rows = attention.k_proj.weight.data.view(-1, 2, attention.head_dim // 2, attention.k_proj.in_features)
    attention.k_proj.weight.data = rows.transpose(1, 2).reshape(attention.k_proj.weight.shape).contiguous()


@fault("graph", "weights", f"{TEXT}.1.self_attn.q_proj.weight", "q_proj|attn.q_norm", source="W06")
def query_heads_reversed(graph: Reference) -> None:
    """query heads in another order than the key-value heads they belong to"""
    attention = graph.decoder.layers[1].self_attn
    rows = attention.q_proj.weight.data.view(-1, attention.head_dim, attention.q_proj.in_features)
    attention.q_proj.weight.data = rows.flip(0).reshape(attention.q_proj.weight.shape).contiguous()


@fault("graph", "weights", f"{VISION}.blocks.2.mlp.linear_fc1.bias", "linear_fc1|mlp.fc1", source="W07")
def block_bias_lost(graph: Reference) -> None:
    """the bias of one vision block's first projection lost"""
    graph.vision.blocks[2].mlp.linear_fc1.bias.data.zero_()


@fault("graph", "weights", f"{VISION}.blocks.1.attn.qkv.bias", "qkv|attn.v", source="W07")
def value_bias_lost(graph: Reference) -> None:
    """the value third of one fused bias lost"""
    bias = graph.vision.blocks[1].attn.qkv.bias.data
    bias[2 * len(bias) // 3:] = 0


@fault("graph", "weights", f"{VISION}.blocks.3.norm2.bias", "norm2", source="W07")
def norm_bias_lost(graph: Reference) -> None:
    """one vision norm's bias dropped"""
    graph.vision.blocks[3].norm2.bias.data.zero_()


@fault("graph", "weights", f"{TEXT}.2.self_attn.v_proj.weight", "v_proj|attn.v", source="W10")
def value_reshaped_not_transposed(graph: Reference) -> None:
    """a square value projection transposed"""
    linear = graph.decoder.layers[2].self_attn.v_proj
    linear.weight.data = linear.weight.data.T.contiguous()


@fault("graph", "weights", f"{VISION}.blocks.0.attn.proj.weight", "proj|attn.out", source="W10")
def vision_projection_transposed(graph: Reference) -> None:
    """a square output projection of the vision tower transposed"""
    linear = graph.vision.blocks[0].attn.proj
    linear.weight.data = linear.weight.data.T.contiguous()


@fault("graph", "weights", f"{TEXT}.3.self_attn.o_proj.weight", "o_proj|attn.out", source="W10")
def output_reshaped(graph: Reference) -> None:
    """an output projection reshaped where it had to be transposed"""
    weight = graph.decoder.layers[3].self_attn.o_proj.weight
    weight.data = weight.data.T.reshape(weight.shape).contiguous()


@fault("graph", "weights", f"{TEXT}.3.mlp.down_proj.weight", "down_proj|mlp.out", source="W13")
def one_row_stale(graph: Reference) -> None:
    """one output row of one projection is zero"""
    graph.decoder.layers[3].mlp.down_proj.weight.data[11] = 0


@fault("graph", "weights", "lm_head.weight", source="W13")
def one_head_row_stale(graph: Reference) -> None:
    """the head's row of one token is zero"""
    graph.decoder.lm_head.weight.data[graph.geometry.vocab // 3] = 0


@fault("graph", "weights", "model.language_model.embed_tokens.weight", source="W13")
def one_embedding_row_stale(graph: Reference) -> None:
    """the embedding of one token that no prompt holds is zero"""
    graph.decoder.embed_tokens.weight.data[graph.geometry.vocab - 3] = 0


@fault("graph", "weights", f"{TEXT}.1.mlp.up_proj.weight", "up_proj|mlp.up", source="W13")
def one_element_flipped(graph: Reference) -> None:
    """one element of one projection has the other sign"""
    graph.decoder.layers[1].mlp.up_proj.weight.data[7, 5] *= -1


@fault("graph", "weights", f"{TEXT}.2.input_layernorm.weight|{TEXT}.2.post_attention_layernorm.weight",
       "input_layernorm|post_attention_layernorm|input_norm|post_norm", source="W14")
def norms_exchanged(graph: Reference) -> None:
    """the two norms of one layer exchanged"""
    layer = graph.decoder.layers[2]
    layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


@fault("graph", "weights", f"{TEXT}.1.self_attn.k_norm.weight|{TEXT}.1.self_attn.q_norm.weight",
       "q_norm|k_norm|attn.q_norm|attn.k_norm", source="W14")
def head_norms_exchanged(graph: Reference) -> None:
    """q_norm and k_norm of one layer exchanged"""
    attention = graph.decoder.layers[1].self_attn
    attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm


@fault("graph", "weights", f"{TEXT}.1.*|{TEXT}.2.*")
def layers_exchanged(graph: Reference) -> None:
    """two decoder layers in each other's place"""
    for first, second in zip(graph.decoder.layers[1].parameters(), graph.decoder.layers[2].parameters()):
        first.data, second.data = second.data.clone(), first.data.clone()


@fault("graph", "weights", f"{TEXT}.0.mlp.gate_proj.weight|{TEXT}.0.mlp.up_proj.weight",
       "gate_proj|up_proj|mlp.gate|mlp.up", source="W10")
def gate_and_up_loaded_crosswise(graph: Reference) -> None:
    """gate and up projection loaded into each other"""
    mlp = graph.decoder.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


@fault("graph", "weights", "model.language_model.norm.weight")
def final_norm_of_a_layer(graph: Reference) -> None:
    """the final norm holds the last layer's weight"""
    graph.decoder.norm.weight.data = graph.decoder.layers[-1].input_layernorm.weight.data.clone()


@fault("graph", "weights", f"{VISION}.merger.linear_fc2.weight", "linear_fc2|output")
def merger_rounded(graph: Reference) -> None:
    """one weight passed through an 8-bit float on its way"""
    linear = graph.vision.merger.linear_fc2
    linear.weight.data = linear.weight.data.to(torch.float8_e4m3fn).float()


@fault("graph", "none", "none", equivalent=True, source="B19")
def head_copied(graph: Reference) -> None:
    """the head held as a second, equal tensor"""
    graph.decoder.lm_head.weight = torch.nn.Parameter(graph.decoder.lm_head.weight.data.clone())
