"""The contract's integers against HF's own `get_rope_index`, and the graph's in-graph planes against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.graph.contract import NO_SHIFT, deepstack_rows, host_inputs, positions, rope_axis
from harness.graph.decoder import Rope

VOCAB, PAD = 512, 500


def prompt(before: int, rows: int, columns: int, after: int) -> np.ndarray:
    return np.array([1] * before + [PAD] * (rows * columns) + [2] * after)


SIDES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), SIDES, SIDES, st.integers(0, 40))
def test_planes_are_hugging_faces(before, rows, columns, after):
    ids = prompt(before, rows, columns, after)
    host = host_inputs(ids, PAD, VOCAB, (rows, columns))
    ours = positions(host.ids, VOCAB, host.shift_start, host.shift_amount, columns)
    assert np.array_equal(ours, _hf_planes(ids, rows, columns))


def _hf_planes(ids: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """HF's formula, by HF: `get_rope_index` on a stand-in that has only the config it reads."""
    import inspect
    from types import SimpleNamespace

    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    config = SimpleNamespace(image_token_id=PAD, video_token_id=-1, vision_start_token_id=3,
                             vision_config=SimpleNamespace(spatial_merge_size=2))
    stand_in = SimpleNamespace(config=config)
    if hasattr(Qwen3VLModel, "get_vision_position_ids"):
        stand_in.get_vision_position_ids = lambda *a, **k: Qwen3VLModel.get_vision_position_ids(stand_in, *a, **k)
    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    tensor = torch.from_numpy(ids)[None]
    given_ = {"input_ids": tensor, "image_grid_thw": grid, "attention_mask": torch.ones_like(tensor)}
    if "mm_token_type_ids" in inspect.signature(Qwen3VLModel.get_rope_index).parameters:
        given_["mm_token_type_ids"] = (tensor == PAD).int()
        return Qwen3VLModel.get_rope_index(stand_in, **given_)[0][:, 0].numpy()
    # 4.57 finds images by the vision-start token before them: put one there, and take its column out again.
    start = int((ids == PAD).argmax())
    given_["input_ids"] = torch.from_numpy(np.insert(ids, start, 3))[None]
    given_["attention_mask"] = torch.ones_like(given_["input_ids"])
    planes = Qwen3VLModel.get_rope_index(stand_in, **given_)[0][:, 0].numpy()
    planes[:, start + 1:] -= 1
    return np.delete(planes, start, axis=1)


@pytest.fixture(scope="module")
def rope():
    from harness.checkpoint import EMBEDDED, Checkpoint

    geometry = Checkpoint(EMBEDDED).geometry
    return geometry, {columns: Rope(geometry, columns) for columns in range(1, 10)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), SIDES, SIDES, st.integers(0, 40), st.integers(0, 100_000))
def test_the_graph_computes_the_same_planes(rope, before, rows, columns, after, offset):
    geometry, ropes = rope
    host = host_inputs(np.where(prompt(before, rows, columns, after) == PAD, geometry.image_token,
                                prompt(before, rows, columns, after)), geometry.image_token, geometry.vocab,
                       (rows, columns))
    place = torch.arange(offset, offset + len(host.ids), dtype=torch.int32)
    start = host.shift_start + offset
    planes = ropes[columns].planes(torch.from_numpy(host.ids), place, torch.tensor([start], dtype=torch.int32),
                                   torch.tensor([host.shift_amount], dtype=torch.int32))
    assert np.array_equal(planes.numpy(), positions(host.ids, geometry.vocab, start, host.shift_amount, columns, offset))


def test_text_has_no_shift():
    host = host_inputs(np.arange(5), PAD, VOCAB, None)
    assert (host.shift_start, host.shift_amount) == (NO_SHIFT, 0)
    assert np.array_equal(positions(host.ids, VOCAB, NO_SHIFT, 0, 1), np.tile(np.arange(5), (3, 1)))


@pytest.mark.parametrize("ids, grid, word", [
    ([1, VOCAB], None, "outside the vocabulary"), ([-1, 2], None, "outside the vocabulary"),
    ([PAD, 1, PAD], (1, 2), "contiguous"), ([PAD], (1, 2), "the grid asks for 2"), ([PAD], None, "the grid asks for 0")])
def test_bad_ids_are_one_sentence(ids, grid, word):
    with pytest.raises(HarnessError, match=word):
        host_inputs(np.array(ids), PAD, VOCAB, grid)


def test_deepstack_rows_stand_tap_after_tap():
    ids = np.array([7, VOCAB, VOCAB + 3, 9])
    assert deepstack_rows(ids, VOCAB, 2, 4).tolist() == [-1, 8, 11, -1]


def test_lanes_interleave_and_leave_a_tail_of_t():
    assert "".join("thw"[axis] for axis in rope_axis((8, 4, 4), 16)) == "thwthwthwthwtttt"
    axes = rope_axis((24, 20, 20), 64)
    assert [int((axes == axis).sum()) for axis in range(3)] == [24, 20, 20]
