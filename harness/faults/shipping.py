"""Export once more: bytes of the shipped files: tables, constants, metadata, tokenizer, the files themselves."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np

from harness.faults import fault
from harness.faults.files import Files

TEXT, VISION = "model.language_model", "model.visual"
SPLAT4, SPLAT16 = b"\x09", b"\x21"
"""How MLIR bytecode announces four and sixteen bytes of a constant: a prefix varint."""


def _i32(value: int) -> bytes:
    return SPLAT4 + struct.pack("<i", value)


@fault("asset", "weights", "lm_head.weight", source="W13")
def last_head_row_in_the_file(files: Files) -> None:
    """the head's last row zero in the shipped file"""
    files.table(files.decoder, (512, 64), 1, lambda held: held.__setitem__(-1, 0))


@fault("asset", "weights", f"{TEXT}.embed_tokens.weight", source="W13")
def rare_embedding_in_the_file(files: Files) -> None:
    """the embedding of one rare token holds its neighbour's in the shipped file"""
    files.table(files.decoder, (512, 64), 0, lambda held: held.__setitem__(477, held[478]))


@fault("asset", "weights", f"{TEXT}.layers.1.mlp.down_proj.weight", "down_proj", source="Q03")
def one_scale_in_the_file(files: Files) -> None:
    """one scale of one weight doubled in the shipped file"""
    files.table(files.decoder, (64, 192), 1, lambda held: held.__setitem__((63, -1), held[63, -1] * 2), "scale")


@fault("asset", "weights", f"{TEXT}.layers.0.self_attn.k_proj.weight|{TEXT}.layers.1.self_attn.k_proj.weight", "k_proj", source="Q06")
def codes_of_two_layers_in_the_file(files: Files) -> None:
    """the key codes of two layers exchanged in the shipped file"""
    held = [table for table in files.healthy[files.decoder].weights if table.shape == (64, 64)]
    first, second = (held[number].data.array.copy() for number in (0, 2))
    files.table(files.decoder, (64, 64), 0, lambda codes: codes.__setitem__(..., second))
    files.table(files.decoder, (64, 64), 2, lambda codes: codes.__setitem__(..., first))


@fault("asset", "weights", f"{TEXT}.layers.2.post_attention_layernorm.weight|{TEXT}.layers.3.input_layernorm.weight",
       "post_attention_layernorm|input_layernorm", source="W14")
def norms_exchanged_in_the_file(files: Files) -> None:
    """two neighbouring norms exchanged in the shipped file"""
    held = [table for table in files.healthy[files.decoder].weights if table.shape == (64,)]
    first, second = (held[number].data.array.copy() for number in (5, 6))
    files.table(files.decoder, (64,), 5, lambda norm: norm.__setitem__(..., second))
    files.table(files.decoder, (64,), 6, lambda norm: norm.__setitem__(..., first))


@fault("asset", "weights", f"{TEXT}.norm.weight", source="W14")
def final_norm_in_the_file(files: Files) -> None:
    """one element of the final norm one fp16 step off in the shipped file"""
    files.table(files.decoder, (64,), 8, lambda norm: norm.__setitem__(9, np.nextafter(norm[9], np.float16(np.inf))))


@fault("asset", "weights", "rope.*", source="P12")
def last_frequency_in_the_file(files: Files) -> None:
    """the slowest rotary lane zero in the shipped file"""
    _frequency(files, lambda held: 0 * held)


@fault("asset", "weights", "rope.*", source="P06")
def frequency_one_step_off_in_the_file(files: Files) -> None:
    """the slowest rotary frequency four float32 steps off in the shipped file"""
    _frequency(files, lambda held: held * np.float32(1 + 2.0**-21))


def _frequency(files: Files, change) -> None:
    table = next(one for one in files.healthy[files.decoder].weights if one.stored == "f32")
    held = table.rows().astype(np.float32)
    bent = held.copy()
    bent[-1] = change(held[-1])
    files.swap(files.decoder, held.tobytes(), bent.tobytes())


@fault("asset", "weights", "vision.rope|vision.cos|vision.sin", source="V04")
def last_rotation_row_in_the_file(files: Files) -> None:
    """the baked vision rotation of the last patch is that of the first"""
    shape = next(one.shape for one in files.healthy[files.vision].weights if one.stored == "f32")
    files.table(files.vision, shape, 1, lambda held: held.__setitem__(-1, held[0]))


@fault("asset", "weights", f"{VISION}.blocks.1.mlp.linear_fc1.bias", "linear_fc1", source="W07")
def vision_bias_in_the_file(files: Files) -> None:
    """one vision bias zero in the shipped file"""
    files.table(files.vision, (144,), 3, lambda held: held.__setitem__(..., 0))


