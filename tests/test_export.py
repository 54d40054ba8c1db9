"""Export: what ships is what was planned, is what the twin computes, and is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_models import write_checkpoint
from torch import fx, nn

pytest.importorskip("coreai_torch")
pytest.importorskip("coreai_opt")

from harness.bundle import VISION, Bundle  # noqa: E402  (after the skips)
from harness.cases import FrozenInputs  # noqa: E402
from harness.checkpoint import Checkpoint  # noqa: E402
from harness.engines import Request  # noqa: E402
from harness.engines.coreai import CoreAIEngine  # noqa: E402
from harness.engines.torch_graph import TorchGraph  # noqa: E402
from harness.errors import HarnessError  # noqa: E402
from harness.export import bundles, export, folder, program, room  # noqa: E402
from harness.export.hollow import hollow_decoder, hollow_vision  # noqa: E402
from harness.export.quantizer import Widened  # noqa: E402
from harness.export.values import CheckpointValues  # noqa: E402
from harness.graph.quantize import RECIPES, Scheme, expected_codes, storage_plan, twin_weights  # noqa: E402
from harness.graph.reference import EMBEDDING, HEAD, Reference  # noqa: E402
from harness.trace import decoder_seams, vision_seams  # noqa: E402

GRID, CONTEXT, LAYERS = (4, 6), 32, 3
HU = RECIPES["int8hu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("made") / "Tiny-3.VL", layers=LAYERS))


@pytest.fixture(scope="module")
def shipped(checkpoint, tmp_path_factory):
    """int8hu as it ships: fp16 activations, S = 1."""
    return export(checkpoint, tmp_path_factory.mktemp("shipped"), "int8hu", grid=GRID, context=CONTEXT)


@pytest.fixture(scope="module")
def sharp(checkpoint, tmp_path_factory):
    """The same weights with fp32 activations, and a dynamic-S twin."""
    return export(checkpoint, tmp_path_factory.mktemp("sharp"), "int8hu", grid=GRID, context=CONTEXT, dynamic=True,
                  activations="fp32")


@pytest.fixture(scope="module")
def request_(checkpoint) -> Request:
    """A prompt with an image, as long as the context: T runs up to its last slot."""
    geometry, rng = checkpoint.geometry, np.random.default_rng(0)
    ids = np.array([3, 5, *[geometry.image_token] * 6, *range(7, 7 + CONTEXT - 8)], dtype=np.int32)
    patches = rng.standard_normal((GRID[0] * GRID[1], geometry.patch_features)).astype(np.float32)
    return Request(FrozenInputs("image", ids, None, patches, (1, *GRID)), seams=frozenset(
        (*vision_seams(geometry, True), *decoder_seams(geometry, True), "decoder.positions")), kv=True)


@pytest.fixture(scope="module")
def twin_trace(checkpoint, request_):
    reference = Reference(HU.geometry(checkpoint.geometry), GRID, twin_weights(checkpoint, HU))
    return next(TorchGraph(reference, checkpoint.geometry).run([request_]))


@pytest.fixture(scope="module")
def sharp_trace(checkpoint, sharp, request_):
    return run(sharp, sharp.decoder, checkpoint, request_)


def run(result, decoder, checkpoint, request):
    index = decoder.with_name(f"{decoder.name}.seams.json")
    engine = CoreAIEngine(Bundle.open(decoder).asset, Bundle.open(result.vision, VISION).asset,
                          geometry=checkpoint.geometry, grid=GRID, context=CONTEXT,
                          seam_index=index if index.exists() else None, timeout_s=120)
    return next(engine.run([request]))


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def test_the_bundles_are_named_and_described_as_the_contract_says(shipped, checkpoint):
    root = shipped.decoder.parent
    assert sorted(path.name for path in root.iterdir()) == [
        "tiny_3_vl_decode_int8hu_s1", "tiny_3_vl_decode_int8hu_s1.seams.json", "tiny_3_vl_vision"]
    assert sorted(path.name for path in shipped.decoder.iterdir()) == [
        "metadata.json", "tiny_3_vl_decode_int8hu_s1.aimodel", "tokenizer"]
    described = json.loads((shipped.decoder / "metadata.json").read_text())
    assert described.pop("compilation").keys() == {"date", "targets"}
    assert described == {
        "metadata_version": "0.2", "kind": "llm", "name": "tiny_3_vl_decode_int8hu_s1",
        "assets": {"main": "tiny_3_vl_decode_int8hu_s1.aimodel"},
        "language": {"tokenizer": "Tiny-3.VL", "vocab_size": 512, "max_context_length": CONTEXT,
                     "embedded_tokenizer": True, "function_map": {"main": ["main"]}},
        "source": {"model_definition": "Qwen3VLForConditionalGeneration", "hf_model_id": "Tiny-3.VL"},
        "compression": "int8hu"}
    held, made = shipped.decoder / "tokenizer" / "tokenizer.json", checkpoint.root / "tokenizer.json"
    assert held.read_bytes() == made.read_bytes()
    assert Bundle.open(shipped.decoder).unknown_keys == () and Bundle.open(shipped.vision, VISION).mode == "fp16"
    assert shipped.quantized == 7 * LAYERS + 1
    assert shipped.bytes[shipped.decoder.name] == Bundle.open(shipped.decoder).size


def test_a_snapshot_of_the_hub_cache_gives_its_id(checkpoint, tmp_path):
    root = tmp_path / "models--Qwen--Qwen3-VL-2B-Instruct" / "snapshots" / "0123abcd"
    shutil.copytree(checkpoint.root, root)
    made = bundles.Exporter(Checkpoint(root), tmp_path, "fp16", GRID, CONTEXT, "fp16", None, False, tmp_path, print)
    assert bundles.model_id(made.checkpoint) == "Qwen/Qwen3-VL-2B-Instruct"
    assert made.result.decoder.name == "qwen3_vl_2b_instruct_decode_fp16_s1"


def test_every_planned_code_and_scale_lies_in_both_programs(shipped, sharp, checkpoint):
    """Read as plain bytes: the sharp twin shares the shipped codes and fp16 scales, though it computes in float32."""
    programs = [(path / f"{path.name}.aimodel" / "main.mlirb").read_bytes()
                for path in (shipped.decoder, sharp.decoder, sharp.dynamic)]
    planned = [(name, how) for name, how in storage_plan(checkpoint.geometry, HU).items() if isinstance(how, Scheme)]
    assert len(planned) == shipped.quantized
    for name, how in planned:
        codes, scale = expected_codes(checkpoint.tensor(name), how)
        for whole in programs:
            assert codes.numpy().tobytes() in whole and scale.numpy().tobytes() in whole, name
    embedding = checkpoint.tensor(EMBEDDING).half()
    assert embedding.numpy().tobytes() in programs[0] and embedding.float().numpy().tobytes() in programs[1]


def test_the_sharp_twin_computes_the_twin(sharp_trace, twin_trace):
    assert sharp_trace["logits"].shape == twin_trace["logits"].shape == (CONTEXT, 512)
    assert max(relative(sharp_trace[seam], twin_trace[seam]) for seam in ("logits", "kv.keys", "kv.values")) < 1e-5


def test_the_seam_index_reads_the_value_of_each_seam(checkpoint, sharp, sharp_trace, twin_trace):
    stream = {*vision_seams(checkpoint.geometry), *decoder_seams(checkpoint.geometry)}
    assert stream <= set(sharp_trace), "every seam of the stream is answered"
    inside = set(decoder_seams(checkpoint.geometry, True)) - stream
    assert inside <= set(sharp_trace), "and every seam inside a decoder layer"
    errors = {seam: relative(sharp_trace[seam], twin_trace[seam]) for seam in sharp_trace
              if seam != "decoder.positions" and sharp_trace[seam].shape == twin_trace[seam].shape}
    assert errors.keys() | {"decoder.positions"} == set(sharp_trace)
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)
    assert np.array_equal(sharp_trace["decoder.positions"], twin_trace["decoder.positions"])
    assert sharp.seams.keys() == {sharp.decoder.name, sharp.vision.name}


def test_the_index_belongs_to_the_shipped_program(shipped):
    table = json.loads(shipped.decoder.with_name(f"{shipped.decoder.name}.seams.json").read_text())
    for tower, path in (("decoder", shipped.decoder), ("vision", shipped.vision)):
        assert table[tower]["program"] == (path / f"{path.name}.aimodel" / "main.hash").read_bytes().hex()
    assert {"decoder.layers.00", "decoder.layers.00.deepstack", "decoder.norm"} <= table["decoder"]["seams"].keys()
    assert table["decoder"]["seams"]["decoder.layers.01.attn.q_rope"]["row"] == [4, 32]


def test_the_dynamic_twin_takes_the_prompt_in_one_call(sharp, sharp_trace, checkpoint, request_):
    at_once = run(sharp, sharp.dynamic, checkpoint, request_)
    assert at_once.facts["dynamic"] and at_once.facts["calls"] < 3 < sharp_trace.facts["calls"]
    assert np.array_equal(at_once["logits"], sharp_trace["logits"])
    assert np.array_equal(at_once["kv.values"], sharp_trace["kv.values"])


def test_the_shipped_bundle_is_near_the_twin(shipped, checkpoint, request_, twin_trace):
    """A rough bound: this engine accumulates fp16 products in fp16; the engine rung has the bounds."""
    got = run(shipped, shipped.decoder, checkpoint, request_)
    assert 1e-6 < relative(got["logits"], twin_trace["logits"]) < 0.05


def towers(checkpoint: Checkpoint, mode: str, dtype: torch.dtype = torch.float16):
    """Recipe, values, and both hollow towers: (vision, its pending), (decoder, its pending, quantized Linears)."""
    recipe = RECIPES[mode]
    values = CheckpointValues(checkpoint, recipe, GRID)
    geometry = recipe.geometry(checkpoint.geometry)
    return recipe, values, hollow_vision(geometry, GRID, values, dtype), \
        hollow_decoder(geometry, (GRID[0] // 2, GRID[1] // 2), recipe, values, dtype)


@pytest.mark.parametrize("mode", RECIPES)
def test_a_tied_checkpoint_is_quantized_as_planned(mode, tmp_path):
    tied = Checkpoint(write_checkpoint(tmp_path, tied=True, layers=LAYERS, dtype="bfloat16"))
    recipe, values, _, (decoder, pending, count) = towers(tied, mode)
    plan = {name: how for name, how in storage_plan(tied.geometry, recipe).items() if isinstance(how, Scheme)}
    assert count == len(plan) == {"fp16": 0, "int8lin": 7 * LAYERS, "int8hu": 7 * LAYERS + 1}[mode]
    for name, how in plan.items():
        codes, scale = expected_codes(tied.tensor(EMBEDDING if name == HEAD else name), how)
        like = torch.empty(0)
        assert torch.equal(values.codes(name, how, "quantized_data", like), codes)
        assert torch.equal(values.codes(name, how, "scale", like), scale)
    assert torch.equal(pending.value(decoder.embed_tokens.weight), tied.tensor(EMBEDDING).half())
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == (mode != "int8hu")


def test_the_sharp_twin_widens_every_number(checkpoint):
    _, _, (vision, seen), (decoder, pending, _) = towers(checkpoint, "int8hu", torch.float32)
    assert isinstance(decoder.lm_head, Widened)
    norm, right = pending.value(decoder.norm.weight), checkpoint.tensor("model.language_model.norm.weight")
    assert norm.dtype == torch.float32 and torch.equal(norm, right.half().float())
    assert seen.value(vision.positions).dtype == torch.float32


def test_a_linear_that_coreai_opt_skips_is_an_error_and_leaves_nothing(tmp_path):
    odd = Checkpoint(write_checkpoint(tmp_path / "odd", layers=LAYERS, hidden_size=72))
    with pytest.raises(HarnessError, match=r"layers\.0\.self_attn\.q_proj\.weight: coreai-opt would leave it in fp16: "
                                           r"its 72 input features are no multiple of 32"):
        export(odd, tmp_path / "out", "int8lin", grid=GRID, context=CONTEXT)
    assert list((tmp_path / "out").iterdir()) == []


def test_cutting_the_seams_off_leaves_the_plain_program(checkpoint, monkeypatch):
    _, _, (vision, _), (decoder, _, _) = towers(checkpoint, "int8hu")

    def both(trace: Callable) -> None:
        cut = trace()
        with monkeypatch.context() as patch:
            patch.setattr(program, "_Collecting", lambda tower, rows: Plain(tower))
            plain = trace()
        assert operations(cut) == operations(plain)
        kinds = [[(spec.kind, spec.target) for spec in traced.exported.graph_signature.output_specs]
                 for traced in (cut, plain)]
        assert kinds[0] == kinds[1]

    both(lambda: program.trace_vision(vision, checkpoint.geometry, torch.float16))
    both(lambda: program.trace_decoder(decoder, checkpoint.geometry, CONTEXT, torch.float16))


class Plain(nn.Module):
    """The tower alone, in the place of the collecting one."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, *inputs: torch.Tensor):
        result = self.tower(*inputs)
        return result if isinstance(result, tuple) else (result,)


