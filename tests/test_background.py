"""Work beside the run: its failures arrive as sentences of the right kind, and nobody ever waits forever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from test_session import fail

from harness import background
from harness.background import EngineJob, ExportJob
from harness.cases import FrozenInputs
from harness.engines import Request
from harness.errors import ExitCode, HarnessError, Undecided
from harness.trace import Trace

LIMIT_S = 20


# The export beside the run.

@pytest.fixture
def export(monkeypatch, tmp_path) -> Callable[[str], ExportJob]:
    """An ExportJob whose child runs some Python instead."""
    real = subprocess.Popen

    def start(code: str) -> ExportJob:
        with monkeypatch.context() as patch:
            patch.setattr(background.subprocess, "Popen",
                          lambda command, **given: real([sys.executable, "-c", code], **given))
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
    job = export("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); "
                 "time.sleep(60)")
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
