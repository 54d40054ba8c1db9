"""Export in a stream: weights made one at a time and in rows are the bits of the whole; nothing big is held or left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from random_models import write_checkpoint
from torch import nn

pytest.importorskip("coreai_torch")
pytest.importorskip("coreai_opt")

from harness.checkpoint import Checkpoint  # noqa: E402  (after the skips)
from harness.engines.coreai_seams import find_seams  # noqa: E402
from harness.engines.program import read_constants  # noqa: E402
from harness.errors import HarnessError  # noqa: E402
from harness.export import convert, export, room, values  # noqa: E402
from harness.export.hollow import Pending, hollow_decoder, hollow_vision  # noqa: E402
from harness.export.program import trace_decoder, trace_vision  # noqa: E402
from harness.export.quantizer import quantize_linears, stored  # noqa: E402
from harness.export.values import CheckpointValues  # noqa: E402
from harness.graph.quantize import CLIPPED, PLAIN, RECIPES, planned_weights  # noqa: E402
from harness.graph.reference import HEAD, TEXT, build_towers, checkpoint_name  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GRID, CONTEXT = (4, 6), 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("made") / "tiny", layers=3, dtype="bfloat16"))


def test_rows_and_layers_give_the_bits_of_quantizing_the_whole_model(checkpoint, monkeypatch):
    """coreai-opt on all Linears of the body in one call, on the head in another: as it is meant to be used."""
    recipe = RECIPES["int8hu"]
    weights = {name: weight for name, weight, _ in planned_weights(checkpoint, recipe)}
    _, decoder = build_towers(recipe.geometry(checkpoint.geometry), GRID, weights)
    linears = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    quantize_linears([module for name, module in linears.items() if name != "lm_head"], CLIPPED)
    quantize_linears([decoder.lm_head], PLAIN)
    monkeypatch.setattr(values, "BLOCK", 7 * 64)  # seven rows of most tensors, so that blocks do not divide them
    source = CheckpointValues(checkpoint, recipe, GRID)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for name, module in linears.items():
            tensor = checkpoint_name(TEXT, f"{name}.weight")
            for part, right in stored(decoder.get_submodule(name)).items():
                assert torch.equal(source.codes(tensor, recipe.scheme(tensor), part, right), right), (name, part)
    torch.set_num_threads(1)


def test_the_twin_without_weights_numbers_its_operations_as_the_real_one(checkpoint, tmp_path, monkeypatch):
    """Both in DEBUG mode, one with weights and one without: every node has the same operation."""
    for mode, dtype in (("int8hu", torch.float16), ("fp16", torch.float32)):
        recipe = RECIPES[mode]
        source = CheckpointValues(checkpoint, recipe, GRID)
        decoder, pending, _ = hollow_decoder(checkpoint.geometry, (2, 3), recipe, source, dtype)
        vision, seen = hollow_vision(checkpoint.geometry, GRID, source, dtype)
        for program, made in ((trace_decoder(decoder, checkpoint.geometry, CONTEXT, dtype), pending),
                              (trace_vision(vision, checkpoint.geometry, dtype), seen)):
            program.pending = made
            names = {name for node in program.nodes.values() for name in node.names}
            convert.save_asset(program, tmp_path / "named.aimodel", debug=True)
            with monkeypatch.context() as patch:
                patch.setattr(convert, "_Naming", convert._Filling)
                convert.save_asset(program, tmp_path / "real.aimodel", debug=True)
            found = [find_seams(tmp_path / f"{kind}.aimodel", names) for kind in ("named", "real")]
            assert found[0] == found[1] and len(found[0]) > 20


def test_a_tied_table_is_stored_once(tmp_path):
    tied = Checkpoint(write_checkpoint(tmp_path / "tied", tied=True, layers=3, dtype="bfloat16"))
    made = export(tied, tmp_path / "out", "fp16", grid=GRID, context=CONTEXT, vision=False)
    program = read_constants(made.decoder / f"{made.decoder.name}.aimodel")
    assert sum(weight.shape == (512, 64) for weight in program.weights) == 1


def test_a_hollow_tensor_that_the_program_lost_is_an_error():
    pending = Pending()
    one, other = (pending.hollow(name, (1 << 18,), torch.float16, torch.zeros_like) for name in ("one", "other"))
    with pytest.raises(HarnessError, match="one: the converted program does not hold it, nor 1 others"):
        pending.check_all_made()
    assert not pending.is_weight(torch.zeros(3)) and pending.is_weight(other)
    pending = Pending()
    wrong = pending.hollow("one", (4,), torch.float16, lambda like: torch.zeros(3, dtype=torch.float16))
    with pytest.raises(HarnessError, match=r"one: came as torch.float16 \(3,\), planned was torch.float16 \(4,\)"):
        pending.value(wrong)
    assert one.shape == other.shape


def test_what_fp16_does_not_hold_is_named_and_leaves_nothing(tmp_path):
    from safetensors.torch import load_file, save_file

    root = write_checkpoint(tmp_path / "wide", layers=3)
    tensors = load_file(root / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors[name][5, 6] = 70000
    save_file(tensors, root / "model.safetensors")
    with pytest.raises(HarnessError, match=rf"{re.escape(name)}: has values that are not finite in fp16"):
        export(Checkpoint(root), tmp_path / "out", "int8hu", grid=GRID, context=CONTEXT, tmp=tmp_path)
    assert list((tmp_path / "out").iterdir()) == [] and not list(tmp_path.glob("harness-export-*"))


def test_shapes_are_checked_before_any_work(tmp_path):
    from safetensors.torch import load_file, save_file

    root = write_checkpoint(tmp_path / "odd", layers=3)
    tensors = load_file(root / "model.safetensors")
    tensors[HEAD] = tensors[HEAD].T.contiguous()
    save_file(tensors, root / "model.safetensors")
    with pytest.raises(HarnessError, match=r"lm_head.weight: has shape \(64, 512\), the config asks for \(512, 64\)"):
        export(Checkpoint(root), tmp_path / "out", "int8hu", grid=GRID, context=CONTEXT, vision=False)


def test_room_is_stated_and_near_the_truth(checkpoint, tmp_path):
    said: list[str] = []
    made = export(checkpoint, tmp_path / "out", "int8hu", grid=GRID, context=CONTEXT, tmp=tmp_path, progress=said.append)
    assert re.match(rf"export: needs \d\.\d GiB for the bundles in {tmp_path}/out, \d\.\d GiB for temporary files in "
                    rf"{tmp_path}, and about \d\.\d GiB of memory", said[0])
    planned = room.Room.of(checkpoint.geometry, RECIPES["int8hu"], GRID, torch.float16, decoders=1, vision=True)
    assert planned.assets < sum(made.bytes.values()) < planned.assets + 2**20


def test_a_killed_export_is_cleared_away_by_the_next(checkpoint, tmp_path):
    out, tmp = tmp_path / "out", tmp_path / "tmp"
    tmp.mkdir()
    words = [sys.executable, "-m", "harness.cli", "export", str(checkpoint.root), "--out", str(out), "--tmp", str(tmp),
             "--grid", "4x6", "--context", str(CONTEXT)]
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while not list(out.glob(".tiny_vision-*")) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        child.kill()
    assert list(out.glob(".tiny_*")) and list(tmp.glob("harness-export-*")), "it was killed in the middle"
    export(checkpoint, out, "int8hu", grid=GRID, context=CONTEXT, tmp=tmp)
    assert {path.name for path in out.iterdir()} == {"tiny_decode_int8hu_s1", "tiny_decode_int8hu_s1.seams.json",
                                                     "tiny_vision"}
    assert not list(tmp.iterdir())
