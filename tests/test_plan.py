"""The plan that a record is held against is what the rungs plan, for our own export and for a bundle made elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import write_checkpoint

from harness.checkpoint import open_checkpoint
from harness.options import Options
from harness.plan import Kind, planned, tensors
from harness.rungs import CHECKS
from harness.subject import Subject


@pytest.mark.parametrize("given", [None, Path("elsewhere")], ids=["exported", "given"])
def test_the_plan_of_a_record_is_what_the_rungs_plan(given, monkeypatch):
    monkeypatch.setattr(Subject, "mode", "int8hu")
    subject = Subject(Options(bundle=given))
    asked = {(name, case): list(seams) for name, check in CHECKS.items() for case, seams in check.plan(subject).items()}
    kinds = {name: Kind(bool(case.images), case.engine) for name, case in subject.cases.items()}
    assert planned(subject.geometry, kinds, "int8hu", given is None) == asked


@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_of_a_geometry_are_those_of_a_checkpoint(tied, tmp_path):
    made = open_checkpoint(write_checkpoint(tmp_path / "model", tied=tied))
    assert tensors(made.geometry) == made.names()
    assert tensors(open_checkpoint().geometry) == open_checkpoint().names()


def test_a_tied_checkpoint_has_a_quantized_head_of_its_own(tmp_path):
    geometry = open_checkpoint(write_checkpoint(tmp_path / "model", tied=True)).geometry
    seams = planned(geometry, {}, "int8hu", True)
    assert "lm_head.weight" in seams["weights", "bundle"] and "lm_head.weight" not in seams["weights", "graph"]
