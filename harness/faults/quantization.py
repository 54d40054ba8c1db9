"""Quantization: codes, scales, zero points and the census of what is quantized, in the tables of the bundle."""

from __future__ import annotations

import numpy as np
import torch

from harness.faults import fault
from harness.faults.tables import Table, Tables
from harness.graph.quantize import expected_codes

DOWN = "model.language_model.layers.2.mlp.down_proj.weight"
VALUE = "model.language_model.layers.1.self_attn.v_proj.weight"
HEAD = "lm_head.weight"


def _requantize(table: Table, weight: np.ndarray, factor: float, rows: slice = slice(None)) -> None:
    """Codes on a grid whose absolute maximum is `factor` times the weight's, clipped."""
    blocks = weight.reshape(len(weight), -1, weight.shape[1] // table.scale.shape[1]).astype(np.float32)
    scale = (np.abs(blocks).max(-1) * factor / 127).astype(np.float16)
    codes = np.clip(np.round(blocks / np.maximum(scale, 2.0**-23).astype(np.float32)[..., None]), -127, 127)
    table.scale[rows], table.codes[rows] = scale[rows], codes.reshape(weight.shape).astype(np.int8)[rows]


def _weight(shipped: Tables, name: str) -> np.ndarray:
    return shipped.subject.checkpoint.tensor(name).to(torch.float16).numpy()


@fault("bundle", "weights", HEAD, source="Q01")
def head_clipped(shipped: Tables) -> None:
    """the head quantized with its outliers clipped at 0.55 of the largest"""
    _requantize(shipped.tables[HEAD], _weight(shipped, HEAD), 0.55)


@fault("bundle", "weights", HEAD, source="Q01")
def a_few_head_rows_clipped(shipped: Tables) -> None:
    """forty rows of the head clipped"""
    _requantize(shipped.tables[HEAD], _weight(shipped, HEAD), 0.55, slice(100, 140))


@fault("bundle", "weights", "model.language_model.layers.0.*", source="Q12")
def body_clipped(shipped: Tables) -> None:
    """every body projection clipped at 0.9 of the largest"""
    for name, table in shipped.tables.items():
        if table.codes is not None and name != HEAD:
            _requantize(table, _weight(shipped, name), 0.9)


@fault("bundle", "weights", VALUE, "v_proj", source="Q03")
def scales_transposed(shipped: Tables) -> None:
    """scales of one square weight laid along the other axis"""
    table = shipped.tables[VALUE]
    table.scale = np.ascontiguousarray(table.scale.reshape(-1, table.scale.shape[0]).T).reshape(table.scale.shape)


@fault("bundle", "weights", DOWN, "down_proj", source="Q03")
def scales_one_block_on(shipped: Tables) -> None:
    """scales of one weight rolled by one block"""
    shipped.tables[DOWN].scale = np.roll(shipped.tables[DOWN].scale, 1, axis=1)


@fault("bundle", "weights", DOWN, "down_proj", source="Q04")
def zero_point_off_by_one(shipped: Tables) -> None:
    """a zero point of one in one weight"""
    shipped.tables[DOWN].offset += 1


@fault("bundle", "weights", DOWN, "down_proj", source="Q04")
def codes_unsigned(shipped: Tables) -> None:
    """codes of one weight read as unsigned"""
    table = shipped.tables[DOWN]
    table.codes = np.where(table.codes < 0, 127, table.codes).astype(np.int8)


@fault("bundle", "weights", DOWN, "down_proj", source="Q06")
def nibbles_exchanged(shipped: Tables) -> None:
    """high and low half of every code exchanged in one weight"""
    codes = shipped.tables[DOWN].codes.view(np.uint8)
    shipped.tables[DOWN].codes = ((codes << 4) | (codes >> 4)).view(np.int8)


@fault("bundle", "weights", DOWN, "down_proj", source="Q07")
def one_weight_left_in_half(shipped: Tables) -> None:
    """one projection skipped by the quantizer: the numbers are better, the claim is wrong"""
    shipped.tables[DOWN] = Table(DOWN, shipped.tables[DOWN].at, plain=_weight(shipped, DOWN))


@fault("bundle", "weights", "model.visual.merger.linear_fc1.weight", "linear_fc1", source="Q13")
def merger_quantized_by_accident(shipped: Tables) -> None:
    """a merger in int8 where the recipe says fp16"""
    _quantized(shipped, "model.visual.merger.linear_fc1.weight")


@fault("bundle", "weights", "model.language_model.embed_tokens.weight", source="Q13")
def embedding_quantized(shipped: Tables) -> None:
    """the embedding in int8 where the recipe says fp16"""
    _quantized(shipped, "model.language_model.embed_tokens.weight")


def _quantized(shipped: Tables, name: str) -> None:
    from harness.graph.quantize import CLIPPED

    codes, scale = (part.numpy() for part in expected_codes(torch.from_numpy(_weight(shipped, name)), CLIPPED))
    shipped.tables[name] = Table(name, shipped.tables[name].at, codes=codes, scale=scale,
                                 offset=np.zeros(scale.shape, np.int8))


@fault("bundle", "weights", DOWN, "down_proj", source="Q03")
def one_scale_for_a_row(shipped: Tables) -> None:
    """one weight quantized by row where the recipe says blocks of 32"""
    table, weight = shipped.tables[DOWN], _weight(shipped, DOWN).astype(np.float32)
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float16)
    table.codes = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    table.scale = np.repeat(scale, table.scale.shape[1], axis=1)


