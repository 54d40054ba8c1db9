"""A run goes on whatever breaks, says what broke, and never waits forever; with fakes, so that no model is run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness import background, session
from harness.background import EngineJob, ExportJob
from harness.bounds import Bounds
from harness.cases import Case, FrozenInputs, Turn
from harness.checkpoint import EMBEDDED, open_checkpoint
from harness.engines import Request
from harness.errors import ExitCode, HarnessError, Undecided
from harness.gate import verify
from harness.options import Options
from harness.policy import policy_from
from harness.run import Run
from harness.subject import Subject
from harness.trace import Trace
from harness.verdict import Outcome, Verdict

LIMIT_S = 20
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
    return Check(rung, {"a": [seam]}, lambda case: [Verdict(rung, case, seam, Outcome.PASS, "equal")])


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


# The export beside the run.

@pytest.fixture
def export(monkeypatch, tmp_path) -> Callable[[str], ExportJob]:
    """An ExportJob whose child runs some Python instead."""
    real = subprocess.Popen

    def start(code: str) -> ExportJob:
        with monkeypatch.context() as patch:
            patch.setattr(background.subprocess, "Popen", lambda command, **given: real([sys.executable, "-c", code], **given))
            return ExportJob([], tmp_path)
    return start


def test_an_export_gives_what_it_printed_last(export):
    assert export("print('noise'); print('{\"decoder\": \"d\"}')").result() == {"decoder": "d"}


@pytest.mark.parametrize("code, kind", [(1, Undecided), (2, HarnessError), (3, Undecided), (130, Undecided)])
def test_exit_codes_of_an_export(export, code, kind):
    job = export(f"import sys; print('first', file=sys.stderr); print('harness export: full disk', file=sys.stderr); "
                 f"sys.exit({code})")
    for _ in range(2):
        with pytest.raises(HarnessError) as caught:
            job.result()
        assert type(caught.value) is kind and str(caught.value) == f"the export ended with code {code}: full disk"


@pytest.mark.parametrize("code", ["import os; os.kill(os.getpid(), 9)", "pass", "print('no json')"])
def test_an_export_that_dies_or_says_nothing_is_undecided(export, code):
    with pytest.raises(Undecided):
        export(code).result()


def test_bad_input_reaches_the_parent_as_a_sentence(tmp_path):
    with pytest.raises(HarnessError, match="no/such/place: no such directory") as caught:
        ExportJob(["no/such/place"], tmp_path / "out").result()
    assert caught.value.exit_code == ExitCode.BAD_INPUT and not (tmp_path / "out").exists()


def test_stopping_ends_an_export_that_does_not_listen(export, monkeypatch):
    monkeypatch.setattr(background, "PATIENCE_S", 0.2)
    job = export("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)")
    assert job._child.stdout.readline() == "up\n"
    started = time.monotonic()
    job.stop()
    assert job._child.poll() is not None and time.monotonic() - started < LIMIT_S
    job.stop()


# The engine beside the run.

@dataclass
class Engine:
    """Answers each request when `let` allows it; then whatever `then` does."""

    let: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(99))
    crash_at: int = 99
    error: BaseException = field(default_factory=lambda: RuntimeError("boom"))
    refuse: str = ""
    name: str = "fake"
    facts: dict[str, Any] = field(default_factory=dict)

    def seams(self) -> frozenset[str]:
        return frozenset({"logits"})

    def check(self, request: Request) -> None:
        if request.inputs.case == self.refuse:
            raise HarnessError("needs 600 tokens, the bundle's context is 512", where=self.refuse)

    def run(self, requests: Sequence[Request]):
        for number, request in enumerate(requests):
            assert self.let.acquire(timeout=LIMIT_S)
            if number == self.crash_at:
                raise self.error
            yield Trace({"logits": np.zeros((1, 2))}, {"case": request.inputs.case})


def job(engine: Engine | Callable[[], Engine], cases: str = "abc") -> EngineJob:
    ids = np.zeros(1, np.int32)
    requests = {case: Request(FrozenInputs(case, ids, np.zeros((3, 1), np.int32))) for case in cases}
    return EngineJob(engine if callable(engine) else lambda: engine, requests)


def within_limit(call: Callable[..., Any], *arguments: object) -> Any:
    """The call's result, or a failure of the test where it hangs; the thread is a daemon, so that nothing waits for it."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=LIMIT_S)


def test_traces_are_handed_out_as_they_come():
    engine = Engine(let=threading.Semaphore(1))
    running = job(engine)
    assert within_limit(running.trace, "a").facts == {"case": "a"}
    assert running._thread.is_alive(), "the first trace was there while the second was still to come"
    engine.let.release(2)
    assert [within_limit(running.trace, case).facts["case"] for case in "cba"] == ["c", "b", "a"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), Undecided("boom"), SystemExit("boom"), KeyboardInterrupt("boom")])
def test_a_crash_keeps_what_came_before_and_is_undecided_for_the_rest(error):
    running = job(Engine(crash_at=1, error=error))
    assert within_limit(running.trace, "a").facts == {"case": "a"}
    for case in "bc":
        with pytest.raises(Undecided, match="boom"):
            within_limit(running.trace, case)


def test_bad_input_of_the_engine_stays_bad_input():
    running = job(Engine(crash_at=0, error=HarnessError("damaged")))
    with pytest.raises(HarnessError) as caught:
        within_limit(running.trace, "b")
    assert caught.value.exit_code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("error", [ImportError("no coreai"), HarnessError("no index"), SystemExit(0)])
def test_an_engine_that_cannot_be_made(error):
    with pytest.raises(HarnessError):
        within_limit(job(fail(error)).trace, "a")


def test_a_case_that_was_never_asked_for():
    with pytest.raises(Undecided, match="ended before"):
        within_limit(job(Engine()).trace, "other")


def test_a_request_that_the_bundle_refuses_does_not_take_the_others_with_it():
    engine = Engine(let=threading.Semaphore(1), refuse="a")
    running = job(engine)
    assert within_limit(running.trace, "b").facts == {"case": "b"}
    with pytest.raises(HarnessError, match="context is 512"):
        within_limit(running.trace, "a")
    engine.let.release(9)
    assert within_limit(running.trace, "c").facts == {"case": "c"}


def test_an_engine_without_cases_ends():
    running = job(Engine(), "")
    running._thread.join(LIMIT_S)
    assert not running._thread.is_alive() and running.cases == ()


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
