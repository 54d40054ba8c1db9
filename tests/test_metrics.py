"""Distances: total, in float64, never NaN, and right about where the worst is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from harness.errors import HarnessError
from harness.metrics import by_region, distance, kl_divergence, top2_margin

ANY = arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.floats(width=32))


@settings(max_examples=200, deadline=None)
@given(ANY, st.floats(width=32))
def test_no_figure_is_ever_nan(reference, value):
    found = distance(reference, np.full_like(reference, value))
    assert not any(math.isnan(number) for number in vars(found).values() if isinstance(number, float))


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (5, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_equal_tensors_have_no_distance(array):
    found = distance(array, array.copy())
    assert (found.rel_l2, found.max_abs, found.worst_token, found.worst_channel, found.cosine_gap) == (0, 0, 0, 0, 0)
    assert found.cosine <= 1.0


def test_cosine_of_a_large_float32_tensor_does_not_pass_one():
    array = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32) * 1e3
    assert 1 - 1e-12 < distance(array, array).cosine <= 1.0


@pytest.mark.parametrize("unit", [1e300, 1e200, 1e-200, 1e-300])
def test_values_whose_squares_leave_float64(unit):
    rng = np.random.default_rng(0)
    reference, candidate = rng.standard_normal((2, 6, 5))
    near, far = (by_region(reference * one, candidate * one, {"text": np.arange(2, 6)}) for one in (1.0, unit))
    for name, right in near.items():
        assert far[name].worst_token == pytest.approx(right.worst_token)
        assert (far[name].max_abs, far[name].max_abs_at) == (pytest.approx(right.max_abs * unit), right.max_abs_at)


def test_one_bad_value_is_the_worst_of_everything():
    array = np.ones((3, 4), np.float32)
    bad = array.copy()
    bad[1, 2] = np.nan
    found = distance(array, bad)
    assert (found.cosine, found.rel_l2, found.max_abs_at, found.candidate_nonfinite) == (-1.0, math.inf, (1, 2), 1)
    assert not found.degenerate


@pytest.mark.parametrize("reference", [np.zeros((3, 4)), np.full((3, 4), np.inf)])
def test_an_empty_reference_is_degenerate(reference):
    assert distance(reference, np.ones((3, 4))).degenerate


def test_shapes_are_never_broadcast():
    with pytest.raises(HarnessError, match="shape"):
        distance(np.ones((3, 4)), np.ones((1, 4)))
    with pytest.raises(HarnessError, match="nothing to compare"):
        distance(np.ones((0, 4)), np.ones((0, 4)))


def test_a_dead_token_hides_from_cosine_but_not_from_the_worst_token():
    reference = np.random.default_rng(0).standard_normal((1000, 64))
    candidate = reference.copy()
    candidate[417] = 0
    found = distance(reference, candidate)
    assert found.cosine > 0.999
    assert (found.worst_token, found.worst_token_at, found.worst_token_cosine) == (1.0, 417, 0.0)


def test_a_dead_channel_is_named():
    reference = np.random.default_rng(0).standard_normal((100, 4, 8))
    candidate = reference.copy()
    candidate[:, 2, 5] = 0
    found = distance(reference, candidate)
    assert found.worst_channel == pytest.approx(1.0) and found.worst_channel_at == (2, 5)


def test_scale_shows_as_norm_drift_and_not_as_cosine():
    reference = np.random.default_rng(0).standard_normal((10, 8))
    found = distance(reference, 0.9 * reference)
    assert found.norm_drift == pytest.approx(0.1) and found.cosine_gap < 1e-12


def test_a_low_norm_row_is_measured_against_the_rest():
    reference = np.ones((100, 8))
    reference[3] = 1e-9
    candidate = reference.copy()
    candidate[3] += 1e-8
    assert distance(reference, candidate).worst_token < 1e-4


def test_cosine_gap_keeps_its_digits_near_one():
    reference = np.ones((1, 2))
    candidate = np.array([[1.0 + 1e-7, 1.0 - 1e-7]])
    assert distance(reference, candidate).cosine_gap == pytest.approx(0.5e-14, rel=1e-3)


def test_regions_are_measured_apart():
    reference = np.ones((10, 4))
    candidate = reference.copy()
    candidate[5:8] += 1
    candidate[6] += 1
    found = by_region(reference, candidate, {"image": np.arange(5, 8), "text": np.arange(5), "none": np.arange(0)})
    assert (found["text"].rel_l2, set(found)) == (0.0, {"all", "image", "text"})
    assert (found["image"].worst_token_at, found["image"].max_abs_at) == (6, (6, 0))


def test_kl_and_margin():
    logits = np.array([[0.0, 1.0, 3.0], [5.0, 5.0, 0.0]])
    assert kl_divergence(logits, logits).max() == 0
    assert kl_divergence(logits, logits + 7.0).max() < 1e-12
    assert kl_divergence(logits, logits[:, ::-1].copy())[0] > 1
    assert np.isinf(kl_divergence(logits, np.full_like(logits, np.nan))).all()
    assert top2_margin(logits).tolist() == [2.0, 0.0]
