"""The quantized rung where a sketch stands for the oracle: a healthy twin passes, a wrong one is caught, and both are said.

Bounds are set as `harness calibrate` sets them, from the whole oracle: twice the largest figure of the healthy twin.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import write_checkpoint
from recorded import IMAGE, TEXT

from harness.bounds import Bound, Bounds
from harness.checkpoint import Checkpoint
from harness.gate import BY_SKETCH, fold
from harness.graph import twin
from harness.options import Options
from harness.oracle import record
from harness.policy import load_policy
from harness.rungs import CHECKS, answers
from harness.store import open_oracle, write_sketch
from harness.subject import Subject
from harness.trace import decoder_seams
from harness.verdict import Outcome, Verdict, worst

QUANTIZED = CHECKS["quantized"]
METRICS = ("rel_l2", "worst_token", "norm_drift")
LAYER = "model.language_model.layers.2."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Checkpoint, Path, Path]:
    """Checkpoint, oracle, sketch of it."""
    root = tmp_path_factory.mktemp("quantized")
    checkpoint = Checkpoint(write_checkpoint(root / "m", seed=3))
    whole = record(checkpoint, (IMAGE, TEXT), root / "whole")
    write_sketch(whole, root / "sketch")
    return checkpoint, root / "whole", root / "sketch"


def under(model, oracle: Path, bounds: Bounds) -> Subject:
    made = Subject(Options(checkpoint=str(model[0].root), oracle=oracle, mode="int8hu"))
    made.cases, made.bounds = {case.name: case for case in (IMAGE, TEXT)}, bounds
    return made


def price(metric: str, limit: float, seams: str = "*") -> Bound:
    return Bound("quantized", metric, limit, 0.0, "a test", "2026-11-25", seams)


@pytest.fixture(scope="module")
def bounds(model) -> Bounds:
    """Of every seam, from the whole oracle."""
    small = [price("tie_margin", 0.02, "tokens"), price("kl", 1.0, "kl")]
    wide = under(model, model[1], Bounds([*(price(metric, 1e9) for metric in METRICS), *small]))
    largest: dict[tuple[str, str], float] = {}
    for case in wide.cases:
        for verdict in answers(QUANTIZED, wide, case):
            for metric in METRICS:
                found = [float(region[metric]) for region in verdict.figures.get("", {}).values()]
                key = (verdict.seam, metric)
                largest[key] = max([largest.get(key, 0.0), *found])
    return Bounds([price(metric, 2 * value + 1e-5, seam) for (seam, metric), value in largest.items()] + small)


def judged(model, oracle: Path, bounds: Bounds) -> list[Verdict]:
    subject = under(model, oracle, bounds)
    return [verdict for case in subject.cases for verdict in answers(QUANTIZED, subject, case)]


def test_a_healthy_twin_passes_and_every_answer_says_by_what(model, bounds):
    found = judged(model, model[2], bounds)
    skipped = [verdict for verdict in found if verdict.outcome is Outcome.SKIP]
    passed = [verdict for verdict in found if verdict.outcome is Outcome.PASS]
    assert {verdict.seam for verdict in skipped} == {"kl", "not-in-sketch"} and len(skipped) == 4
    assert len(passed) + len(skipped) == len(found) and len(passed) == 2 * (len(decoder_seams(model[0].geometry)) + 1)
    assert all("by sketch" in verdict.reason for verdict in found)
    assert all(load_policy(Path("ladders/sketch.toml")).excuses(verdict) for verdict in skipped)
    assert not any(load_policy().excuses(verdict) for verdict in skipped)
    assert fold(found, load_policy()).reason.startswith(BY_SKETCH)


def scaled(weights: dict[str, torch.Tensor]) -> None:
    weights[LAYER + "mlp.down_proj.weight"] = weights[LAYER + "mlp.down_proj.weight"] * 1.5


def one_row(weights: dict[str, torch.Tensor]) -> None:
    table = weights[LAYER + "self_attn.o_proj.weight"].clone()
    table[5] = -table[5]
    weights[LAYER + "self_attn.o_proj.weight"] = table


def one_token(weights: dict[str, torch.Tensor]) -> None:
    name = "model.language_model.embed_tokens.weight"
    table = weights[name].clone()
    table[USED[0]] *= 1.5
    weights[name] = table


def crossed(weights: dict[str, torch.Tensor]) -> None:
    gate, up = (LAYER + f"mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def head_shifted(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)


def not_finite(weights: dict[str, torch.Tensor]) -> None:
    table = weights["model.language_model.norm.weight"].clone()
    table[3] = float("nan")
    weights["model.language_model.norm.weight"] = table


USED: list[int] = []
FAULTS = {"a matrix half as large again": (scaled, "decoder.layers.02"),
          "the sign of one row": (one_row, "decoder.layers.02"),
          "one token's embedding": (one_token, "decoder.embed"), "gate and up exchanged": (crossed, "decoder.layers.02"),
          "the head one row on": (head_shifted, "logits"), "not a number": (not_finite, "decoder.norm")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_twin_is_caught_where_the_whole_oracle_catches_it(model, bounds, fault, monkeypatch):
    change, seam = FAULTS[fault]
    USED[:] = [int(open_oracle(model[2]).case("text").inputs.ids[2])]
    right = twin.twin_weights

    def wrong(*arguments):
        weights = right(*arguments)
        change(weights)
        return weights

    monkeypatch.setattr(twin, "twin_weights", wrong)
    whole, sketched = (judged(model, path, bounds) for path in model[1:])
    first = [next(verdict for verdict in found if verdict.outcome is Outcome.FAIL) for found in (whole, sketched)]
    assert [verdict.seam for verdict in first] == [seam, seam]
    assert worst(verdict.outcome for verdict in sketched) is Outcome.FAIL and fold(sketched, load_policy()).exit_code == 1
    # What the whole oracle fails, a sketch may leave undecided and never passes.
    passed = {(verdict.case, verdict.seam) for verdict in sketched if verdict.outcome is Outcome.PASS}
    failed = {(verdict.case, verdict.seam) for verdict in whole if verdict.outcome is Outcome.FAIL and _told(verdict)}
    assert not passed & failed


def _told(verdict: Verdict) -> bool:
    """Whether it failed by a figure that a sketch has."""
    return verdict.metric in (*METRICS, "flips")


def test_a_choice_that_the_sketch_does_not_hold_is_undecided_inside_the_noise(model, bounds):
    subject = under(model, model[2], Bounds([replace(row, limit=1e3) if row.metric == "tie_margin" else row
                                             for row in bounds.all]))
    held, tokens = subject.recorded("text"), subject.recorded("text").rollout.tokens
    rows = slice(held.inputs.length - 1, held.inputs.length - 1 + len(tokens))
    logits = np.zeros((held.inputs.length + len(tokens), model[0].geometry.vocab), np.float32)
    reference = held.logits(rows)
    logits[rows] = reference
    logits[rows.start + 1, int(reference[1].argmin())] = 1e3
    from harness.rungs.sketched import greedy_by_top

    assert greedy_by_top("quantized", "text", subject, rows, tokens, logits, 1e3).outcome is Outcome.ERROR
    assert greedy_by_top("quantized", "text", subject, rows, tokens, logits, 1e-6).outcome is Outcome.FAIL