def operations(traced: program.Program) -> list[str]:
    """Target and arguments of each node, nodes numbered in order."""
    numbers = {node: number for number, node in enumerate(traced.exported.graph.nodes)}
    return [f"{node.target if node.op == 'call_function' else node.op} "
            f"{fx.node.map_arg((node.args, node.kwargs), lambda other: numbers[other])}" for node in numbers]


def test_an_existing_bundle_is_refused_before_any_work(shipped, checkpoint, monkeypatch):
    monkeypatch.setattr(bundles, "CheckpointValues", lambda *_: pytest.fail("work was done"))
    before = Bundle.open(shipped.decoder).digest
    with pytest.raises(HarnessError, match="is already there; give --overwrite"):
        export(checkpoint, shipped.decoder.parent, "int8hu", grid=GRID, context=CONTEXT)
    assert Bundle.open(shipped.decoder).digest == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_export_leaves_what_was_there(overwrite, checkpoint, tmp_path, monkeypatch):
    old = tmp_path / "tiny_3_vl_decode_fp16_s1"
    if overwrite:
        old.mkdir()
        (old / "mark").write_text("old")
    calls = Counter()

    def interrupted(traced, path, *, debug=False):
        path.mkdir()
        (path / "main.mlirb").write_bytes(b"half")
        (path / "main.hash").write_bytes(bytes(32))
        calls["saved"] += 1
        if calls["saved"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "save_asset", interrupted)
    monkeypatch.setattr(bundles, "find_entries", lambda *_: {})
    for trace in ("trace_vision", "trace_decoder"):
        monkeypatch.setattr(bundles, trace, lambda *_, **__: program.Program(Empty(), (), (), (), {}))
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path, "fp16", grid=GRID, context=CONTEXT, overwrite=overwrite)
    assert calls["saved"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ([old.name] if overwrite else [])
    monkeypatch.setattr(bundles, "save_asset", lambda traced, path, **_: interrupted(traced, path))
    export(checkpoint, tmp_path, "fp16", grid=GRID, context=CONTEXT, overwrite=overwrite)
    assert not (old / "mark").exists() and {path.name for path in tmp_path.iterdir()} == {
        old.name, f"{old.name}.seams.json", "tiny_3_vl_vision"}


class Empty:
    """An exported program without operations."""

    graph = fx.Graph()


def test_a_full_disk_is_one_sentence(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(HarnessError, match=r"needs about \d+\.\d GiB of disk, 0\.0 GiB are free"):
        export(checkpoint, tmp_path, "fp16", grid=GRID, context=CONTEXT)
    target = tmp_path / "bundle"
    with pytest.raises(HarnessError, match="bundle: cannot be written .No space left on device."):
        with folder.whole(target, overwrite=False):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "held").write_text("old")
    rename = os.rename

    def refuse(source, place):
        if place == target and source.name != "bundle":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, place)

    monkeypatch.setattr(folder.os, "rename", refuse)
    with pytest.raises(HarnessError, match="bundle: cannot be written"):
        with folder.whole(target, overwrite=True) as draft:
            (draft / "held").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (target / "held").read_text() == "old"


