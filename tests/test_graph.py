"""Our conversion: strict loading, tied and untied, in chunks, with values injected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import write_checkpoint
from safetensors.torch import load_file, save_file

from harness.cases import FrozenInputs
from harness.checkpoint import Checkpoint
from harness.engines import Request
from harness.engines.torch_graph import TorchGraph
from harness.errors import HarnessError
from harness.graph.reference import HEAD, factory
from harness.graph.vision import block_major, interpolate_positions

GRID = (4, 6)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="module")
def engine(root):
    return TorchGraph(factory(root, GRID), Checkpoint(root).geometry)


def inputs(engine, before=5, after=7):
    geometry = engine.geometry
    count = GRID[0] * GRID[1] // 4
    ids = np.array([1] * before + [geometry.image_token] * count + list(range(2, 2 + after)), dtype=np.int32)
    patches = np.random.default_rng(0).standard_normal((GRID[0] * GRID[1], geometry.patch_features)).astype(np.float32)
    return FrozenInputs("case", ids, np.zeros((3, len(ids)), np.int32), patches, (1, *GRID))


def run(engine, request, **settings):
    return next(engine.run([request], **settings))


def close(one, other, limit=1e-5):
    return np.linalg.norm(one.astype(float) - other) / np.linalg.norm(other) < limit


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_compute_what_one_call_does(engine, chunk):
    request = Request(inputs(engine), kv=True, seams=frozenset({"decoder.layers.01.attn.q_rope"}))
    whole = run(engine, request)
    parts = run(TorchGraph(engine.conversion, engine.geometry, chunk=chunk), request)
    assert set(whole) == set(parts) and all(close(parts[seam], whole[seam]) for seam in whole)


def test_forced_tokens_one_by_one_are_free_tokens(engine):
    free = run(engine, Request(inputs(engine), free=5))
    forced = run(TorchGraph(engine.conversion, engine.geometry, stepwise=True),
                 Request(inputs(engine), forced=tuple(free.facts["tokens"])))
    assert close(forced["logits"], free["logits"])


def test_every_seam_offered_is_answered(engine):
    trace = run(engine, Request(inputs(engine), seams=engine.seams()))
    assert set(trace) == set(engine.seams())
    assert all(len(array) in (24, 6, 18) for array in trace.arrays.values())


def test_injection_leaves_only_the_local_error(engine):
    request = Request(inputs(engine), seams=engine.seams())
    true = run(engine, request)
    layer = engine.conversion.decoder.layers[1]
    kept = layer.self_attn.scale
    layer.self_attn.scale = 1.1 * kept
    stream = [seam for seam in true if seam.count(".") == 2 or seam.endswith(".deepstack") or seam.count(".") == 1]
    local = run(engine, request, inject=true, inject_at=stream)
    layer.self_attn.scale = kept
    wrong = [seam for seam in stream if not np.array_equal(local[seam], true[seam])]
    assert wrong == ["decoder.layers.01"]


def test_injected_logits_are_not_compared_with_themselves(engine):
    request = Request(inputs(engine), seams=engine.seams())
    true = run(engine, request)
    head = engine.conversion.decoder.lm_head
    kept, head.weight = head.weight, torch.nn.Parameter(head.weight * 1.5)
    local = run(engine, request, inject=true, inject_at=engine.seams())
    head.weight = kept
    assert not close(local["logits"], true["logits"], 0.1)


def test_a_graph_that_ignores_taps_cannot_be_injected_into(engine):
    engine.conversion.injectable = False
    try:
        with pytest.raises(HarnessError, match="ignores"):
            run(engine, Request(inputs(engine)), inject={})
    finally:
        del engine.conversion.injectable


def spoiled(root, target, spoil):
    weights = load_file(root / "model.safetensors")
    spoil(weights)
    target.mkdir()
    (target / "config.json").write_bytes((root / "config.json").read_bytes())
    save_file(weights, target / "model.safetensors")
    return target


@pytest.mark.parametrize("spoil, word", [
    (lambda weights: weights.pop(HEAD), "missing"),
    (lambda weights: weights.update(extra=torch.ones(2)), "no place in the graph"),
    (lambda weights: weights.update({HEAD: weights[HEAD][:-1].clone()}), "shape"),
    (lambda weights: weights.pop("model.visual.blocks.1.mlp.linear_fc1.bias"), "linear_fc1.bias")])
def test_loading_is_strict(root, tmp_path, spoil, word):
    with pytest.raises(HarnessError, match=word):
        factory(spoiled(root, tmp_path / "model", spoil), GRID)


def test_a_tied_head_may_be_stored_again_only_if_equal(tmp_path):
    root = write_checkpoint(tmp_path / "tied", tied=True)
    embedding = "model.language_model.embed_tokens.weight"
    same = spoiled(root, tmp_path / "same", lambda weights: weights.update({HEAD: weights[embedding].clone()}))
    decoder = factory(same, GRID).decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    with pytest.raises(HarnessError, match="differs from the embedding"):
        factory(spoiled(root, tmp_path / "other", lambda weights: weights.update({HEAD: weights[embedding] + 1})), GRID)


def test_the_graph_holds_the_checkpoint_back(root):
    held, stored = factory(root, GRID).tensors(), dict(Checkpoint(root).tensors())
    assert set(held) == set(stored) and all(torch.equal(held[name], stored[name].float()) for name in stored)


def test_an_odd_grid_is_refused(root):
    with pytest.raises(HarnessError, match="4x5"):
        factory(root, (4, 5))


def test_positions_at_the_tables_own_grid_are_the_table():
    table = torch.randn(16, 3)
    place = block_major(4, 4, 2)
    assert torch.equal(interpolate_positions(table, 4, 4, 2), table[place[:, 0] * 4 + place[:, 1]])
