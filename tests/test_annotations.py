"""Annotations: at the line of the source that computes the seam; no text of a record can become a command."""

from __future__ import annotations

import re

import pytest
from fake_run import HOSTILE, record_of, signed

from harness.report import render_annotations
from harness.report.annotations import command

SOURCE = '''def layer(x, i, tap):
    x = tap(f"decoder.layers.{i:02d}.input_norm", x)
    q = tap(f"{name}.q_rope", x)
    return tap(f"decoder.layers.{i:02d}", x)
'''


@pytest.fixture
def port(tmp_path):
    """A graph under test at `ports.mine:factory`."""
    (tmp_path / "ports").mkdir()
    (tmp_path / "ports" / "mine.py").write_text(SOURCE)
    return tmp_path


def annotated(record, root=None) -> list[str]:
    return render_annotations(record, signed(record), root).splitlines()


@pytest.mark.parametrize("op, line", [("decoder.layers.01.attn.q_rope", 3), ("decoder.layers.01.input_norm", 2),
                                      ("decoder.layers.01", 4), ("decoder.layers.01.mlp.out", 1)])
def test_the_failing_seam_is_found_in_the_source(port, op, line):
    record = record_of("failing")
    record["subject"]["graph"] = "ports.mine:factory"
    record["localization"][0]["op"] = op
    first = annotated(record, port)[0]
    assert f"file=ports/mine.py,line={line}::" in first and first.startswith(f"::error title=decoder FAIL%3A {op}")
    assert "probable cause: rotary" in first and "%0Areproduce: harness ladder" in first


def test_rungs_without_a_place_are_annotated_too_and_a_pass_is_a_notice(port):
    lines = annotated(record_of("failing"), port)
    assert any("title=tokens FAIL%3A tokens" in line for line in lines)
    assert all("file=" not in line for line in lines), "the graph's source does not lie here"
    healthy = annotated(record_of("healthy"))
    assert len(healthy) == 1 and healthy[0].startswith("::notice ")


@pytest.mark.parametrize("graph", ["../../etc/passwd:x", "/etc/passwd:x", "ports.mine", "a.b:c", 7, None])
def test_a_graph_that_is_none_names_no_file(port, graph):
    record = record_of("failing")
    record["subject"]["graph"] = graph
    assert not any("file=" in line for line in annotated(record, port))


def test_text_of_a_record_cannot_become_a_command(port):
    record = record_of("failing")
    evil = "x\n::set-output name=a::b\r::error::c%0A::warning::d," + HOSTILE
    record["localization"] = [dict.fromkeys(("rung", "case", "seam", "op", "cause", "reason", "reproduce"), evil)] * 40
    lines = annotated(record, port)
    assert 1 <= len(lines) <= 10 and all(re.match(r"::(error|notice) ", line) for line in lines)
    assert command("error", "50%\nend", title="a:b,c") == "::error title=a%3Ab%2Cc::50%25%0Aend"


def test_a_record_and_a_certificate_that_disagree_are_an_error():
    record = record_of("healthy")
    claimed = signed(record)
    record["verdicts"][0]["reason"] = "changed"
    assert "record and certificate do not agree" in render_annotations(record, claimed)
