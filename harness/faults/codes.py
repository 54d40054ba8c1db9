"""Quantization once more: one block, one row, one end of the grid, and values that passed through another grid before."""

from __future__ import annotations

import numpy as np
import torch

from harness.faults import fault
from harness.faults.tables import Table, Tables
from harness.graph.quantize import CLIPPED, Scheme, dequantize, expected_codes

TEXT = "model.language_model.layers"
GATE, UP = f"{TEXT}.0.mlp.gate_proj.weight", f"{TEXT}.0.mlp.up_proj.weight"
QUERY, OUTPUT = f"{TEXT}.3.self_attn.q_proj.weight", f"{TEXT}.2.self_attn.o_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


def _weight(shipped: Tables, name: str) -> torch.Tensor:
    return shipped.subject.checkpoint.tensor(name).to(torch.float16)


def _take(table: Table, codes: torch.Tensor, scale: torch.Tensor) -> None:
    table.codes, table.scale = codes.numpy().copy(), scale.numpy().copy()


@fault("bundle", "weights", GATE, "gate_proj", source="Q12")
def one_block_truncated(shipped: Tables) -> None:
    """codes of one block of every row cut towards zero"""
    table, weight = shipped.tables[GATE], _weight(shipped, GATE).float().numpy()
    ratio = weight[:, 32:64] / table.scale[:, 1:2].astype(np.float32)
    table.codes[:, 32:64] = np.trunc(ratio).clip(-127, 127)


@fault("bundle", "weights", GATE, "gate_proj", source="Q12")
def codes_rounded_down(shipped: Tables) -> None:
    """codes of one row rounded towards minus infinity"""
    table, weight = shipped.tables[GATE], _weight(shipped, GATE).float().numpy()
    scale = np.repeat(table.scale[7], 32).astype(np.float32)
    table.codes[7] = np.floor(weight[7] / scale).clip(-127, 127)


@fault("bundle", "weights", OUTPUT, "o_proj", source="Q04")
def one_zero_point_off(shipped: Tables) -> None:
    """the zero point of one block of one row is one"""
    shipped.tables[OUTPUT].offset[40, 2] = 1


@fault("bundle", "weights", OUTPUT, "o_proj", source="Q03")
def scales_of_two_rows_exchanged(shipped: Tables) -> None:
    """two neighbouring rows have each other's scales"""
    scale = shipped.tables[OUTPUT].scale
    scale[[20, 21]] = scale[[21, 20]]


@fault("bundle", "weights", f"{TEXT}.0.self_attn.k_proj.weight|{TEXT}.1.self_attn.k_proj.weight", "k_proj")
def codes_of_two_layers_exchanged(shipped: Tables) -> None:
    """int8 codes of two layers exchanged, scales in place"""
    first, second = (shipped.tables[f"{TEXT}.{layer}.self_attn.k_proj.weight"] for layer in (0, 1))
    first.codes, second.codes = second.codes, first.codes


@fault("bundle", "weights", QUERY, "q_proj", source="Q03")
def one_scale_one_step_down(shipped: Tables) -> None:
    """one scale one fp16 step too small"""
    scale = shipped.tables[QUERY].scale
    scale[100, 1] = np.nextafter(scale[100, 1], np.float16(0))


@fault("bundle", "weights", QUERY, "q_proj", source="Q03")
def one_scale_zero(shipped: Tables) -> None:
    """one scale underflowed to zero"""
    shipped.tables[QUERY].scale[0, 0] = 0


@fault("bundle", "weights", QUERY, "q_proj", source="Q03")
def one_scale_infinite(shipped: Tables) -> None:
    """one scale is infinite"""
    shipped.tables[QUERY].scale[5, 1] = np.inf


@fault("bundle", "weights", HEAD, source="Q01")
def three_head_rows_clipped(shipped: Tables) -> None:
    """the rows of three added tokens clipped at 0.9 of the largest"""
    table, weight = shipped.tables[HEAD], _weight(shipped, HEAD).float().numpy()
    scale = (table.scale[500:503].astype(np.float32) * 0.9).astype(np.float16)
    ratio = weight[500:503] / np.repeat(scale, 32, axis=1).astype(np.float32)
    table.scale[500:503], table.codes[500:503] = scale, np.round(ratio).clip(-127, 127)


@fault("bundle", "weights", HEAD, source="W01")
def head_quantized_from_the_embedding(shipped: Tables) -> None:
    """the quantized head made of the embedding: taken for a tied checkpoint"""
    from harness.graph.quantize import PLAIN

    _take(shipped.tables[HEAD], *expected_codes(_weight(shipped, EMBEDDING), PLAIN))