@fault("bundle", "weights", DOWN, "down_proj", source="Q01")
def grid_of_another_scheme(shipped: Tables) -> None:
    """one body weight on the head's grid, absmax / 127.5"""
    from harness.graph.quantize import PLAIN

    table = shipped.tables[DOWN]
    codes, scale = expected_codes(torch.from_numpy(_weight(shipped, DOWN)), PLAIN)
    table.codes, table.scale = codes.numpy().copy(), scale.numpy().copy()


@fault("bundle", "weights", DOWN, "down_proj", source="W13")
def one_block_of_codes_stale(shipped: Tables) -> None:
    """one block of one row holds zeros"""
    shipped.tables[DOWN].codes[9, 32:64] = 0


@fault("bundle", "weights", DOWN, "down_proj", source="Q06")
def one_code_flipped(shipped: Tables) -> None:
    """one bit of one code flipped"""
    shipped.tables[DOWN].codes[3, 3] ^= 64


@fault("bundle", "weights", VALUE, "v_proj", source="Q12")
def codes_truncated(shipped: Tables) -> None:
    """codes cut towards zero instead of rounded"""
    table, weight = shipped.tables[VALUE], _weight(shipped, VALUE).astype(np.float32)
    scale = np.repeat(table.scale, weight.shape[1] // table.scale.shape[1], axis=1).astype(np.float32)
    table.codes = np.trunc(weight / scale).clip(-127, 127).astype(np.int8)


@fault("bundle", "weights", "model.language_model.layers.1.self_attn.q_proj.weight|"
       "model.language_model.layers.3.self_attn.q_proj.weight", "q_proj")
def weights_of_two_layers_exchanged(shipped: Tables) -> None:
    """the query projections of two layers in each other's place"""
    first, second = (shipped.tables[f"model.language_model.layers.{layer}.self_attn.q_proj.weight"] for layer in (1, 3))
    first.codes, second.codes = second.codes, first.codes
    first.scale, second.scale = second.scale, first.scale


@fault("bundle", "weights", "none", equivalent=True, source="B21")
def ties_rounded_away_from_zero(shipped: Tables) -> None:
    """ties of rounding broken the other way"""
    for name, table in shipped.tables.items():
        if table.codes is not None:
            weight = _weight(shipped, name).astype(np.float32)
            scale = np.repeat(table.scale, weight.shape[1] // table.scale.shape[1], axis=1).astype(np.float32)
            ratio = weight / scale
            tie = np.abs(ratio - np.trunc(ratio)) == 0.5
            table.codes = np.where(tie, np.trunc(ratio) + np.sign(ratio), table.codes).clip(-127, 127).astype(np.int8)