def test_a_checkpoint_that_changes_while_it_is_exported_is_refused(tmp_path):
    source = Checkpoint(write_checkpoint(tmp_path / "model", layers=LAYERS))

    def say(text):
        if text == "export: trace decoder":  # the vision tower is written by now
            with source.files[0].open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(b"\0\0")

    with pytest.raises(HarnessError, match="the checkpoint changed while it was read"):
        export(source, tmp_path / "out", "fp16", grid=GRID, context=CONTEXT, progress=say)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_left_of_a_killed_index_is_cleared(tmp_path):
    target = tmp_path / "made_decode_fp16_s1"
    (tmp_path / f".{target.name}-123.seams.json").write_text("{")
    folder.clear_away(target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"mode": "int4"}, "mode: 'int4' is not known; known are fp16, int8lin, int8hu"),
    ({"mode": "fp16", "activations": "bf16"}, "activations: 'bf16' is not known"),
    ({"mode": "fp16", "context": 2}, "context: 2 is not within 3..2048 tokens"),
    ({"mode": "fp16", "context": 4096}, "context: 4096 is not within"),
    ({"mode": "fp16", "grid": (5, 6)}, "vision grid: grid 5x6 does not divide"),
])
def test_bad_arguments_are_one_sentence(wrong, sentence, checkpoint, tmp_path):
    with pytest.raises(HarnessError) as caught:
        export(checkpoint, tmp_path, **{"grid": GRID, "context": CONTEXT, **wrong})
    assert str(caught.value).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    bare = write_checkpoint(tmp_path / "bare", layers=LAYERS)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(HarnessError, match=r"tokenizer\.json: the file is missing"):
        export(Checkpoint(bare), tmp_path / "out", "fp16", grid=GRID, context=CONTEXT)

