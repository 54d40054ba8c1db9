"""The formula of the quantizer against coreai-opt itself, the storage census, the twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import write_checkpoint
from torch import nn

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.graph import quantize
from harness.graph.quantize import (CLIPPED, FP16, LEAST_SCALE, PLAIN, RECIPES, dequantize, expected_codes,
                                    storage_plan, to_fp16, twin_weights)
from harness.graph.reference import EMBEDDING, HEAD, Reference

SCHEMES = pytest.mark.parametrize("scheme", [CLIPPED, PLAIN], ids=lambda scheme: scheme.qscheme)


def edge_weights() -> torch.Tensor:
    """Rows [64] fp16: zeros, a far outlier, subnormals, values around the scale's floor, ties, negative zeros."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(16, 64, generator=generator)
    rows[0] = 0
    rows[1, 3] = 60000
    rows[2, :32] = 2.0**-24
    rows[3, :32] *= 1e-6
    rows[4] = torch.arange(64) - 32
    rows[5, :32] = torch.arange(32) / 2 + 111.5
    rows[6, :32] = -rows[6, :32].abs()
    rows[7, 0], rows[7, 1:32] = -1, 0.00390625
    rows[8] *= 1e-3
    rows[9, :32] = -0.0
    rows[10, :32] = LEAST_SCALE * torch.linspace(-140, 140, 32)
    return rows.half()


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("untied"), layers=3))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("tied"), tied=True, layers=3, dtype="bfloat16"))


@SCHEMES
def test_codes_and_scales_are_those_of_coreai_opt(scheme):
    pytest.importorskip("coreai_opt")
    from harness.export.quantizer import quantize_linears, stored

    for weight in (edge_weights(), torch.randn(96, 256, generator=torch.Generator().manual_seed(2)).half()):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float16)
        linear.weight = nn.Parameter(weight.clone())
        quantize_linears([linear], scheme)
        codes, scale = expected_codes(weight, scheme)
        theirs, their_scale = stored(linear).values()
        assert (theirs.dtype, their_scale.dtype) == (torch.int8, torch.float16)
        assert torch.equal(codes, theirs) and torch.equal(scale, their_scale)
        assert torch.equal(dequantize(codes, scale), linear.weight)


@SCHEMES
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=32, max_size=32))
def test_every_weight_is_within_half_a_step(scheme, values):
    weight = torch.tensor([values], dtype=torch.float16)
    codes, scale = expected_codes(weight, scheme)
    assert codes.min() >= scheme.low and codes.max() <= scheme.high and (scale >= LEAST_SCALE).all()
    step = scale.double().repeat_interleave(32, 1)
    # The scale is rounded to fp16 (2^-11, or a subnormal step of 2^-25), so the largest code may lie beyond +-127.
    slack = 128 * torch.maximum(step * 2**-11, torch.full_like(step, 2.0**-25)) + (step if scheme is PLAIN else 0)
    assert ((codes.double() * step - weight.double()).abs() <= step / 2 + slack).all()


def test_dequantization_rounds_one_product_once():
    codes, scale = expected_codes(edge_weights(), PLAIN)
    exact = codes.numpy().astype(np.float64) * scale.numpy().astype(np.float64).repeat(32, axis=1)
    assert np.array_equal(dequantize(codes, scale).numpy(), exact.astype(np.float16))


def test_rows_are_independent(monkeypatch):
    whole = expected_codes(edge_weights(), CLIPPED)
    monkeypatch.setattr(quantize, "BLOCK", 5 * 64)
    assert all(torch.equal(a, b) for a, b in zip(whole, expected_codes(edge_weights(), CLIPPED)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(HarnessError, match="72 input features are no multiple of the block 32"):
        expected_codes(torch.zeros(4, 72), CLIPPED)
    with pytest.raises(HarnessError, match="some.weight: has values that are not finite in fp16"):
        to_fp16("some.weight", torch.tensor([1.0, 70000.0]))
    with pytest.raises(HarnessError, match="not finite"):
        to_fp16("some.weight", torch.tensor([float("nan")]))


@pytest.mark.parametrize("mode", RECIPES)
def test_the_plan_covers_the_checkpoint(mode, untied, tied):
    recipe = RECIPES[mode]
    plan = storage_plan(untied.geometry, recipe)
    assert sorted(plan) == list(untied.names())
    body = [name for name, how in plan.items() if how == CLIPPED]
    assert len(body) == (0 if mode == "fp16" else 7 * 3)
    assert plan[HEAD] == {"fp16": FP16, "int8lin": FP16, "int8hu": PLAIN}[mode] and plan[EMBEDDING] == FP16
    assert all(plan[name] == FP16 for name in plan if "visual" in name or "norm" in name)
    own_head = {HEAD} if mode == "int8hu" else set()
    assert set(storage_plan(tied.geometry, recipe)) == set(tied.names()) | own_head


def test_the_twin_holds_what_the_plan_says(untied):
    twin, plan = twin_weights(untied, RECIPES["int8hu"]), storage_plan(untied.geometry, RECIPES["int8hu"])
    assert sorted(twin) == sorted(plan)
    for name, how in plan.items():
        weight = untied.tensor(name).half()
        expected = weight if how == FP16 else dequantize(*expected_codes(weight, how))
        assert twin[name].dtype == torch.float16 and torch.equal(twin[name], expected)
        assert (how == FP16) == torch.equal(twin[name], weight)


def test_a_tied_checkpoint_gets_a_head_of_its_own_only_where_the_recipe_quantizes_it(tied):
    geometry = tied.geometry
    assert all(RECIPES[mode].geometry(geometry).tied for mode in ("fp16", "int8lin"))
    hu, twin = RECIPES["int8hu"], twin_weights(tied, RECIPES["int8hu"])
    assert hu.geometry(geometry) == replace(geometry, tied=False)
    reference = Reference(hu.geometry(geometry), (4, 4), twin)
    assert torch.equal(reference.tensors()[EMBEDDING], tied.tensor(EMBEDDING).half().float())
    head = dequantize(*expected_codes(tied.tensor(EMBEDDING), PLAIN)).float()
    assert torch.equal(reference.decoder.lm_head.weight, head) and not torch.equal(head, reference.tensors()[EMBEDDING])
    with pytest.raises(HarnessError, match="differs from the embedding"):
        Reference(geometry, (4, 4), twin)
    assert HEAD not in twin_weights(tied, RECIPES["int8lin"])


def test_a_block_that_does_not_divide_names_the_tensor(tmp_path):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, layers=3, hidden_size=72))
    with pytest.raises(HarnessError, match=r"layers\.0\.\S+weight: 72 input features"):
        twin_weights(checkpoint, RECIPES["int8lin"])
