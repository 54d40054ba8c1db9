"""A sketch on disk stands for its oracle: what is exact, what is judged by it, and what it never lets pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from random_models import write_checkpoint
from recorded import IMAGE, TEXT

from harness import sketch
from harness.bounds import Bound, Bounds
from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.greedy import greedy
from harness.ladder import judge
from harness.options import Options
from harness.oracle import record
from harness.rungs import CHECKS, answers
from harness.session import oracle_row
from harness.store import Oracle, open_oracle, write_sketch
from harness.subject import Subject
from harness.verdict import Outcome

METRICS = ("rel_l2", "worst_token", "worst_channel", "norm_drift")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("model") / "m", seed=3))


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint, tmp_path_factory) -> Oracle:
    return record(checkpoint, (IMAGE, TEXT), tmp_path_factory.mktemp("oracle") / "o")


@pytest.fixture(scope="module")
def folder(oracle: Oracle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sketch") / "s"
    write_sketch(oracle, folder)
    return folder


def subject(checkpoint: Checkpoint, folder: Path, limit: float = 1e-4) -> Subject:
    made = Subject(Options(checkpoint=str(checkpoint.root), oracle=folder))
    made.cases = {case.name: case for case in (IMAGE, TEXT)}
    made.bounds = Bounds([Bound(rung, f"{way}{metric}", limit, 0.0, "a test", "2026-11-25") for metric in METRICS
                          for rung, way in (("vision", "accumulated."), ("decoder", "accumulated."), ("decoder", "local."),
                                            ("decode", ""))]
                         + [Bound("decode", "tie_margin", 1e-4, 0.0, "a test", "2026-11-25", "tokens"),
                            Bound("decode", "kl", 1e-6, 0.0, "a test", "2026-11-25", "kl")])
    return made


def test_small_things_are_exact(oracle, folder):
    held = open_oracle(folder)
    assert held.cases == oracle.cases and held.of == oracle.digest and held.identity == oracle.identity
    for name in oracle.cases:
        whole, small = oracle.case(name), held.case(name)
        assert small.definition == whole.definition and small.inputs.grid == whole.inputs.grid
        for one, other in ((whole.inputs.ids, small.inputs.ids), (whole.positions, small.positions),
                           (whole.rollout.tokens, small.rollout.tokens), (whole.rollout.margins, small.rollout.margins)):
            assert np.array_equal(one, other)
        if whole.inputs.patches is not None:
            assert np.array_equal(whole.inputs.patches, small.inputs.patches) and small.inputs.patches.flags.writeable
        assert whole.rollout.ties == small.rollout.ties and held.stale({"image": IMAGE, "text": TEXT}[name]) is None


def test_every_seam_is_sketched_and_the_cache_by_layer(oracle, folder):
    whole, small = oracle.case("image"), open_oracle(folder).case("image")
    assert set(small.seams) == {seam for seam in whole.seams if not seam.startswith("kv.")} | {
        f"kv.{part}.{layer:02d}" for part in ("keys", "values") for layer in range(4)}
    for seam, held in small.trace.items():
        right = whole.trace[seam] if not seam.startswith("kv.") else \
            whole.trace[seam.rpartition(".")[0]][int(seam.rpartition(".")[2])].transpose(1, 0, 2)
        assert held.shape == right.shape and sketch.by_region(held, right, {})["all"].high["rel_l2"] < 4 * sketch.FLOOR


def test_a_healthy_graph_passes_and_says_what_was_not_judged(checkpoint, folder):
    under = subject(checkpoint, folder)
    for rung in ("vision", "decoder", "decode"):
        verdicts = answers(CHECKS[rung], under, "image")
        skipped = {verdict.seam for verdict in verdicts if verdict.outcome is Outcome.SKIP}
        assert skipped == ({"not-in-sketch", "kl"} if rung == "decode" else {"not-in-sketch"})
        assert {verdict.outcome for verdict in verdicts if verdict.seam not in skipped} == {Outcome.PASS}
        assert all("by sketch" in verdict.reason for verdict in verdicts if verdict.seam != "tokens")
    assert oracle_row(under.oracle)["sketch_of"] == under.oracle.of


def test_a_bound_inside_the_interval_is_undecided_and_one_below_it_fails(checkpoint, folder):
    under = subject(checkpoint, folder)
    seam = "decoder.layers.02"
    reference, own = under.recorded("text").trace, under.graph_trace("text", "accumulated")
    wrong = {seam: own[seam] * np.float32(1.01)}
    found = sketch.by_region(reference[seam], wrong[seam], {})["all"]
    outcomes = {}
    for name, limit in {"low": found.low["rel_l2"] * 0.99, "inside": found.rel_l2 * 1.0001,
                        "high": found.high["rel_l2"] * 1.001}.items():
        bounds = Bounds([Bound("decoder", "accumulated.rel_l2", limit, 0.0, "a test", "2026-11-25")])
        outcomes[name] = judge("decoder", "text", [seam], reference, {"accumulated": wrong}, bounds)[0].outcome
    assert outcomes == {"low": Outcome.FAIL, "inside": Outcome.ERROR, "high": Outcome.PASS}
    only_channel = Bounds([Bound("decoder", "accumulated.worst_channel", 1.0, 0.0, "a test", "2026-11-25")])
    verdict = judge("decoder", "text", [seam], reference, {"accumulated": wrong}, only_channel)[0]
    assert verdict.outcome is Outcome.ERROR and "no bounded metric" in verdict.reason


def test_greedy_tokens_by_the_largest_logits(oracle, folder):
    whole, small = oracle.case("text"), open_oracle(folder).case("text")
    first, tokens = whole.inputs.length - 1, whole.rollout.tokens
    rows = slice(first, first + len(tokens))
    logits = whole.trace["logits"][rows]
    assert greedy("decode", "text", "tokens", tokens, small.logits(rows), logits, 1e-6).outcome is Outcome.PASS
    flipped = logits.copy()
    flipped[2, logits[2].argmin()] = 1e3
    verdict = greedy("decode", "text", "tokens", tokens, small.logits(rows), flipped, 1e-6)
    assert verdict.outcome is Outcome.FAIL and verdict.figures["flips"] == [2]


def test_what_is_no_sketch_of_this_version_is_refused(oracle, folder, tmp_path, checkpoint):
    with pytest.raises(HarnessError, match="is already there"):
        write_sketch(oracle, folder)
    with pytest.raises(HarnessError, match="is a sketch already"):
        write_sketch(open_oracle(folder), tmp_path / "again")
    with pytest.raises(HarnessError, match="another checkpoint revision"):
        open_oracle(folder, "0" * 64)
    copy = shutil.copytree(folder, tmp_path / "copy")
    manifest = json.loads((copy / "sketch.json").read_text())
    (copy / "sketch.json").write_text(json.dumps({**manifest, "projections": "0" * 64}))
    with pytest.raises(HarnessError, match="other projections"):
        open_oracle(copy)
    (copy / "sketch.json").write_text(json.dumps(manifest))
    held = copy / "cases" / "text" / "sketch.safetensors"
    held.write_bytes(held.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(HarnessError, match="sha256 differs"):
        _ = open_oracle(copy).case("text").trace


def test_what_a_killed_run_left_is_cleared(oracle: Oracle, tmp_path: Path) -> None:
    left = tmp_path / ".s.unfinished" / "cases"
    left.mkdir(parents=True)
    (left.parent / "manifest.json").write_text("{")
    write_sketch(oracle, tmp_path / "s")
    assert not left.parent.exists() and not (tmp_path / "s" / "manifest.json").exists()
    assert open_oracle(tmp_path / "s").cases == oracle.cases
