"""Synthetic checkpoints: the published geometry, the same bytes from a seed whatever the threads, whole or not there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.checkpoint import Checkpoint, safetensors_header
from harness.cli import main
from harness.errors import HarnessError
from harness.graph.reference import Reference
from harness.synth import SIZES, draw, plan, synthesize, writer
from harness.synth.sizes import config_of, tensors_of

PARAMETERS = {"2b": 2.127532032e9, "4b": 4.437815808e9, "8b": 8.767123696e9}
"""What the published checkpoints count (sum over the index of their shards)."""


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_are_the_published_ones(size: str) -> None:
    what = plan(size)
    assert what.parameters == PARAMETERS[size]
    assert all(2 * sum(int(np.prod(shape)) for _, shape in shard) <= writer.SHARD for shard in what.shards)


def test_a_checkpoint_in_shards_loads_into_our_graph(tmp_path: Path) -> None:
    root = synthesize(plan("tiny", shard_bytes=300_000), tmp_path / "m", seed=5)
    held = Checkpoint(root)
    assert len(list(root.glob("model-*-of-*.safetensors"))) > 3 and not list(tmp_path.glob(".*"))
    weights = {name: tensor.float() for name, tensor in held.tensors()}
    assert all(torch.isfinite(value).all() and value.ndim == 1 or value.std() > 0 for value in weights.values())
    Reference(held.geometry, (28, 28), weights)  # strict: nothing missing, nothing over, every shape right
    norm = weights["model.language_model.layers.1.input_layernorm.weight"]
    assert 0.1 < norm.std() < 0.5 and norm.min() > 0


def test_a_seed_means_the_same_bytes_whatever_the_threads_and_the_depth(tmp_path: Path, monkeypatch) -> None:
    first = Checkpoint(synthesize(plan("tiny"), tmp_path / "a", seed=1))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert Checkpoint(synthesize(plan("tiny"), tmp_path / "b", seed=1)).digest == first.digest
    assert Checkpoint(synthesize(plan("tiny"), tmp_path / "c", seed=2)).digest != first.digest
    short = Checkpoint(synthesize(plan("tiny", layers=3, vision_layers=3), tmp_path / "d", seed=1))
    assert set(short.names()) < set(first.names())
    assert all(torch.equal(tensor, first.tensor(name)) for name, tensor in short.tensors())


def test_a_tensor_of_many_blocks(tmp_path: Path, monkeypatch) -> None:
    shape, name = (151, 64), "model.language_model.embed_tokens.weight"
    monkeypatch.setattr(draw, "BLOCK", 64 * 50)
    parts = [draw.draw(name, shape, 0, block) for block in draw.blocks(shape)]
    assert [len(part) for part in parts] == [50, 50, 50, 1]
    values = draw.from_bfloat16(np.concatenate(parts))
    assert values.shape == shape and abs(values.std() / 0.03 - 1) < 0.03 and abs(values.mean()) < 0.001
    assert not np.array_equal(parts[0], parts[1])


def test_massive_channels_and_bfloat16() -> None:
    name, shape = "model.language_model.layers.2.mlp.down_proj.weight", (64, 192)
    rows = draw.from_bfloat16(draw.draw(name, shape, 7, (0, 0, 64))).std(axis=1)
    massive = draw.massive_channels(64, 7)
    assert set(np.flatnonzero(rows > 10 * np.median(rows))) == set(massive) and 0 < len(massive) <= draw.MASSIVE
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    assert np.array_equal(draw.from_bfloat16(draw.to_bfloat16(values)), torch.from_numpy(values).bfloat16().float().numpy())


def test_special_tokens_are_the_tokenizers(tmp_path: Path) -> None:
    root = synthesize(plan("tiny"), tmp_path / "m")
    ids = {token["content"]: token["id"] for token in json.loads((root / "tokenizer.json").read_text())["added_tokens"]}
    for size in SIZES:
        config = config_of(size)
        assert config["image_token_id"] == ids["<|image_pad|>"]
        assert config["vision_start_token_id"] == ids["<|vision_start|>"]
        assert max(ids.values()) < config["text_config"]["vocab_size"]
        assert len(dict(tensors_of(config))) == len(list(tensors_of(config)))


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch) -> None:
    what, target = plan("tiny"), tmp_path / "m"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_next", full)
        with pytest.raises(HarnessError, match="the disk filled up"):
            synthesize(what, target)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
        with pytest.raises(HarnessError, match="needs 0.07 GB of disk, 0.00 GB are free"):
            synthesize(what, target)
    killed = tmp_path / ".m.part"  # what a killed run leaves
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    synthesize(what, target)
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and safetensors_header(target / "model.safetensors")
    with pytest.raises(HarnessError, match="already there"):
        synthesize(what, target)


def test_two_writers(tmp_path: Path) -> None:
    (tmp_path / ".m.part").mkdir()
    other = os.open(tmp_path / ".m.part", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(HarnessError, match="another process"):
        synthesize(plan("tiny"), tmp_path / "m")
    os.close(other)


@pytest.mark.parametrize("arguments, sentence", [({"layers": 0}, "--layers: 0 layers"), ({"size": "3b"}, "no size '3b'")])
def test_bad_sizes(arguments: dict, sentence: str) -> None:
    with pytest.raises(HarnessError, match=sentence):
        plan(**{"size": "tiny"} | arguments)


def test_command_line_states_the_disk_before_it_starts(tmp_path: Path, capsys) -> None:
    assert main(["synth", "--size", "tiny", str(tmp_path / "m"), "--layers", "3"]) == 0
    assert "GB of disk" in capsys.readouterr().out.splitlines()[0]
    assert Checkpoint(tmp_path / "m").geometry.layers == 3
