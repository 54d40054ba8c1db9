"""Weights, on their way from shard to graph: a fused tensor's edge, one head, one column, a few rows, an adapter."""

from __future__ import annotations

import torch

from harness.faults import fault
from harness.graph.reference import Reference
from harness.graph.vision import interpolate_positions

TEXT, VISION = "model.language_model.layers", "model.visual"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@fault("graph", "weights", HEAD, source="W01")
def head_one_row_down(graph: Reference) -> None:
    """the head's rows one token further: a vocabulary cut at its other end"""
    weight = graph.decoder.lm_head.weight
    weight.data = weight.data.roll(1, 0)


@fault("graph", "weights", HEAD, source="W13")
def padding_rows_of_the_head(graph: Reference) -> None:
    """the last eight rows of the head are the zeros of a padded vocabulary"""
    graph.decoder.lm_head.weight.data[-8:] = 0


@fault("graph", "weights", EMBEDDING, source="W01")
def embedding_is_head(graph: Reference) -> None:
    """the untied head copied over the embedding"""
    graph.decoder.embed_tokens.weight.data = graph.decoder.lm_head.weight.data.clone()


@fault("graph", "weights", EMBEDDING, source="W13")
def added_tokens_exchanged(graph: Reference) -> None:
    """the embeddings of two neighbouring added tokens in each other's place"""
    rows = graph.decoder.embed_tokens.weight.data
    rows[[501, 502]] = rows[[502, 501]].clone()


@fault("graph", "weights", f"{VISION}.blocks.3.attn.qkv.weight", "qkv|attn.v", source="W03")
def value_third_of_another_block(graph: Reference) -> None:
    """the value third of one fused projection comes from the block before"""
    third = 2 * graph.geometry.vision_hidden
    blocks = graph.vision.blocks
    blocks[3].attn.qkv.weight.data[third:] = blocks[2].attn.qkv.weight.data[third:]


@fault("graph", "weights", f"{VISION}.blocks.2.attn.qkv.bias", "qkv|attn.k_rope", source="W07")
def key_bias_lost(graph: Reference) -> None:
    """the key third of one fused bias lost"""
    bias = graph.vision.blocks[2].attn.qkv.bias.data
    bias[len(bias) // 3:2 * len(bias) // 3] = 0


@fault("graph", "weights", f"{TEXT}.0.self_attn.q_proj.weight", "q_proj|attn.q_norm", source="W06")
def one_query_head_interleaved(graph: Reference) -> None:
    """rows of the last query head of one layer permuted for the other pairing of lanes"""
    attention = graph.decoder.layers[0].self_attn
    size = attention.head_dim
    rows = attention.q_proj.weight.data
    rows[-size:] = rows[-size:].reshape(2, size // 2, -1).transpose(0, 1).reshape(size, -1).clone()


@fault("graph", "weights", f"{TEXT}.3.self_attn.k_proj.weight", "k_proj|attn.k_norm", source="W06")
def key_heads_exchanged(graph: Reference) -> None:
    """the two key heads of one layer exchanged, the values not"""
    attention = graph.decoder.layers[3].self_attn
    attention.k_proj.weight.data = attention.k_proj.weight.data.roll(attention.head_dim, 0)


@fault("graph", "weights", f"{TEXT}.2.mlp.gate_proj.weight|{TEXT}.2.mlp.up_proj.weight",
       "gate_proj|up_proj|mlp.gate|mlp.up", source="W03")
def fused_projection_cut_one_row_late(graph: Reference) -> None:
    """a fused gate and up matrix split one row too late"""
    mlp = graph.decoder.layers[2].mlp
    fused = torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data])
    size = mlp.gate_proj.out_features
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = fused[1:size + 1].clone(), fused.roll(-1, 0)[size:].clone()


@fault("graph", "weights", f"{TEXT}.2.mlp.up_proj.weight", "up_proj|mlp.up", source="W10")
def up_reshaped(graph: Reference) -> None:
    """a projection that is not square reshaped where it had to be transposed"""
    weight = graph.decoder.layers[2].mlp.up_proj.weight
    weight.data = weight.data.T.reshape(weight.shape).contiguous()


@fault("graph", "weights", f"{TEXT}.0.mlp.down_proj.weight", "down_proj|mlp.out", source="W13")
def last_column_lost(graph: Reference) -> None:
    """the last input column of one projection zero: a shard one element short"""
    graph.decoder.layers[0].mlp.down_proj.weight.data[:, -1] = 0


@fault("graph", "weights", f"{TEXT}.3.self_attn.o_proj.weight", "o_proj|attn.out")
def output_a_thousandth_large(graph: Reference) -> None:
    """one output projection times 1.001: a decay applied once more"""
    graph.decoder.layers[3].self_attn.o_proj.weight.data *= 1.001


@fault("graph", "weights", f"{TEXT}.1.self_attn.v_proj.weight", "v_proj|attn.v")
def adapter_merged(graph: Reference) -> None:
    """an adapter of rank one left merged into one value projection"""
    weight = graph.decoder.layers[1].self_attn.v_proj.weight.data
    generator = torch.Generator().manual_seed(5)
    down, up = (torch.randn(size, generator=generator) for size in (weight.shape[1], weight.shape[0]))
    weight += 1e-3 * weight.std() * torch.outer(up, down)


@fault("graph", "weights", f"{TEXT}.3.self_attn.q_norm.weight", "q_norm|attn.q_norm", source="W14")
def head_norm_of_the_layer_before(graph: Reference) -> None:
    """one query norm holds the weight of the layer before"""
    layers = graph.decoder.layers
    layers[3].self_attn.q_norm.weight.data = layers[2].self_attn.q_norm.weight.data.clone()


@fault("graph", "weights", f"{VISION}.deepstack_merger_list.2.linear_fc2.bias", "linear_fc2|output", source="W07")
def merger_bias_of_its_neighbour(graph: Reference) -> None:
    """the last DeepStack merger's output bias comes from the one before"""
    mergers = graph.vision.deepstack_merger_list
    mergers[2].linear_fc2.bias.data = mergers[1].linear_fc2.bias.data.clone()


@fault("graph", "weights", f"{VISION}.patch_embed.proj.weight", source="W04")
def kernel_colours_reversed(graph: Reference) -> None:
    """the patch kernel imported blue first"""
    weight = graph.vision.patch_embed.proj.weight
    weight.data = weight.data.reshape(len(weight), graph.geometry.channels, -1).flip(1).reshape(weight.shape)


@fault("graph", "weights", f"{VISION}.pos_embed.weight", source="W13")
def last_row_of_the_position_table(graph: Reference) -> None:
    """the last row of the learned positions was never loaded"""
    graph._positions = graph._positions.clone()
    graph._positions[-1] = 0
    graph.vision.positions.data = interpolate_positions(graph._positions, *graph.grid, graph.geometry.merge)


@fault("graph", "weights", f"{VISION}.merger.norm.bias", "norm", source="W07")
def merger_norm_bias_lost(graph: Reference) -> None:
    """the main merger's norm has no bias"""
    graph.vision.merger.norm.bias.data.zero_()


@fault("graph", "weights", f"{TEXT}.1.post_attention_layernorm.weight", "post_attention_layernorm|post_norm",
       source="W09")
def norm_at_its_initial_value(graph: Reference) -> None:
    """one norm's weight left at ones"""
    graph.decoder.layers[1].post_attention_layernorm.weight.data.fill_(1)
