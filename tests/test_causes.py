"""Causes are tried out: a mistake that explains the error is named, and nothing is made up where none does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.causes import Scene, explain
from harness.causes.rows import extent
from harness.checkpoint import open_checkpoint

CHECKPOINT = open_checkpoint(None)
GEOMETRY = CHECKPOINT.geometry
LENGTH, FIRST, COUNT = 40, 5, 24
OUT, UP = "decoder.layers.01.mlp.out", "model.language_model.layers.1.mlp.down_proj"


def weight(name):
    if name not in CHECKPOINT.names():
        raise KeyError(name)
    return CHECKPOINT.tensor(name).double().numpy()


def scene(seam, **values):
    """A prompt with an image of 4 x 6 merged tokens; random values at the seams given as shapes."""
    generator = np.random.default_rng(0)
    right = {name: generator.standard_normal(shape) for name, shape in values.items()}
    ids = np.full(LENGTH, 7)
    ids[FIRST:FIRST + COUNT] = GEOMETRY.image_token
    planes = np.tile(np.arange(LENGTH), (3, 1))
    return Scene(seam, right[seam].copy(), right, GEOMETRY, weight, planes, ids, (8, 12))


def linear():
    found = scene(OUT, **{OUT: (LENGTH, GEOMETRY.hidden), "decoder.layers.01.mlp.act": (LENGTH, GEOMETRY.intermediate)})
    found.right[OUT][:] = found.right["decoder.layers.01.mlp.act"] @ weight(f"{UP}.weight").T
    return replace(found, wrong=found.expected.astype(np.float32))


def test_a_healthy_value_has_no_cause():
    assert explain(linear()) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-5, 1))
def test_noise_has_no_cause(seed, size):
    """Whatever its size: nobody made this mistake, so none is named."""
    found = linear()
    noise = np.random.default_rng(seed).standard_normal(found.wrong.shape) * 10**size
    assert "tried out" not in (explain(replace(found, wrong=(found.expected + noise).astype(np.float32))) or "")


def test_values_that_are_not_finite_have_no_cause():
    found = linear()
    found.wrong[3, 4] = np.nan
    assert explain(found) is None


@pytest.mark.parametrize("change, words", [
    (lambda right: np.roll(right, 1, 0), "rows stand 1 late"),
    (lambda right: 0 * right, "all values are zero"),
    (lambda right: 1.25 * right, "multiplied by 1.25"),
    (lambda right: right + np.linspace(1, 2, GEOMETRY.hidden), "a constant is added to every token"),
    (lambda right: np.where(np.arange(GEOMETRY.hidden) == 9, 0, right), "channel 9 is zero"),
    (lambda right: right * np.linspace(0.5, 2, GEOMETRY.hidden), "factor of its own"),
    (lambda right: right.astype(np.float16), "held in float16")])
def test_patterns_are_named(change, words):
    found = linear()
    assert words in explain(replace(found, wrong=np.asarray(change(found.expected), np.float32)))


def test_the_narrowest_floats_of_a_weight_are_told_apart():
    found = linear()
    x, held = found.right["decoder.layers.01.mlp.act"], weight(f"{UP}.weight") * (1 + 2.0**-12)
    found.right[OUT][:] = x @ held.T  # no longer bfloat16 values, so rounding shows
    narrow = replace(found, weight=lambda name: held if name == f"{UP}.weight" else weight(name))
    wrong = x @ held.astype(np.float16).astype(np.float64).T
    assert "the weight is rounded to float16" in explain(replace(narrow, wrong=wrong.astype(np.float32)))


def test_a_transposed_image_and_a_late_cache():
    found = scene("decoder.embed", **{"decoder.embed": (LENGTH, GEOMETRY.hidden)})
    rows = np.arange(COUNT).reshape(4, 6).T.ravel()
    found.wrong[FIRST:FIRST + COUNT] = found.expected[FIRST + rows]
    assert "column order" in explain(found) and extent(found) == "tokens 6 to 27"
    seam = "decoder.layers.01.attn.v"
    found = replace(scene(seam, **{seam: (LENGTH, GEOMETRY.kv_heads, GEOMETRY.head_dim)}), prompt=30)
    found.wrong[31:], found.wrong[30] = found.expected[30:-1], 0
    assert "single steps write 1 slot late" in explain(found) and extent(found) == "tokens 30 to 39"


def test_the_extent_names_heads():
    seam = "decoder.layers.01.attn.v"
    found = scene(seam, **{seam: (LENGTH, GEOMETRY.kv_heads, GEOMETRY.head_dim)})
    found.wrong[:, 1] *= 1.5
    assert extent(found) == "head 1"
