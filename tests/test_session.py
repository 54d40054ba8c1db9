"""A run goes on whatever breaks and says what broke; with fakes, so that no model is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import session
from harness.bounds import Bounds
from harness.cases import Case, Turn
from harness.checkpoint import EMBEDDED, open_checkpoint
from harness.errors import ExitCode, HarnessError, Undecided
from harness.gate import verify
from harness.options import Options
from harness.policy import policy_from
from harness.run import Run
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

POLICY = {"name": "test", "allow_skip": [], "allow_unanswered": ["inputs:*"], "min_cases": 1, "modes": ["fp16"]}


@dataclass
class Check:
    """A rung made up: what it plans and what it measures."""

    NAME: str
    planned: Mapping[str, Sequence[str]] | Exception
    found: Callable[[str], list[Verdict]] = lambda case: []

    def plan(self, subject: object) -> Mapping[str, Sequence[str]]:
        if isinstance(self.planned, Exception):
            raise self.planned
        return self.planned

    def measure(self, subject: object, case: str) -> list[Verdict]:
        return self.found(case)


class Nothing:
    """A Subject whose every costly part is missing."""

    def __init__(self, start: Exception | None = None) -> None:
        checkpoint = open_checkpoint(EMBEDDED)
        self.checkpoint, self.geometry, self.options = checkpoint, checkpoint.geometry, Options()
        self.policy, self.bounds, self.mode, self.start = policy_from(POLICY), Bounds([]), "int8hu", start
        self.cases = {"a": Case("a", "w", (Turn("", "x"),))}
        self.shipped = SimpleNamespace(there=True, started=True)
        self.sharp, self.has_oracle = None, True

    def start_engine(self) -> None:
        if self.start:
            raise self.start

    def __getattr__(self, name: str) -> Any:
        raise Undecided(f"{name} is not to be had")


def climbed(monkeypatch, *checks: Check, subject: Nothing | None = None) -> Run:
    monkeypatch.setattr("harness.rungs.CHECKS", {check.NAME: check for check in checks})
    run = Run(tool={"version": "0", "commit": "unknown"}, machine={})
    session.climb_all(subject or Nothing(), run, [check.NAME for check in checks])
    return run


def passing(rung: str, seam: str = "ids") -> Check:
    return Check(rung, {"a": [seam]}, lambda case: [Verdict(rung, case, seam, Outcome.PASS, "equal",
                                                              "mismatches", 0.0, 0.0)])


def outcomes(run: Run) -> list[tuple[str, str, str]]:
    return [(verdict.rung, verdict.seam, verdict.outcome.value) for verdict in run.verdicts]


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object, **__: object) -> None:
        raise error
    return raise_it


@pytest.mark.parametrize("error, word", [(RuntimeError("a\nb"), "crashed with RuntimeError: a"), (KeyError(), "KeyError"),
                                         (MemoryError(), "MemoryError"), (HarnessError("torn"), "torn"),
                                         (Undecided("gone"), "gone")])
def test_a_check_that_breaks_is_an_error_and_the_run_goes_on(monkeypatch, error, word):
    run = climbed(monkeypatch, Check("contract", {"a": ["x", "y"]}, fail(error)), passing("inputs"))
    assert outcomes(run) == [("contract", "x", "ERROR"), ("contract", "y", "ERROR"), ("inputs", "ids", "PASS")]
    assert word in run.verdicts[0].reason and "\n" not in run.verdicts[0].reason


@pytest.mark.parametrize("error", [HarnessError("no plan"), ZeroDivisionError("no plan")])
def test_a_plan_that_breaks_is_an_error_of_its_rung(monkeypatch, error):
    run = climbed(monkeypatch, Check("contract", error), passing("inputs"))
    assert outcomes(run) == [("contract", "*", "ERROR"), ("inputs", "ids", "PASS")]
    assert "no plan" in run.verdicts[0].reason


def test_a_planned_seam_without_an_answer_is_an_error(monkeypatch):
    run = climbed(monkeypatch, Check("inputs", {"a": ["ids", "grid"]}, passing("inputs").found))
    assert outcomes(run) == [("inputs", "ids", "PASS"), ("inputs", "grid", "ERROR")]


def test_an_answer_that_nobody_planned_is_an_error(monkeypatch):
    run = climbed(monkeypatch, Check("inputs", {"a": ["grid"]}, passing("inputs").found))
    assert ("inputs", "ids", "ERROR") in outcomes(run) and ("inputs", "grid", "ERROR") in outcomes(run)


@pytest.mark.parametrize("planned", [{}, {"a": []}])
def test_a_run_that_planned_nothing_is_no_pass(monkeypatch, tmp_path, planned):
    run = climbed(monkeypatch, Check("inputs", planned))
    decision = session.write(run, Nothing(), tmp_path / "report")
    assert decision.outcome is Outcome.ERROR and decision.exit_code == ExitCode.UNDECIDED


def test_an_engine_that_cannot_be_had_leaves_the_other_rungs(monkeypatch):
    tokens = Check("tokens", {"a": ["tokens"]}, fail(Undecided("no runtime")))
    run = climbed(monkeypatch, passing("inputs"), tokens, subject=Nothing(Undecided("no runtime")))
    assert outcomes(run) == [("inputs", "ids", "PASS"), ("tokens", "tokens", "ERROR")]


def test_bad_input_found_when_the_engine_starts_ends_the_run(monkeypatch):
    with pytest.raises(HarnessError, match="damaged"):
        climbed(monkeypatch, passing("tokens"), subject=Nothing(HarnessError("damaged")))


def test_a_description_survives_the_lack_of_everything(monkeypatch):
    run = climbed(monkeypatch, passing("inputs"), passing("tokens"), passing("decoder"))
    assert run.subject["checkpoint"]["name"] == EMBEDDED.name and run.policy["name"] == "test"
    assert [run.subject[part] for part in ("oracle", "bundle", "vision_bundle")] == [None] * 3
    assert (run.engine["name"], run.speed, run.cases, run.tokens, run.heat) == (None, {}, [], [], [])


def test_a_description_survives_code_that_crashes(monkeypatch):
    monkeypatch.setattr(Nothing, "__getattr__", lambda self, name: 1 / 0)
    run = climbed(monkeypatch, passing("decoder"))
    assert run.heat == [] and outcomes(run) == [("decoder", "ids", "PASS")]


def test_a_description_of_one_rung_exports_and_records_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("harness.background.ExportJob.__init__", fail(AssertionError("an export was begun")))
    monkeypatch.setattr("harness.oracle.record", fail(AssertionError("an oracle was recorded")))
    monkeypatch.setattr("harness.rungs.CHECKS", {"inputs": passing("inputs")})
    monkeypatch.setattr(session, "_try", lambda make: make())
    subject, run = Subject(Options(work=tmp_path)), Run(tool={}, machine={})
    session.climb_all(subject, run, ["inputs"])
    assert (run.subject["bundle"], run.subject["oracle"], run.subject["mode"], run.cases) == (None, None, "int8hu", [])
    subject.close()


def test_a_run_is_written_as_four_files_that_agree(monkeypatch, tmp_path):
    run = climbed(monkeypatch, passing("inputs"), Check("contract", {"a": ["x"]}, fail(RuntimeError("torn"))))
    session.write(run, Nothing(), tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "certificate.json", "report.html", "report.md", "run.json"]
    assert verify(*session.read_report(tmp_path / "report")) == []
    assert "torn" in (tmp_path / "report" / "report.md").read_text()


def test_a_report_that_cannot_be_rendered_writes_nothing(monkeypatch, tmp_path):
    run = climbed(monkeypatch, passing("inputs"))
    monkeypatch.setattr("harness.report.render_html", fail(HarnessError("no page")))
    with pytest.raises(HarnessError, match="no page"):
        session.write(run, Nothing(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_run_records_refuse_fields_of_another_type():
    from harness.run import run_from_record

    record = json.loads(json.dumps(Run(tool={}, machine={}).record()))
    assert run_from_record(record).verdicts == []
    for name, value in (("subject", []), ("verdicts", {}), ("timings", "x"), ("command", 3), ("engine", None)):
        with pytest.raises(HarnessError, match="not a whole run record"):
            run_from_record(record | {name: value})


def test_files_are_written_together_or_not_at_all(tmp_path, monkeypatch):
    from harness.run import write_files

    write_files(tmp_path / "new", {"a": "1", "b": "1"})
    whole = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text, **given:
                        fail(OSError(28, "No space left on device"))() if ".b." in path.name else whole(path, text, **given))
    with pytest.raises(HarnessError, match="No space left"):
        write_files(tmp_path / "new", {"a": "2", "b": "2"})
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {"a": "1", "b": "1"}
