"""Lowering and export: what the shipped program holds beside its weights, and an operation's argument lost on the way."""

from __future__ import annotations

import json
import struct

import numpy as np
import torch
import torch.nn.functional as F

from harness.faults import fault
from harness.faults.files import Files
from harness.faults.hands import wrap
from harness.faults.tables import Tables
from harness.graph.reference import Reference

SPLAT2, SPLAT4 = b"\x05", b"\x09"
"""How MLIR bytecode announces two and four bytes of a constant: a prefix varint."""


def _f16(value: float) -> bytes:
    return SPLAT2 + struct.pack("<e", value)


def _f32(value: float) -> bytes:
    return SPLAT4 + struct.pack("<f", value)


@fault("asset", "weights", "norm.eps", source="E06")
def eps_in_the_program(files: Files) -> None:
    """the decoder's program adds 1e-5 in its norms"""
    files.swap(files.decoder, _f32(1e-6), _f32(1e-5))


@fault("asset", "weights", "vision.eps", source="E06")
def eps_in_the_vision_program(files: Files) -> None:
    """the vision program adds 1e-5 in its norms"""
    files.swap(files.vision, _f32(1e-6), _f32(1e-5))


@fault("asset", "weights", "attention.scale", source="E01")
def scale_in_the_program(files: Files) -> None:
    """the program's attention scale belongs to another head size"""
    size = files.healthy[files.decoder]
    scale = next(row["value"] for row in size.attributes if row["name"] == "scale" and 0 < row["value"] < 1)
    files.swap(files.decoder, _f16(scale), _f16(scale * 1.25))


@fault("bundle", "weights", "gelu.flavour", source="N06")
def gelu_in_the_program(tables: Tables) -> None:
    """the vision program's GELU lost its tanh"""
    for row in tables.vision:
        row["value"] = "none" if row["value"] == "tanh" else row["value"]


@fault("asset", "weights", "rope.frequencies", source="P12")
def frequencies_in_the_program(files: Files) -> None:
    """the program's rotary frequencies passed through fp16"""
    table = next(one for one in files.healthy[files.decoder].weights if one.stored == "f32")
    held = table.rows().astype(np.float32)
    files.swap(files.decoder, held.tobytes(), held.astype(np.float16).astype(np.float32).tobytes())


@fault("asset", "weights", "vision.rope", source="V13")
def vision_rotation_in_the_program(files: Files) -> None:
    """the baked rotary tables of the vision tower rounded to fp16"""
    shape = next(one.shape for one in files.healthy[files.vision].weights if one.stored == "f32")
    files.table(files.vision, shape, 0, lambda held: held.__setitem__(..., held.astype(np.float16)))


@fault("asset", "weights", "mask.fill", source="E01")
def mask_in_the_program(files: Files) -> None:
    """a hidden score is replaced by -10, which a softmax still sees"""
    files.swap(files.decoder, _f16(-1e4), _f16(-10))


@fault("asset", "weights", "model.language_model.layers.0.self_attn.q_proj.weight", "q_proj", source="W13")
def codes_in_the_file(files: Files) -> None:
    """one row of one quantized weight zero in the shipped file"""
    table = next(one for one in files.healthy[files.decoder].weights if one.scale is not None)
    files.table(files.decoder, table.shape, 0, lambda held: held.__setitem__(5, 0))


@fault("asset", "weights", "model.visual.blocks.0.attn.qkv.weight", "qkv", source="W13")
def vision_row_in_the_file(files: Files) -> None:
    """one row of one vision weight stale in the shipped file"""
    heads = [one for one in files.healthy[files.vision].weights if len(one.shape) == 2 and one.shape[0] == 3 * one.shape[1]]
    files.table(files.vision, heads[0].shape, 0, lambda held: held.__setitem__(2, 0))


