"""Localization: the culprit is named before its victims, then the op, its tokens, and one command that shows it again."""

from __future__ import annotations

import pytest
import torch
from random_models import write_checkpoint

from harness.localize import first_broken, inherited
from harness.options import Options
from harness.rungs import CHECKS, answers
from harness.subject import Subject
from harness.subject import given as subjects
from harness.verdict import Outcome
from harness.zoom import localize

CASES = """
[[case]]
name = "picture"
why = "an image and words"
decode = 3
turns = [{ role = "user", text = "Look.", image = "noise:128x192:1" }]
"""
BOUNDS = "".join(f"""
[[bound]]
rung = "{rung}"
metric = "{way}.{metric}"
limit = 1e-4
measured = 1e-5
because = "a test: far above noise, far below the faults"
date = "2026-11-23"
""" for rung in ("vision", "decoder") for way in ("local", "accumulated") for metric in ("rel_l2", "worst_token"))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoom")
    for name, text in (("cases.toml", CASES), ("bounds.toml", BOUNDS)):
        (root / name).write_text(text)
    return Options(checkpoint=str(write_checkpoint(root / "model")), cases=root / "cases.toml",
                   bounds=root / "bounds.toml", work=root / "work")


@pytest.fixture(scope="module")
def oracle(options, tmp_path_factory):
    subjects.RECORDED, kept = tmp_path_factory.mktemp("recorded"), subjects.RECORDED
    yield Subject(options).oracle
    subjects.RECORDED = kept


def broken_by(fault, options, oracle):
    subject = Subject(options)
    subject.__dict__["oracle"] = oracle
    graph = subject.conversion(subject.grid("picture"))
    fault(graph)
    verdicts = [verdict for rung in ("vision", "decoder") for verdict in answers(CHECKS[rung], subject, "picture")]
    return verdicts, {row["rung"]: row for row in localize(subject, verdicts)}


def test_a_healthy_graph_has_nothing_to_localize(options, oracle):
    verdicts, rows = broken_by(lambda graph: None, options, oracle)
    assert {verdict.outcome for verdict in verdicts} == {Outcome.PASS} and not rows


def scale(graph):
    graph.decoder.layers[2].self_attn.scale *= 1.05


def stale_row(graph):
    graph.decoder.layers[1].mlp.down_proj.weight.data[11] = 0


def lost_bias(graph):
    graph.vision.blocks[2].mlp.linear_fc1.bias.data.zero_()


def eps(graph):
    graph.decoder.layers[3].post_attention_layernorm.eps = 0.1


def swapped_planes(graph):
    planes = graph.decoder.rope.planes
    graph.decoder.rope.planes = lambda *given: planes(*given)[[0, 2, 1]]


def late_mask(graph):
    attention = graph.decoder.layers[0].self_attn
    attend = attention.attend

    def strict(q, k, v, visible):
        first = torch.zeros_like(visible)
        first[0, 0] = True
        return attend(q, k, v, visible.tril(-1) | first)

    attention.attend = strict


def exchanged_taps(graph):
    mergers = graph.vision.deepstack_merger_list
    mergers[0], mergers[1] = mergers[1], mergers[0]


@pytest.mark.parametrize("fault, rung, seam, op, cause", [
    (scale, "decoder", "decoder.layers.02", "decoder.layers.02.attn.context", "scaled 1.05 times too much"),
    (stale_row, "decoder", "decoder.layers.01", "decoder.layers.01.mlp.out", "channel 11 is zero"),
    (lost_bias, "vision", "vision.layers.02", "vision.layers.02.mlp.fc1", "the bias is missing"),
    (eps, "decoder", "decoder.layers.03", "decoder.layers.03.post_norm", "eps is 0.1, not"),
    (swapped_planes, "decoder", "decoder.layers.00", "decoder.layers.00.attn.q_rope", "h and w are exchanged"),
    (exchanged_taps, "vision", "vision.deepstack.0", "vision.deepstack.0.norm", "weights of DeepStack merger 1"),
    (late_mask, "decoder", "decoder.layers.00", "decoder.layers.00.attn.context", "mask is strict")])
def test_a_fault_is_named_by_seam_op_and_cause(fault, rung, seam, op, cause, options, oracle):
    verdicts, rows = broken_by(fault, options, oracle)
    row = rows[rung]
    assert (row["seam"], row["op"], row["inherited"]) == (seam, op, False)
    assert cause in row["cause"] and "tried out" in row["cause"]
    assert f"--rung {rung} --case picture" in row["reproduce"]
    assert first_broken(verdicts, rung, "picture").seam == seam


def test_what_the_decoder_inherits_from_the_vision_tower_is_called_inherited(options, oracle):
    verdicts, rows = broken_by(lost_bias, options, oracle)
    assert rows["decoder"]["inherited"] and "inherited" in rows["decoder"]["cause"]
    assert all(inherited(verdict) for verdict in verdicts
               if verdict.rung == "decoder" and verdict.outcome is Outcome.FAIL)
