"""The reader of an asset's bytes: every weight is found as it was exported, and damaged bytes give a sentence."""

from __future__ import annotations

import hashlib
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_bundle import Small, small_bundle

from harness.engines.mlirb import MAGIC, parse, read_resources
from harness.engines.program import Program, Weight, read_constants
from harness.errors import HarnessError, Undecided
from harness.graph.quantize import RECIPES, dequantize, expected_codes, planned_weights

pytest.importorskip("coreai")
LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.q_norm", "self_attn.k_proj", "self_attn.k_norm",
         "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bundle()


@pytest.fixture(scope="module")
def decoder(small: Small) -> Program:
    return read_constants(small.decoder)


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A direct conversion in fp16, which shares its table between embedding and head."""
    import coreai_torch

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(40, 24)
            self.wide = torch.nn.Linear(24, 56)
            self.back = torch.nn.Linear(56, 24, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.back(torch.nn.functional.gelu(self.wide(self.table(ids)), approximate="tanh"))
            return torch.nn.functional.linear(hidden, self.table.weight)

    toy = Toy().half().eval()
    exported = torch.export.export(toy, (torch.zeros(1, 3, dtype=torch.int32),))
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    converter.add_exported_program(exported.run_decompositions(coreai_torch.get_decomp_table()), input_names=["ids"],
                                   output_names=["logits"])
    path = tmp_path_factory.mktemp("fp16") / "toy.aimodel"
    converter.to_coreai().save_asset(path)
    return path, toy


def bits(weight: Weight) -> np.ndarray:
    return np.ascontiguousarray(weight.rows())


def test_fp16_weights_are_found_bit_for_bit(fp16: tuple[Path, torch.nn.Module]) -> None:
    path, toy = fp16
    program = read_constants(path)
    expected = [toy.table.weight, toy.wide.weight, toy.wide.bias, toy.back.weight]
    assert [weight.stored for weight in program.weights] == ["f16"] * 4
    for weight, source in zip(program.weights, expected, strict=True):
        assert np.array_equal(bits(weight), source.detach().numpy())
    table, wide, bias, back = (weight.uses for weight in program.weights)
    assert [use.op for use in table] == ["gather_nd", "broadcasting_batch_matmul"], "a tied head is the same constant"
    assert [use.op for use in bias] == ["broadcasting_add"]
    assert all(use[0].operand == 1 and use[0].through == ("transpose",) for use in (wide, back))
    assert [row["value"] for row in program.attributes if row["name"] == "approximate"] == ["tanh"]


def test_decoder_weights_stand_in_order(small: Small, decoder: Program) -> None:
    recipe = RECIPES["int8hu"]
    planned = {name: (weight, scheme) for name, weight, scheme in planned_weights(small.checkpoint, recipe)}
    root = "model.language_model."
    names = [f"{root}embed_tokens", *(f"{root}layers.{layer}.{part}" for layer in range(3) for part in LAYER),
             f"{root}norm", "lm_head"]
    frequencies, *weights = decoder.weights
    assert (frequencies.shape, frequencies.stored) == ((16,), "f32")
    for name, weight in zip(names, weights, strict=True):
        source, scheme = planned[f"{name}.weight"]
        if scheme is None:
            assert np.array_equal(bits(weight), source.float().numpy()), name
            continue
        codes, scale = expected_codes(source, scheme)
        assert weight.stored == "si8 x f16/32", name
        assert np.array_equal(weight.data.array, codes.numpy()), name
        assert np.array_equal(weight.scale.array, scale.numpy()), name
        assert not weight.offset.array.any() and not weight.bias.array.any(), name
        assert np.array_equal(bits(weight), dequantize(codes, scale).numpy()), name
        assert np.array_equal(weight.rows(5, 9), bits(weight)[5:9]), name
        assert weight.uses[0].through == ("blockwise_shift_scale", "cast", "transpose"), name


def test_layer_numbers_follow_the_cache_writes(decoder: Program) -> None:
    layers = decoder.weights[2:-2]
    assert [weight.uses[0].writes for weight in layers] == [
        layer + (part >= 6) for layer in range(3) for part in range(len(LAYER))]


def test_attributes_of_the_decoder(small: Small, decoder: Program) -> None:
    found = Counter((row["op"], row["name"], row["value"]) for row in decoder.attributes)
    geometry = small.checkpoint.geometry
    assert found["broadcasting_add", "eps", np.float32(geometry.rms_eps)] == 4 * 3 + 1
    assert found["broadcasting_where", "fill", -1e4] == 3
    assert found["broadcasting_mul", "scale", np.float32(geometry.head_dim**-0.5)] == 3
    assert found["broadcasting_floor_divide", "operand 1", 3] == 1, "columns of the merged grid"
    assert found["broadcasting_sub", "operand 1", geometry.vocab] >= 1
    assert decoder.operations["blockwise_shift_scale"] == 7 * 3 + 1
    assert decoder.operations["write_handle"] == 2 * 3


def test_vision_weights_and_composites(small: Small) -> None:
    program = read_constants(small.vision)
    source = dict(small.checkpoint.tensors())
    held = [bits(weight) for weight in program.weights]
    for name, tensor in source.items():
        if name.startswith("model.visual.") and "pos_embed" not in name and "patch_embed.proj.bias" not in name:
            want = tensor.half().float().numpy()
            want = want.reshape(len(want), -1) if "patch_embed.proj.weight" in name else want
            assert any(np.array_equal(table, want) for table in held), name
    tower = small.twin.conversion.vision
    baked = tower.positions + source["model.visual.patch_embed.proj.bias"].half().float()
    assert np.array_equal(held[1], baked.detach().numpy()), "the converter keeps the sum of positions and patch bias"
    norms = [row for row in program.attributes if row["name"] == "eps"]
    assert {(row["composite"], row["value"]) for row in norms} == {("layer_norm", float(np.float32(1e-6)))}
    assert len(norms) == 2 * 4 + 4
    kinds = Counter(row["value"] for row in program.attributes if row["name"] == "approximate")
    assert kinds == {"tanh": 4, "none": 4}, "blocks and mergers"


def test_big_constants_are_views_into_the_file(small: Small, decoder: Program) -> None:
    blobs = read_resources(small.decoder / "main.mlirb")
    big = [constant for constant in decoder.constants if constant.resource]
    assert {constant.resource for constant in big} == set(blobs)
    for constant in big:
        assert blobs[constant.resource].offset % 16 == 0
        assert not constant.array.flags.owndata and not constant.array.flags.writeable
    assert sum(math.prod(constant.shape) * constant.array.itemsize for constant in big) == sum(
        blob.size for blob in blobs.values())


def test_constants_of_codes_are_accounted_for(decoder: Program) -> None:
    companions = {id(part) for weight in decoder.weights for part in (weight.scale, weight.offset, weight.bias)}
    unused = [constant for constant in decoder.constants if not constant.uses and id(constant) not in companions]
    assert not [constant for constant in unused if constant.dtype.startswith("f")]


def change(asset: Path, target: Path, edit: bytes, at: int) -> Path:
    """A copy with other bytes at `at` and a hash that fits them."""
    shutil.copytree(asset, target)
    program = bytearray((target / "main.mlirb").read_bytes())
    program[at:at + len(edit)] = edit
    (target / "main.mlirb").write_bytes(program)
    (target / "main.hash").write_bytes(hashlib.sha256(program).digest())
    return target


def test_a_flipped_weight_shows(small: Small, decoder: Program, tmp_path: Path) -> None:
    head = decoder.weights[-1]
    blob = read_resources(small.decoder / "main.mlirb")[head.data.resource]
    program = read_constants(change(small.decoder, tmp_path / "c.aimodel", b"\x77", blob.offset + 64 * 7 + 5))
    differ = np.argwhere(program.weights[-1].data.array != head.data.array)
    assert differ.tolist() == [[7, 5]]


def test_bytes_that_do_not_fit_their_hash(small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.decoder, tmp_path / "d.aimodel")
    with (tmp_path / "d.aimodel" / "main.mlirb").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(HarnessError, match="do not match"):
        read_constants(tmp_path / "d.aimodel")


def test_a_program_that_aborts_the_bindings(small: Small, tmp_path: Path) -> None:
    """The string section is damaged: the resource table still reads, the program does not."""
    data = (small.decoder / "main.mlirb").read_bytes()
    at = data.index(b"coreai.constant") if b"coreai.constant" in data else data.index(b"constant")
    with pytest.raises(HarnessError) as caught:
        read_constants(change(small.decoder, tmp_path / "e.aimodel", b"xxxxxxxx", at))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, Undecided)


@pytest.mark.parametrize(("data", "sentence"), [
    (b"", "announced"), (b"ELF\x7f" + bytes(100), "wrong magic"), (MAGIC, "announced"),
    (MAGIC + b"\x0fMLIR\0" + bytes(9), "version 7"), (MAGIC + b"\x0dMLIR22", "does not end"),
    (MAGIC + b"\x0dMLIR\0", "section 0 is missing"), (MAGIC + b"\x0dMLIR\0\x00\xff\xff", "announced")])
def test_what_is_no_bytecode(data: bytes, sentence: str) -> None:
    with pytest.raises(HarnessError, match=sentence):
        parse(data)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "main.mlirb").touch()
    with pytest.raises(HarnessError, match="cannot be mapped"):
        read_resources(tmp_path / "main.mlirb")


def test_mutated_files_never_escape(small: Small) -> None:
    """Truncations and flips, most of them in the header and the tables at the end: a sane table or a sentence."""
    data, draw = (small.vision / "main.mlirb").read_bytes(), random.Random(0)
    for trial in range(1500):
        mutated = bytearray(data[:draw.randrange(len(data))] if trial % 3 == 0 else data)
        for _ in range(draw.randint(0, 4)):
            place = draw.choice((draw.randrange(64), -1 - draw.randrange(2000), draw.randrange(len(data))))
            if -len(mutated) <= place < len(mutated):
                mutated[place] = draw.choice((0, 1, 0xFF, draw.randrange(256)))
        try:
            table = parse(bytes(mutated))
        except HarnessError as error:
            assert "\n" not in str(error)
        else:
            assert all(0 <= blob.offset <= blob.offset + blob.size <= len(mutated) for blob in table.values())
