"""Detection power in small: one fault of each class is caught and named, nothing healthy is, and the tools are sound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.faults import KINDS, faults
from harness.faults.hands import bend_attention, bend_decoder, bend_vision
from harness.faults.place import block, op, same_block
from harness.faults.scoreboard import bench_for, chosen, healthy, markdown, passed, record, tally
from harness.options import Options

FAST = [next(fault for fault in chosen(fast=True) if fault.kind == kind) for kind in KINDS]
PROBED = ("eps_forgotten", "slowest_frequency_zero", "no_mask_in_later_chunks", "softmax_fails_past_4032_keys",
          "rows_restart_with_each_chunk", "oracle_rounded_and_signed", "gelu_in_the_program", "cosine_above_one")
"""What no activation of a prompt shows."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return bench_for(Options(), True, tmp_path_factory.mktemp("faults"))


def named(name):
    return next(fault for fault in faults() if fault.id == name)


def test_there_are_enough_of_each_class():
    real = Counter(fault.kind for fault in faults() if not fault.equivalent)
    assert set(real) == set(KINDS) and min(real.values()) >= 8 and sum(real.values()) >= 120
    assert all(fault.title and fault.source for fault in faults())


@pytest.mark.parametrize("fault", FAST, ids=lambda fault: f"{fault.kind}-{fault.id}")
def test_a_fault_of_each_class_is_caught_and_named(bench, fault):
    result = bench.try_out(fault)
    assert result.outcome == "FAIL", result
    assert result.rung and result.block and result.op is not False, result


@pytest.mark.parametrize("name", PROBED)
def test_what_no_prompt_shows_is_caught_and_named(bench, name):
    result = bench.try_out(named(name))
    assert result.outcome == "FAIL" and result.block and result.op is not False, result
    assert not any(result.gates.get(gate) for gate in ("cosine", "last")), "a prompt shows it after all"


def test_nothing_healthy_is_stopped(bench):
    assert not [(one.fault, one.named, one.reason) for one in healthy(bench) if one.caught]


@pytest.mark.parametrize("name", ["positions_offset_together", "vision_coordinates_from_one", "head_copied",
                                  "one_level_of_a_pixel", "ties_rounded_away_from_zero"])
def test_equivalents_are_not_blamed(bench, name):
    result = bench.try_out(named(name))
    assert not result.caught, result


def test_joints_change_nothing(bench):
    case = bench.subject.image_cases()[0]
    plain = bench.suspect(named("head_copied")).graph_trace(case, "accumulated")
    suspect = bench.suspect(named("head_copied"))
    suspect.bend_graph = lambda graph: [bend_decoder(graph), bend_vision(graph), bend_attention(graph, 1)]
    bent = suspect.graph_trace(case, "accumulated")
    assert set(bent) == set(plain) and all(np.array_equal(bent[seam], plain[seam]) for seam in plain)


def test_a_fault_changes_the_suspect_only(bench):
    before = {name: value.clone() for name, value in bench.subject.twin(bench.subject.options.grid).tensors().items()}
    for name in ("one_row_stale", "scores_a_little_small", "head_clipped", "inner_activation_near_the_limit"):
        bench.try_out(named(name))
    after = bench.subject.twin(bench.subject.options.grid).tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert bench.subject.twin(bench.subject.options.grid).decoder.layers[0].self_attn.scale == 32**-0.5


def test_places():
    tensor = "model.language_model.layers.3.self_attn.o_proj.weight"
    assert (block(tensor), op(tensor)) == ("decoder.layers.03", "o_proj")
    assert (block("kv.keys.02"), op("kv.keys.02")) == ("decoder.layers.02", "keys")
    assert block("deepstack.1") == block("decoder.layers.01.deepstack") == "decoder.deepstack.1"
    assert (block("vision.merger.norm"), op("vision.merger.norm")) == ("vision.merger", "norm")
    assert op("vision.layers.01.attn.q_rope") == "attn.q_rope" and block("lm_head.weight") == "logits"
    assert same_block(tensor, "decoder.layers.00|decoder.layers.03") and not same_block(tensor, "decoder.layers.00")


def test_the_record_counts_and_judges(bench):
    results = [bench.try_out(named(name)) for name in ("one_row_stale", "text_stripped")]
    made = record(results, [], "harness faults", {})
    assert [row["caught"] for row in tally(results)] == [1, 1, 2] and passed(made)
    assert "| weights | 1 | 1 | 1 | 1 of 1 | " in markdown(made)
    results[0].outcome, results[0].block, results[0].op = "PASS", False, False
    missed = record(results, [], "harness faults", {})
    assert not passed(missed) and "## Missed" in markdown(missed) and "one_row_stale" in markdown(missed)


def test_no_fault_touches_the_judge():
    """A fault file takes from the harness what is under test: graph, host, tables; never a rung, a bound or a metric."""
    folder = Path(__file__).resolve().parent.parent / "harness" / "faults"
    for kind in KINDS:
        text = (folder / f"{kind}.py").read_text(encoding="utf-8")
        assert not [word for word in ("harness.ladder", "harness.rungs", "harness.bounds", "harness.metrics",
                                      "harness.audit", "harness.gate", "harness.oracle") if word in text], kind
