"""A checkpoint's geometry has no silent default, and a damaged shard is noticed before anything is mapped."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness.checkpoint import EMBEDDED, Checkpoint, open_checkpoint
from harness.errors import HarnessError
from harness.geometry import Geometry

CONFIG = json.loads((EMBEDDED / "config.json").read_text())


def without(*path):
    config = copy.deepcopy(CONFIG)
    section = config
    for key in path[:-1]:
        section = section[key]
    del section[path[-1]]
    return config


def changed(value, *path):
    config = copy.deepcopy(CONFIG)
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return config


@pytest.mark.parametrize("path", [
    ("text_config", "rope_theta"), ("text_config", "rms_norm_eps"), ("text_config", "rope_scaling"),
    ("text_config", "rope_scaling", "mrope_section"), ("text_config", "head_dim"), ("tie_word_embeddings",),
    ("text_config", "num_key_value_heads"), ("vision_config", "deepstack_visual_indexes"), ("vision_config",),
    ("vision_config", "num_position_embeddings"), ("image_token_id",)])
def test_a_missing_key_is_named(path):
    with pytest.raises(HarnessError, match="missing") as caught:
        Geometry.from_config(without(*path))
    assert path[-1] in str(caught.value)


@pytest.mark.parametrize("value, path, word", [
    ([8, 4, 5], ("text_config", "rope_scaling", "mrope_section"), "mrope_section"),
    (False, ("text_config", "rope_scaling", "mrope_interleaved"), "interleaved"),
    ("yarn", ("text_config", "rope_scaling", "rope_type"), "rope_type"),
    ("gelu", ("vision_config", "hidden_act"), "hidden_act"),
    ([2, 1, 0], ("vision_config", "deepstack_visual_indexes"), "deepstack"),
    (48, ("vision_config", "out_hidden_size"), "out_hidden_size"),
    ("64", ("text_config", "hidden_size"), "hidden_size"), ("llama", ("model_type",), "llama")])
def test_a_wrong_value_is_named(value, path, word):
    with pytest.raises(HarnessError, match=word):
        Geometry.from_config(changed(value, *path))


def test_both_spellings_of_rope_are_read():
    new = without("text_config", "rope_scaling")
    new["text_config"]["rope_parameters"] = {**CONFIG["text_config"]["rope_scaling"], "rope_theta": 5e6}
    del new["text_config"]["rope_theta"]
    assert Geometry.from_config(new) == Geometry.from_config(CONFIG)


def write(folder, shards):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if len(shards) > 1:
        index = {key: name for name, tensors in shards.items() for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


ONE, TWO = {"a": np.arange(6, dtype=np.float32)}, {"b": np.ones((2, 3), np.float32)}


def test_shards_are_read_through_the_index(tmp_path):
    write(tmp_path, {"one.safetensors": ONE, "two.safetensors": TWO})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == ("a", "b") and checkpoint.tensor("b").shape == (2, 3)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, {"one.safetensors": ONE, "two.safetensors": TWO})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(HarnessError, match="two.safetensors.*missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [4, 20, -3])
def test_a_truncated_shard_is_named(tmp_path, keep):
    write(tmp_path, {"model.safetensors": ONE})
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(HarnessError, match="model.safetensors"):
        Checkpoint(tmp_path)


def test_a_shard_outside_the_checkpoint_is_refused(tmp_path):
    write(tmp_path, {"one.safetensors": ONE, "two.safetensors": TWO})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(HarnessError, match="outside"):
        Checkpoint(tmp_path)


def test_the_digest_binds_weights_and_config(tmp_path):
    write(tmp_path, {"model.safetensors": ONE})
    before = Checkpoint(tmp_path).digest
    save_file({"a": ONE["a"] + 1}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).digest != before


def test_neither_directory_nor_hub_id_is_one_sentence():
    with pytest.raises(HarnessError, match="no such directory"):
        open_checkpoint("/nowhere/at/all")


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HarnessError, match="hub did not give it"):
        open_checkpoint("nobody/no-such-model")


@pytest.mark.parametrize("change", ["bytes", "gone"])
def test_a_file_that_changed_since_it_was_opened_is_named(tmp_path, change):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    checkpoint.unchanged()
    path, = checkpoint.files
    path.unlink() if change == "gone" else path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(HarnessError, match="model.safetensors: the checkpoint changed while it was read"):
        checkpoint.unchanged()


def test_a_file_that_is_cut_short_behind_its_header_is_one_sentence(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    checkpoint.files[0].write_bytes(b"\0" * 16)
    with pytest.raises(HarnessError, match="model.safetensors: .*: cannot be read .*; download the shard again"):
        checkpoint.tensor(checkpoint.names()[0])
