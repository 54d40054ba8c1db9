"""Bounds from measurement: never below what was measured, read back as written, and healthy variations are healthy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_models import write_checkpoint

from harness.benign import VARIATIONS
from harness.bounds import Bounds, load_bounds
from harness.calibrate import ROUNDING, _bound, _headroom, round_up, to_toml
from harness.cases import FrozenInputs
from harness.checkpoint import Checkpoint, open_checkpoint
from harness.errors import HarnessError
from harness.engines import Request
from harness.engines.torch_graph import TorchGraph
from harness.graph.reference import factory
from harness.rungs import answers
from harness.verdict import Outcome, Verdict


GEOMETRY = open_checkpoint(None).geometry


@given(st.floats(1e-12, 1e6))
def test_rounding_goes_up_and_stays_near(value):
    assert value <= round_up(value) * (1 + 1e-12) and round_up(value) <= value * 1.11


@given(st.lists(st.floats(1e-9, 1e-2), min_size=1, max_size=50))
def test_a_bound_leaves_room_above_every_healthy_figure(values):
    bound = _bound(("vision", "local.rel_l2", "vision.embed@*"), values, "a test", 3)
    assert bound.limit >= max(4 * max(values), ROUNDING) * (1 - 1e-12) and bound.measured == max(values)


def test_the_wider_the_healthy_figures_scatter_the_wider_the_bound():
    def limit(values):
        return _bound(("vision", "local.rel_l2", "vision.embed@*"), values, "a test", 3).limit
    assert limit([1e-6] * 20) < limit([1e-6] * 19 + [1e-9])


def test_exact_agreement_still_leaves_one_rounding():
    assert _bound(("decoder", "local.rel_l2", "decoder.embed@*"), [0.0, 0.0], "a test", 2).limit >= ROUNDING


def test_what_is_written_is_read_back(tmp_path):
    bounds = [_bound(("engine", "rel_l2", "kv.keys.*@coreai-cpu-linux:int8hu:h64"), [1e-3, 2e-3], "a test", 2), _headroom()]
    (tmp_path / "bounds.toml").write_text(to_toml(bounds, "harness calibrate --out 'a file'", "tiny", GEOMETRY))
    back = load_bounds(tmp_path / "bounds.toml")
    assert [bound.limit for bound in back.all] == [bound.limit for bound in bounds]
    assert back.limit("engine", "rel_l2", "kv.keys.03", "coreai-cpu-linux:int8hu:h64") == bounds[0].limit
    assert not back.at("engine", "kv.keys.03", "coreai-cpu-linux:fp16:h64")
    assert back.made_for["checkpoint"] == "tiny" and not back.foreign(GEOMETRY.shape)
    assert back.foreign({**GEOMETRY.shape, "hidden": 4096})


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_limit_changed_by_hand_says_so(tmp_path, factor):
    bound = _bound(("decode", "kl", "kl@*"), [1e-9, 2e-9], "a test", 2)
    path = tmp_path / "bounds.toml"
    changed = to_toml([replace(bound, limit=factor * bound.limit)], "harness calibrate", "tiny", GEOMETRY)
    path.write_text(changed)
    with pytest.raises(HarnessError, match="by_hand"):
        load_bounds(path)
    path.write_text(changed + 'by_hand = "a reviewer asked for it"\n')
    assert load_bounds(path).all[0].by_hand


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_computes_the_same_in_another_way(name, tmp_path_factory):
    root = write_checkpoint(tmp_path_factory.mktemp("varied") / "model")
    geometry = Checkpoint(root).geometry
    ids = np.array([1] * 3 + [geometry.image_token] * 4 + [2] * 5, dtype=np.int32)
    patches = np.random.default_rng(0).standard_normal((16, geometry.patch_features)).astype(np.float32)
    request = Request(FrozenInputs("c", ids, np.zeros((3, 12), np.int32), patches, (1, 4, 4)))
    plain, varied = factory(root, (4, 4)), factory(root, (4, 4))
    VARIATIONS[name](varied)
    one, other = (next(TorchGraph(graph, geometry).run([request]))["logits"] for graph in (plain, varied))
    assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(one)


@pytest.mark.parametrize("value, mine, other", [(2e-6, "FAIL", "ERROR"), (5e-7, "PASS", "PASS"), (0.5, "FAIL", "FAIL"),
                                                (float("inf"), "FAIL", "FAIL")])
def test_bounds_of_another_shape_do_not_blame(value, mine, other):
    """What is past such a bound is undecided, unless no rounding reaches as far; what is within it is within it."""
    outcome = Outcome.PASS if value <= 1e-6 else Outcome.FAIL
    check = SimpleNamespace(NAME="decoder", plan=lambda _: {"c": ["logits"]}, measure=lambda *_: [
        Verdict("decoder", "c", "logits", outcome, "measured", "local.rel_l2", value, 1e-6)])
    for hidden, expected in ((GEOMETRY.hidden, mine), (GEOMETRY.hidden + 1, other)):
        made_for = {**GEOMETRY.shape, "hidden": hidden, "checkpoint": "tiny"}
        subject = SimpleNamespace(bounds=Bounds([], made_for), geometry=GEOMETRY)
        found, = answers(check, subject, "c")
        assert found.outcome.value == expected and ("calibrate" in found.reason) == (expected == "ERROR")