@fault("asset", "weights", f"{VISION}.patch_embed.proj.weight", source="T10")
def kernel_colours_in_the_file(files: Files) -> None:
    """the shipped patch kernel reads blue first"""
    files.table(files.vision, (48, 1536), 0, lambda held: held.__setitem__(
        ..., held.reshape(48, 3, 512)[:, ::-1].reshape(48, 1536).copy()))


@fault("asset", "weights", f"{VISION}.merger.norm.weight", "norm", source="N07")
def merger_norm_in_the_file(files: Files) -> None:
    """the main merger's norm holds a block's in the shipped file"""
    held = [table for table in files.healthy[files.vision].weights if table.shape == (48,)]
    weights = [number for number, table in enumerate(held) if table.uses[0].op == "broadcasting_mul"]
    other = held[weights[0]].data.array.copy()
    files.table(files.vision, (48,), weights[-1], lambda norm: norm.__setitem__(..., other))


@fault("asset", "weights", "rope.*|image.*|decoder.layers.00|kv.keys.00", source="P10")
def image_width_in_the_program(files: Files) -> None:
    """the program divides slots by 16, the width of another image"""
    files.swap(files.decoder, _i32(14), _i32(16))


@fault("asset", "weights", "image.*|decoder.embed", source="R06")
def first_image_id_in_the_program(files: Files) -> None:
    """the program takes ids from 510 on for image slots"""
    files.swap(files.decoder, _i32(512), _i32(510))


@fault("asset", "weights", "image.*|decoder.layers.01.deepstack|decoder.embed", source="D13")
def deepstack_offset_in_the_program(files: Files) -> None:
    """the program reads the second tap's rows one row late"""
    files.swap(files.decoder, _i32(196), _i32(197))


@fault("asset", "weights", "image.*|decoder.layers.02.deepstack", source="D13")
def last_tap_offset_in_the_program(files: Files) -> None:
    """the program reads the third tap's rows one row early"""
    files.swap(files.decoder, _i32(392), _i32(391))


@fault("asset", "weights", "rope.*", source="P04")
def lanes_in_the_program(files: Files) -> None:
    """the program's table of the lanes that turn with w is rolled by one"""
    lanes = np.zeros(16, np.uint8)
    lanes[[2, 5, 8, 11]] = 1
    files.swap(files.decoder, SPLAT16 + lanes.tobytes(), SPLAT16 + np.roll(lanes, 1).tobytes())


@fault("asset", "check|inputs", "*", source="T01")
def image_statistics_in_the_bundle(files: Files) -> None:
    """the bundle's preprocessor file holds CLIP's mean"""
    _json(files, "preprocessor_config.json", lambda record: record.update(image_mean=[0.481, 0.458, 0.408]))


@fault("asset", "check|inputs", "*", source="T03")
def patch_size_in_the_bundle(files: Files) -> None:
    """the bundle's preprocessor file says patches of 14"""
    _json(files, "preprocessor_config.json", lambda record: record.update(patch_size=14))


@fault("asset", "check|inputs", "*", source="T06")
def template_in_the_bundle(files: Files) -> None:
    """the bundle's chat template opens no assistant turn"""
    _json(files, "chat_template.json", lambda record: record.update(
        chat_template=record["chat_template"].replace("assistant", "model")))


@fault("asset", "inputs", "ids|vocabulary", source="T04")
def merges_of_the_tokenizer(files: Files) -> None:
    """the bundle's tokenizer lost its first merge"""
    _json(files, "tokenizer.json", lambda record: record["model"]["merges"].pop(0))


@fault("asset", "inputs|check", "ids|vocabulary|*", source="T04")
def added_token_of_the_tokenizer(files: Files) -> None:
    """the bundle's tokenizer does not know the end of a turn"""
    def change(record):
        record["added_tokens"] = [one for one in record["added_tokens"] if one["content"] != "<|im_end|>"]

    _json(files, "tokenizer.json", change)


def _json(files: Files, name: str, change) -> None:
    path = files.decoder / "tokenizer" / name
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


@fault("asset", "check", "*", source="R06")
def context_in_metadata(files: Files) -> None:
    """metadata states twice the context that the cache has"""
    files.describe(files.decoder, lambda record: record["language"].update(max_context_length=1024))


@fault("asset", "check|weights", "*", source="G09")
def vision_bundle_is_the_decoder(files: Files) -> None:
    """the vision bundle holds the decoder's program"""
    for name in ("main.mlirb", "main.hash"):
        shutil.copy(files.asset(files.decoder) / name, files.asset(files.vision) / name)


@fault("asset", "check|weights", "*", source="R10")
def hash_is_missing(files: Files) -> None:
    """the program's hash file is gone"""
    (files.asset(files.decoder) / "main.hash").unlink()
