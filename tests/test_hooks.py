"""Each seam is what its name says: recomputed in numpy from its neighbours and the checkpoint's weights.

The same tests run under transformers 4.57 and 5.x.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recorded import CASES, DECODE, IMAGE, TEXT, TURNS, checkpoint, close, model, oracle  # noqa: F401

from harness.cases import Case
from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.oracle import forward, record, wanted_seams
from harness.oracle.hooks import SeamHooks
from harness.store import Oracle
from harness.trace import decoder_seams, vision_seams


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_seam_is_there_in_order_with_its_shape(oracle: Oracle, checkpoint: Checkpoint, case: Case) -> None:
    recorded, geometry = oracle.case(case.name), checkpoint.geometry
    vision = vision_seams(geometry, inside=True) if case.images else ()
    assert recorded.seams == (*vision, *decoder_seams(geometry, inside=True), "kv.keys", "kv.values")
    length = recorded.inputs.length + DECODE
    for name, array in recorded.trace.items():
        assert array.dtype == np.float32 and np.isfinite(array).all() and array.any(), name
        if name.startswith(("decoder.", "logits")):
            assert array.shape[0] == length, name
    trace = recorded.trace
    assert trace["decoder.layers.01.attn.q_rope"].shape == (length, geometry.heads, geometry.head_dim)
    assert trace["decoder.layers.01.attn.v"].shape == (length, geometry.kv_heads, geometry.head_dim)
    assert trace["kv.keys"].shape == (geometry.layers, geometry.kv_heads, length, geometry.head_dim)
    assert trace["logits"].shape == (length, geometry.vocab)
    if case.images:
        patches = len(recorded.inputs.patches)
        assert trace["vision.layers.02.attn.k_rope"].shape == (patches, geometry.vision_heads, 16)
        assert trace["vision.deepstack.1.norm"].shape == (patches // 4, 4 * geometry.vision_hidden)
        assert trace["vision.merger"].shape == (patches // 4, geometry.hidden)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decoder_seams_are_what_their_names_say(oracle: Oracle, checkpoint: Checkpoint, case: Case) -> None:
    trace, inputs, geometry = oracle.case(case.name).trace, oracle.case(case.name).inputs, checkpoint.geometry
    image = np.flatnonzero(inputs.ids == geometry.image_token)
    weight = {name: tensor.float().numpy() for name, tensor in checkpoint.tensors()}

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x.astype(np.float64)**2).mean(-1, keepdims=True) + geometry.rms_eps) * weight[name]

    assert case is TEXT or np.array_equal(trace["decoder.embed"][image], trace["vision.merger"])
    stream = trace["decoder.embed"]
    for layer in range(geometry.layers):
        at, stem = f"decoder.layers.{layer:02d}", f"model.language_model.layers.{layer}"
        part = {name.removeprefix(f"{at}."): array for name, array in trace.items() if name.startswith(f"{at}.")}
        assert close(part["input_norm"], rms(stream, f"{stem}.input_layernorm.weight"))
        query = (part["input_norm"] @ weight[f"{stem}.self_attn.q_proj.weight"].T).reshape(part["attn.q_norm"].shape)
        assert close(part["attn.q_norm"], rms(query, f"{stem}.self_attn.q_norm.weight"), 5e-6)
        assert close(part["attn.out"], part["attn.context"] @ weight[f"{stem}.self_attn.o_proj.weight"].T)
        assert close(part["post_norm"], rms(stream + part["attn.out"], f"{stem}.post_attention_layernorm.weight"))
        assert close(part["mlp.act"], silu(part["mlp.gate"]) * part["mlp.up"])
        assert close(trace[at], stream + part["attn.out"] + part["mlp.out"])
        for name, cached in (("attn.k_rope", "kv.keys"), ("attn.v", "kv.values")):
            assert np.array_equal(part[name].transpose(1, 0, 2), trace[cached][layer])
        assert close(np.linalg.norm(part["attn.q_rope"], axis=-1), np.linalg.norm(part["attn.q_norm"], axis=-1))
        stream = trace[at]
        if layer < len(geometry.deepstack_taps):
            expected = stream.copy()
            if case.images:
                expected[image] += trace[f"vision.deepstack.{layer}"]
            stream = trace[f"{at}.deepstack"]
            assert np.array_equal(stream, expected)
    assert close(trace["decoder.norm"], rms(stream, "model.language_model.norm.weight"))
    head = weight["model.language_model.embed_tokens.weight" if geometry.tied else "lm_head.weight"]
    assert close(trace["logits"], trace["decoder.norm"] @ head.T)


@pytest.mark.parametrize("case", (IMAGE, TURNS), ids=lambda case: case.name)
def test_vision_seams_are_what_their_names_say(oracle: Oracle, checkpoint: Checkpoint, case: Case) -> None:
    trace, geometry = oracle.case(case.name).trace, checkpoint.geometry
    weight = {name.removeprefix("model.visual."): tensor.float().numpy() for name, tensor in checkpoint.tensors()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weight[f"{name}.weight"].T + weight[f"{name}.bias"]

    stream = trace["vision.embed"]
    for layer in range(geometry.vision_layers):
        at, stem = f"vision.layers.{layer:02d}", f"blocks.{layer}"
        part = {name.removeprefix(f"{at}."): array for name, array in trace.items() if name.startswith(f"{at}.")}
        heads = linear(part["norm1"], f"{stem}.attn.qkv").reshape(len(stream), 3, geometry.vision_heads, -1)
        assert close(part["attn.v"], heads[:, 2])
        assert close(np.linalg.norm(part["attn.q_rope"], axis=-1), np.linalg.norm(heads[:, 0], axis=-1))
        assert not close(part["attn.k_rope"][1:], heads[1:, 1], 1e-2)
        assert close(part["attn.out"], linear(part["attn.context"], f"{stem}.attn.proj"))
        assert close(part["mlp.fc1"], linear(part["norm2"], f"{stem}.mlp.linear_fc1"))
        assert close(part["mlp.out"], linear(part["mlp.act"], f"{stem}.mlp.linear_fc2"))
        assert close(trace[at], stream + part["attn.out"] + part["mlp.out"])
        stream = trace[at]
    mergers = {f"vision.deepstack.{tap}": f"deepstack_merger_list.{tap}" for tap in range(3)}
    mergers["vision.merger"] = "merger"
    for name, stem in mergers.items():
        assert close(trace[f"{name}.fc1"], linear(trace[f"{name}.norm"], f"{stem}.linear_fc1"))
        assert close(trace[name], linear(trace[f"{name}.act"], f"{stem}.linear_fc2"))


def test_inside_of_chosen_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    geometry = checkpoint.geometry
    plain, some = wanted_seams(geometry), wanted_seams(geometry, frozenset({3}))
    assert plain == (*vision_seams(geometry), *decoder_seams(geometry))
    assert wanted_seams(geometry, frozenset()) == plain
    extra = set(some) - set(plain)
    assert {name.rsplit(".", 1)[0] for name in extra if ".layers." not in name} == {"vision.merger"}
    assert all(".layers.03." in name for name in extra if ".layers." in name) and "vision.deepstack.0.norm" not in extra
    assert wanted_seams(geometry, image=False) == decoder_seams(geometry)
    oracle = record(checkpoint, [TEXT], tmp_path / "o")
    before = oracle.case("text").trace
    assert set(before) == {*decoder_seams(geometry), "kv.keys", "kv.values"}
    more = record(checkpoint, [TEXT], tmp_path / "o", inside=frozenset({3})).case("text").trace
    assert "decoder.layers.03.attn.q_rope" in more and "decoder.layers.02.attn.q_rope" not in more
    assert all(np.array_equal(before[name], more[name]) for name in before)
    kept = record(checkpoint, [TEXT], tmp_path / "o").case("text").trace
    assert set(kept) == set(more)  # asking for less keeps more


def test_a_model_built_otherwise_is_refused(model, checkpoint: Checkpoint, oracle: Oracle) -> None:
    seams, inputs = wanted_seams(checkpoint.geometry), oracle.case("text").inputs
    with SeamHooks(model, checkpoint.geometry, seams) as hooks:
        forward(model, inputs)
    with pytest.raises(HarnessError, match="vision.embed: the model passed no value"):
        hooks.arrays()
    with pytest.raises(HarnessError, match="built otherwise"):
        SeamHooks(model.model, checkpoint.geometry, seams).__enter__()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_any_seams_can_be_asked_for(model, checkpoint: Checkpoint, oracle: Oracle) -> None:
    recorded, some = oracle.case("image"), ("vision.layers.01.attn.v", "decoder.layers.02.attn.k_rope", "logits")
    with SeamHooks(model, checkpoint.geometry, some) as hooks:
        forward(model, recorded.inputs, recorded.rollout.tokens)
    arrays = hooks.arrays()
    assert tuple(arrays) == some and all(np.array_equal(arrays[name], recorded.trace[name]) for name in some)