@fault("asset", "weights", "model.visual.pos_embed.weight|model.visual.patch_embed.proj.bias", source="V01")
def positions_in_the_file(files: Files) -> None:
    """the baked positions rolled by one patch in the shipped file"""
    patches = max((one for one in files.healthy[files.vision].weights if one.stored == "f16"), key=lambda one: one.shape[0])
    files.table(files.vision, patches.shape, 0, lambda held: held.__setitem__(..., np.roll(held, 1, axis=0)))


@fault("asset", "weights", "*", source="G09")
def hash_of_other_bytes(files: Files) -> None:
    """the program changed after it was hashed"""
    files.edit(files.decoder, lambda data: data.__setitem__(len(data) // 2, data[len(data) // 2] ^ 1), seal=False)


@fault("asset", "weights", "*", source="R01")
def program_cut_short(files: Files) -> None:
    """the program's file ends early, and its hash says so too"""
    files.edit(files.decoder, lambda data: data.__delitem__(slice(len(data) * 3 // 4, None)))


@fault("asset", "check", "*", source="R06")
def vocabulary_in_metadata(files: Files) -> None:
    """metadata states another vocabulary than the graph has"""
    files.describe(files.decoder, lambda record: record["language"].update(vocab_size=528))


@fault("asset", "weights", "lm_head.weight", source="Q07")
def mode_in_metadata(files: Files) -> None:
    """metadata states another quantization than the file holds"""
    files.describe(files.decoder, lambda record: record.update(compression="int8lin"))


def _exchange(files: Files, first: str, second: str) -> None:
    """Exchange the ids of two entries of the bundle's vocabulary."""
    path = files.decoder / "tokenizer" / "tokenizer.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    vocab = record["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(record), encoding="utf-8")


@fault("asset", "inputs", "ids|vocabulary", source="T04")
def tokenizer_in_the_bundle(files: Files) -> None:
    """the bundle's tokenizer has two entries of its vocabulary exchanged"""
    _exchange(files, ".", ",")


@fault("asset", "inputs", "vocabulary", source="T04")
def rare_entries_of_the_tokenizer(files: Files) -> None:
    """the bundle's tokenizer has two entries exchanged that no prompt holds"""
    _exchange(files, "~", "^")


@fault("graph", "contract", "decoder.layers.00", "attn.context", source="E01")
def mask_lost_by_the_composite(graph: Reference) -> None:
    """the attention composite takes no runtime mask: in one call every token sees every other"""
    for layer in graph.decoder.layers:
        wrap(layer.self_attn, "attend", lambda plain, q, keys, values, visible: plain(
            q, keys, values, torch.ones_like(visible)))


@fault("graph", "contract", "decoder.layers.01", "attn.context", source="E01")
def composite_scales_again(graph: Reference) -> None:
    """one composite scales the scores a second time by its own default"""
    attention = graph.decoder.layers[1].self_attn
    attention.attend = lambda q, keys, values, visible: F.scaled_dot_product_attention(
        q * attention.scale, keys, values, attn_mask=visible)


@fault("graph", "contract", "decoder.layers.02", "post_norm", source="E06")
def mean_without_its_width(graph: Reference) -> None:
    """the mean of squares ignores its float32: taken in bfloat16"""
    module = graph.decoder.layers[2].post_attention_layernorm
    module.forward = lambda x: module.weight * x * torch.rsqrt(
        x.bfloat16().square().mean(-1, keepdim=True).float() + module.eps)


@fault("graph", "vision", "vision.layers.01", "mlp.fc1", source="E07")
def bias_folded_twice(graph: Reference) -> None:
    """a fold pass added one bias twice"""
    linear = graph.vision.blocks[1].mlp.linear_fc1
    wrap(linear, "forward", lambda plain, x: plain(x) + linear.bias)


@fault("graph", "vision", "vision.layers.00", "attn.out", source="E07")
def bias_dropped_by_fusion(graph: Reference) -> None:
    """a fused projection drops its bias, though the weight is held"""
    linear = graph.vision.blocks[0].attn.proj
    linear.forward = lambda x: F.linear(x, linear.weight)
