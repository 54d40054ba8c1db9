"""The oracle: the rollout is greedy, float32 is float32, loading is strict, a killed recording goes on.

The same tests run under transformers 4.57 and 5.x.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import write_checkpoint
from recorded import CASES, DECODE, IMAGE, TEXT, checkpoint, close, model, oracle  # noqa: F401
from safetensors.torch import load_file, save_file

from harness.cases import Turn
from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.oracle import forward, freeze, load_model, record, settle, true_fp32
from harness.oracle.inputs import rope_index
from harness.oracle.rollout import Draft, mismatch
from harness.store import Oracle


def test_logits_are_those_of_a_forward_left_to_itself(oracle: Oracle, model, checkpoint: Checkpoint) -> None:
    """No hooks, no positions from us: what HF computes when it finds its own way."""
    for case in CASES:
        recorded = oracle.case(case.name)
        ids = torch.tensor([[*recorded.inputs.ids.tolist(), *recorded.rollout.tokens.tolist()]])
        model.model.rope_deltas = None
        extra = {}
        if case.images:
            extra = {"pixel_values": torch.from_numpy(recorded.inputs.patches),
                     "image_grid_thw": torch.tensor([recorded.inputs.grid]),
                     "mm_token_type_ids": (ids == checkpoint.geometry.image_token).int()}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0].numpy()
        assert np.array_equal(logits, recorded.trace["logits"])


def test_rollout_is_what_generate_gives(oracle: Oracle, model, checkpoint: Checkpoint) -> None:
    model.generation_config.eos_token_id = None
    for case in CASES:
        recorded = oracle.case(case.name)
        ids = torch.from_numpy(recorded.inputs.ids.astype(np.int64))[None]
        extra = {}
        if case.images:
            extra = {"pixel_values": torch.from_numpy(recorded.inputs.patches),
                     "image_grid_thw": torch.tensor([recorded.inputs.grid])}
            if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
                extra["mm_token_type_ids"] = (ids == checkpoint.geometry.image_token).int()
        model.model.rope_deltas = None
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                             max_new_tokens=DECODE, **extra)
        assert out[0, ids.shape[1]:].tolist() == recorded.rollout.tokens.tolist()
        rows = recorded.trace["logits"][recorded.inputs.length - 1:-1]
        assert rows.argmax(-1).tolist() == recorded.rollout.tokens.tolist() and not recorded.rollout.ties
        best = np.sort(rows, axis=-1)
        assert np.array_equal(recorded.rollout.margins, best[:, -1] - best[:, -2])
        assert 0 <= recorded.noise < 1e-3


def test_positions_over_prompt_and_rollout_are_the_rope_index(oracle: Oracle, checkpoint: Checkpoint) -> None:
    for case in CASES:
        recorded = oracle.case(case.name)
        ids = np.concatenate([recorded.inputs.ids, recorded.rollout.tokens])
        assert np.array_equal(recorded.positions, rope_index(checkpoint, ids, recorded.inputs.grid))


def test_an_earlier_image_leaves_no_trace_later(checkpoint: Checkpoint, oracle: Oracle, tmp_path: Path) -> None:
    alone = record(checkpoint, [TEXT], tmp_path / "o", inside="all")
    assert alone.case("text").digest == oracle.case("text").digest


def test_eager_attention_is_another_oracle(checkpoint: Checkpoint, oracle: Oracle, tmp_path: Path) -> None:
    eager = record(checkpoint, [IMAGE], tmp_path / "o", attention="eager")
    assert close(eager.case("image").trace["logits"], oracle.case("image").trace["logits"], 1e-5)
    with pytest.raises(HarnessError, match="attention is"):
        record(checkpoint, [IMAGE], tmp_path / "o")


def test_after_ctrl_c_the_next_run_goes_on(checkpoint: Checkpoint, oracle: Oracle, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "pass 1: decoder.02":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(checkpoint, CASES, tmp_path / "o", inside="all", progress=interrupt)
    with pytest.raises(HarnessError, match="no whole case"):
        Oracle.open(tmp_path / "o")
    told = []
    again = record(checkpoint, CASES, tmp_path / "o", inside="all", progress=lambda *step: told.append(step))
    assert [what for what, _, _ in told] == ["freezing inputs", *(f"pass 1: {stage}" for stage in (
        "decoder.02", "decoder.03", "norm", "logits.000")), "done"]
    assert again.digest == oracle.digest, "a resumed recording gives the same bytes"


def test_nothing_to_do_loads_no_model(checkpoint: Checkpoint, oracle: Oracle, monkeypatch) -> None:
    monkeypatch.setattr("harness.oracle.recording.skeleton", None)
    assert record(checkpoint, CASES, oracle.path, inside="all").digest == oracle.digest


def test_a_prompt_past_the_context(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "m", layers=3, max_position_embeddings=16))
    with pytest.raises(HarnessError, match="text: the prompt has .* 16 positions"):
        freeze(replace(TEXT, decode=12), checkpoint)
    with pytest.raises(HarnessError, match="image places"):
        freeze(replace(TEXT, turns=(Turn("user", "an <|image_pad|> of my own"),)), checkpoint)


@pytest.mark.parametrize("change, sentence", [
    (lambda weights: weights.pop("model.language_model.layers.1.mlp.up_proj.weight"), "missing keys.*up_proj"),
    (lambda weights: weights.update({"model.language_model.extra.weight": torch.ones(2)}), "unexpected keys.*extra"),
    (lambda weights: weights.update({"model.language_model.norm.weight": torch.ones(3)}), "norm.weight|size|mismatch"),
])
def test_loading_is_strict(tmp_path: Path, change, sentence: str) -> None:
    root = write_checkpoint(tmp_path / "m", layers=3)
    weights = load_file(root / "model.safetensors")
    change(weights)
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HarnessError, match=sentence):
        load_model(Checkpoint(root))


@pytest.mark.parametrize("field, value", [("rope_theta", 500000.0), ("mrope_section", (6, 5, 5)), ("rms_eps", 1e-5),
                                          ("layers", 5)])
def test_a_default_that_slipped_into_transformers_is_noticed(checkpoint: Checkpoint, field: str, value: object) -> None:
    read = Checkpoint(checkpoint.root)
    read.geometry = replace(read.geometry, **{field: value})
    with pytest.raises(HarnessError, match="reads another"):
        load_model(read)


def switch_all_on() -> None:
    torch.backends.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def test_true_fp32_switches_everything_off() -> None:
    switch_all_on()
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert set(true_fp32().values()) == {"ieee"}
    backends = torch.backends
    assert not backends.cuda.matmul.allow_tf32 and not backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest" and backends.mkldnn.conv.fp32_precision == "ieee"
    with backends.cudnn.flags():  # what torch.export does; leaving it sets the legacy flags again
        pass
    assert backends.cudnn.conv.fp32_precision != "tf32" and not backends.cudnn.allow_tf32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_true_fp32_on_a_gpu_against_float64() -> None:
    switch_all_on()
    true_fp32()
    generator = torch.Generator("cuda").manual_seed(0)
    left, right = (torch.randn(1024, 1024, device="cuda", generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    assert ((left @ right).double() - exact).norm() / exact.norm() < 1e-6  # TF32: about 3e-4
    image, kernel = (torch.randn(*shape, device="cuda", generator=generator)
                     for shape in ((1, 64, 64, 64), (64, 64, 3, 3)))
    exact = torch.nn.functional.conv2d(image.double(), kernel.double())
    assert (torch.nn.functional.conv2d(image, kernel).double() - exact).norm() / exact.norm() < 1e-6


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.sampled_from([0.0, 1e-6, 1e-3, 0.1]))
def test_where_two_ways_of_computing_disagree_there_is_a_tie(seed: int, noise: float) -> None:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 4, (3, 9)).astype(np.float32)  # integers: exact ties are common
    cached = truth + (noise * generator.uniform(-1, 1, (3, 9))).astype(np.float32)
    rollout, measured = settle("c", Draft(cached.argmax(-1).astype(np.int32), cached), truth, image_token=99)
    assert measured == np.abs(cached - truth).max() and mismatch(rollout.tokens, truth, cached) is None
    differs = np.flatnonzero(truth.argmax(-1) != rollout.tokens)
    assert set(differs) <= set(rollout.ties)
    assert all((margin <= 4 * measured) == (step in rollout.ties) for step, margin in enumerate(rollout.margins))


def test_settle_refuses_what_proves_nothing() -> None:
    rows = np.eye(3, 9, dtype=np.float32)
    draft = Draft(rows.argmax(-1).astype(np.int32), rows)
    with pytest.raises(HarnessError, match="image_pad"):
        settle("c", draft, rows, image_token=2)
    broken = rows.copy()
    broken[1, 1] = np.nan
    with pytest.raises(HarnessError, match="not finite"):
        settle("c", draft, broken, image_token=99)


def test_a_wrong_token_is_a_mismatch_where_noise_does_not_explain_it() -> None:
    rows = np.zeros((3, 9), dtype=np.float32)
    rows[:, 4] = 1.0
    for token, noise, step in ((4, 0.0, None), (5, 0.4, 1), (5, 0.6, None)):
        tokens = np.array([4, token, 4])
        assert mismatch(tokens, rows, rows[1:] + np.float32(noise)) == step
    assert mismatch(np.array([4, 4, 4]), np.full((3, 9), np.nan, dtype=np.float32), rows) == 0


def test_forward_resets_the_rope_delta(model, oracle: Oracle) -> None:
    recorded = oracle.case("text")
    model.model.rope_deltas = torch.tensor([[-182]])
    logits = forward(model, recorded.inputs).logits[0].numpy()
    assert close(logits, recorded.trace["logits"][:recorded.inputs.length])