@fault("bundle", "weights", HEAD, source="Q01")
def head_on_the_grid_of_the_body(shipped: Tables) -> None:
    """the head on the body's grid, absmax / 127"""
    _take(shipped.tables[HEAD], *expected_codes(_weight(shipped, HEAD), CLIPPED))


@fault("bundle", "weights", "model.visual.blocks.2.mlp.linear_fc1.weight", "linear_fc1", source="Q13")
def vision_weight_was_quantized(shipped: Tables) -> None:
    """a vision weight stored in fp16, its values from an int8 grid"""
    _through_int8(shipped, "model.visual.blocks.2.mlp.linear_fc1.weight")


@fault("bundle", "weights", EMBEDDING, source="Q13")
def embedding_was_quantized(shipped: Tables) -> None:
    """the embedding stored in fp16, its values from an int8 grid"""
    _through_int8(shipped, EMBEDDING)


def _through_int8(shipped: Tables, name: str) -> None:
    codes, scale = expected_codes(_weight(shipped, name), Scheme("symmetric", -127, 127, 16))
    shipped.tables[name].plain = dequantize(codes, scale).numpy()


@fault("bundle", "weights", QUERY, "q_proj", source="Q12")
def quantized_twice(shipped: Tables) -> None:
    """one weight quantized from values that had passed an int8 grid of 16 already"""
    once = dequantize(*expected_codes(_weight(shipped, QUERY), Scheme("symmetric", -127, 127, 16)))
    _take(shipped.tables[QUERY], *expected_codes(once, CLIPPED))


@fault("bundle", "weights", OUTPUT, "o_proj", source="Q12")
def codes_end_at_126(shipped: Tables) -> None:
    """codes of one weight saturate one short of the end"""
    shipped.tables[OUTPUT].codes = shipped.tables[OUTPUT].codes.clip(-126, 126)


@fault("bundle", "weights", OUTPUT, "o_proj", source="Q03")
def blocks_of_64(shipped: Tables) -> None:
    """one weight in blocks of 64, each scale stored twice"""
    codes, scale = expected_codes(_weight(shipped, OUTPUT), Scheme("symmetric", -127, 127, 64))
    _take(shipped.tables[OUTPUT], codes, scale.repeat_interleave(2, 1))


@fault("bundle", "weights", f"{GATE}|{UP}", "gate_proj|up_proj", source="Q15")
def gate_and_up_share_a_grid(shipped: Tables) -> None:
    """gate and up quantized as one fused matrix with a common scale"""
    weights = [_weight(shipped, name).float() for name in (GATE, UP)]
    top = torch.maximum(*(weight.unflatten(1, (-1, 32)).abs().amax(-1) for weight in weights))
    scale = (top / 127).half()
    for name, weight in zip((GATE, UP), weights):
        codes = (weight.unflatten(1, (-1, 32)) / scale.float()[..., None]).round().clamp(-127, 127)
        _take(shipped.tables[name], codes.flatten(1).to(torch.int8), scale)


@fault("bundle", "weights", GATE, "gate_proj", source="W13")
def one_row_of_codes_shifted(shipped: Tables) -> None:
    """the codes of one row one element further"""
    codes = shipped.tables[GATE].codes
    codes[190] = np.roll(codes[190], 1)


@fault("bundle", "weights", UP, "up_proj", source="Q06")
def blocks_read_backwards(shipped: Tables) -> None:
    """the codes of every block of one weight in reverse order"""
    table = shipped.tables[UP]
    table.codes = np.ascontiguousarray(table.codes.reshape(len(table.codes), -1, 32)[:, :, ::-1]).reshape(table.codes.shape)


@fault("bundle", "weights", EMBEDDING, source="W13")
def last_embedding_rows_stale(shipped: Tables) -> None:
    """the embeddings of the last two tokens zero in the bundle"""
    shipped.tables[EMBEDDING].plain[-2:] = 0


@fault("bundle", "weights", "model.visual.blocks.3.attn.qkv.bias", "qkv", source="W07")
def value_bias_lost_in_the_bundle(shipped: Tables) -> None:
    """the value third of one fused bias zero in the bundle"""
    held = shipped.tables["model.visual.blocks.3.attn.qkv.bias"].plain
    held[2 * len(held) // 3:] = 0


@fault("bundle", "weights", f"{TEXT}.2.self_attn.k_norm.weight", "k_norm", source="W14")
def key_norm_in_eight_bits(shipped: Tables) -> None:
    """one key norm's weight through an 8-bit float"""
    table = shipped.tables[f"{TEXT}.2.self_attn.k_norm.weight"]
    table.plain = torch.from_numpy(table.plain).to(torch.float8_e4m3fn).to(torch.float16).numpy()
