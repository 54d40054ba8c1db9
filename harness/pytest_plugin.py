"""`pytest ladders/`: the same rungs through the same code, one test a seam and case.

A ladder file sets `RUNG` and has one test that takes the fixture `verdict`; its parameters come from the rung's plan, so
that collection needs the checkpoint's header and the cases, but no oracle, graph or bundle.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from harness.errors import HarnessError
from harness.verdict import Outcome, Verdict, worst

OPTIONS = {"checkpoint": "HF model directory or hub id (default: the embedded tiny one)",
           "graph": "torch graph under test, module:factory", "bundle": "LanguageBundle under test",
           "vision-bundle": "vision bundle that goes with it", "oracle": "recorded oracle",
           "mode": "mode of the bundle we export: fp16, int8lin or int8hu", "device": "cpu or cuda",
           "engine": "what runs the bundle: coreai, replay, replay:fp16 or replay:coreai-cpu",
           "cases": "cases.toml", "bounds": "bounds TOML", "policy": "policy TOML",
           "report": "folder for run.json, certificate.json and the reports"}
_PATHS = {"bundle", "vision-bundle", "oracle", "cases", "bounds", "policy", "report"}


class Judged:
    """The run behind a test session: a Subject, and each rung's verdicts as they are first asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.planned = False
        self.asserted = 0
        """Verdicts that a test stood for: what was skipped does not count."""
        self._done: dict[tuple[str, str], list[Verdict]] = {}

    @cached_property
    def subject(self) -> Any:
        """Made of the command-line options."""
        from harness.options import Options
        from harness.subject import Subject

        given = {name.replace("-", "_"): Path(value) if name in _PATHS else value for name in OPTIONS
                 if name != "report" and (value := self.config.getoption(f"--{name}")) is not None}
        if self.config.getoption("--report") is not None:  # what is made goes beside its certificate
            given["work"] = Path(self.config.getoption("--report"))
        return Subject(Options(**given))

    @cached_property
    def run(self) -> Any:
        """The record that collects the verdicts."""
        from harness.run import Run

        return Run(command="pytest " + " ".join(map(str, self.config.invocation_params.args)))

    def verdicts(self, rung: str, case: str) -> list[Verdict]:
        """All verdicts of one rung and case."""
        from harness.rungs import CHECKS, answers

        if (rung, case) not in self._done:
            with self.run.timed(f"{rung} {case}"):
                self._done[rung, case] = answers(CHECKS[rung], self.subject, case)
            self.run.verdicts += self._done[rung, case]
        return self._done[rung, case]

    def close(self) -> None:
        """End what still runs in the background."""
        if "subject" in self.__dict__:
            self.subject.close()


_JUDGED = pytest.StashKey[Judged]()


def judged(config: pytest.Config) -> Judged:
    """The session's one run."""
    if _JUDGED not in config.stash:
        config.stash[_JUDGED] = Judged(config)
    return config.stash[_JUDGED]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `harness ladder` takes, `pytest ladders/` takes too."""
    group = parser.getgroup("harness", "conversion under test")
    for name, text in OPTIONS.items():
        group.addoption(f"--{name}", help=text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One parameter a planned case and seam."""
    rung = getattr(metafunc.module, "RUNG", None)
    if rung is None or "verdict" not in metafunc.fixturenames:
        return
    from harness.rungs import CHECKS

    judged(metafunc.config).planned = True
    try:
        plan = CHECKS[rung].plan(judged(metafunc.config).subject)
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from error
    rows = [(rung, case, seam) for case, seams in plan.items() for seam in seams]
    metafunc.parametrize("verdict", rows, indirect=True, ids=[f"{case}-{seam}" for _, case, seam in rows])


@pytest.fixture
def verdict(request: pytest.FixtureRequest) -> Verdict:
    """The verdict of this test's rung, case and seam; the worst, should there be several."""
    rung, case, seam = request.param
    found = [one for one in judged(request.config).verdicts(rung, case) if one.seam == seam]
    last = worst(one.outcome for one in found)
    return next(one for one in found if one.outcome is last)


@pytest.fixture
def holds(request: pytest.FixtureRequest) -> Any:
    """`holds(verdict)`: passes on PASS, skips where the policy allows the SKIP, fails on everything else."""
    def check(verdict: Verdict) -> None:
        if judged(request.config).subject.policy.excuses(verdict):
            pytest.skip(verdict.reason)
        judged(request.config).asserted += 1
        if verdict.outcome is Outcome.PASS:
            return
        cause = f"\nprobable cause: {verdict.cause}" if verdict.cause else ""
        pytest.fail(f"{verdict.outcome.value} {verdict.id}: {verdict.reason}{cause}", pytrace=False)
    return check


@pytest.fixture
def session_run(request: pytest.FixtureRequest) -> Iterator[Judged]:
    """The whole run, for the gate that folds it."""
    judged(request.config).asserted += 1
    yield judged(request.config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Tool commit, digests, graph, bundle, engine and policy; only where ladders are run."""
    if not any("ladders" in str(argument) for argument in config.args):
        return []
    try:
        return _header(judged(config).subject)
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from error


def _header(subject: Any) -> list[str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from harness.run import tool
    from harness.session import check_given

    check_given(subject)
    options, made, policy, checkpoint = subject.options, tool(), subject.policy, subject.checkpoint
    bundle = f"{options.bundle} ({subject.bundle.digest[:12]})" if options.bundle else f"exported now, {subject.mode}"
    oracle = f"{options.oracle} ({subject.oracle.digest[:12]})" if options.oracle else "recorded here"
    oracle += ", a sketch: judged by sketch" if subject.by_sketch else ""
    try:
        engine = f"Core AI {version('coreai-core')}"
    except PackageNotFoundError:
        engine = "none: coreai-core is missing"
    return [f"harness {made['version']} at {made['commit']}, policy {policy.name} ({policy.digest[:12]})",
            f"checkpoint {checkpoint.name} ({checkpoint.digest[:12]}), graph {options.graph}",
            f"bundle {bundle}, oracle {oracle}",
            f"engine {engine}, {platform.system()} {platform.machine()}"]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run of the ladder in which no verdict was asserted (all skipped, nothing planned) is no success."""
    run = session.config.stash.get(_JUDGED, None)
    if run and run.planned and not run.asserted and exitstatus == pytest.ExitCode.OK \
            and not session.config.getoption("collectonly"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what still runs in the background, also after a Ctrl-C."""
    if _JUDGED in config.stash:
        config.stash[_JUDGED].close()
