"""`pytest ladders/`: the same verdicts as tests, under readable ids; what is no pass is no green run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from test_session import Check, fail

import harness.graph.reference  # noqa: F401  pytester forgets what a run within this process was the first to import
import harness.report  # noqa: F401
import harness.rungs  # noqa: F401
from harness.checkpoint import EMBEDDED, open_checkpoint
from harness.policy import load_policy
from harness.verdict import Outcome, Verdict

pytest_plugins = ["pytester"]
LADDERS = Path(__file__).resolve().parent.parent / "ladders"
INSTALLED = any(entry.value == "harness.pytest_plugin" for entry in entry_points(group="pytest11"))
POLICY = ('name = "test"\nallow_skip = []\nallow_unanswered = ["decoder:decoder.embed", "vision:*"]\nmin_cases = 1\n'
          'modes = ["int8hu"]\n')
SEAMS = ("decoder.embed", "decoder.layers.00")


@pytest.fixture
def climb(pytester: pytest.Pytester, monkeypatch) -> Callable[..., pytest.RunResult]:
    """Run some of the real ladder files on made-up rungs, in a folder of their own; keywords are outcomes by seam."""
    folder = pytester.mkdir("ladders")
    (pytester.path / "policy.toml").write_text(POLICY)

    def run(*files: str, checks: list[Check], options: tuple[str, ...] = ()) -> pytest.RunResult:
        monkeypatch.setattr("harness.rungs.CHECKS", {check.NAME: check for check in checks})
        for name in files:
            shutil.copy(LADDERS / name, folder / name)
        plugin = () if INSTALLED else ("-p", "harness.pytest_plugin")
        return pytester.runpytest_inprocess("ladders", "-v", "-p", "no:cacheprovider", *plugin, "--policy", "policy.toml",
                                            *options)
    return run


def rung(name: str, *given: Outcome, cause: str | None = None) -> Check:
    """A rung of one case whose seams end as given."""
    return Check(name, {"scene-211": SEAMS[:len(given)]}, lambda case: [
        Verdict(name, case, seam, outcome, f"the reason of {seam}", cause=cause) for seam, outcome in zip(SEAMS, given)])


def test_ids_say_rung_case_and_seam(pytester):
    plugin = () if INSTALLED else ("-p", "harness.pytest_plugin")
    result = pytester.runpytest_inprocess(str(LADDERS / "test_decoder.py"), "--collect-only", "-q", *plugin)
    assert result.ret == 0
    listed = [line.rpartition("/")[2] for line in result.outlines]
    assert "test_decoder.py::test_layer[scene-211-decoder.layers.03]" in listed
    assert "test_decoder.py::test_layer[text-only-logits]" in listed


def test_a_pass_passes(climb):
    result = climb("test_decoder.py", checks=[rung("decoder", Outcome.PASS, Outcome.PASS)])
    result.assert_outcomes(passed=2)
    assert result.ret == 0


def test_a_fail_fails_with_its_reason_and_cause(climb):
    result = climb("test_decoder.py", checks=[rung("decoder", Outcome.PASS, Outcome.FAIL, cause="rope")])
    result.assert_outcomes(passed=1, failed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["FAIL decoder[[]scene-211-decoder.layers.00[]]: the reason of decoder.layers.00",
                                 "probable cause: rope"])
    assert "Traceback" not in result.stdout.str()


def test_an_error_fails(climb):
    result = climb("test_decoder.py", checks=[Check("decoder", {"scene-211": SEAMS}, fail(RuntimeError("it broke")))])
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["ERROR decoder*crashed with RuntimeError: it broke"])


def test_an_excused_skip_skips_and_another_fails(climb):
    result = climb("test_decoder.py", checks=[rung("decoder", Outcome.SKIP, Outcome.SKIP)])
    result.assert_outcomes(skipped=1, failed=1)
    result.stdout.fnmatch_lines(["SKIP decoder[[]scene-211-decoder.layers.00[]]*"])


def test_the_worst_of_two_answers_counts(climb):
    twice = Check("decoder", {"a": ["x"]}, lambda case: [Verdict("decoder", case, "x", outcome, "r")
                                                        for outcome in (Outcome.PASS, Outcome.FAIL)])
    climb("test_decoder.py", checks=[twice]).assert_outcomes(failed=1)


@pytest.mark.parametrize("checks", [[rung("vision", Outcome.SKIP, Outcome.SKIP)], [Check("vision", {})],
                                    [Check("vision", {"scene-211": ()})]], ids=["all excused", "no case", "no seam"])
def test_a_run_that_asserts_nothing_is_no_success(climb, checks):
    result = climb("test_vision.py", checks=checks)
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "passed" not in result.stdout.str()


def test_a_run_that_selects_nothing_is_no_success(climb):
    result = climb("test_decoder.py", checks=[rung("decoder", Outcome.PASS)], options=("-k", "nothing"))
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_listing_the_tests_is_a_success(climb):
    assert climb("test_decoder.py", checks=[rung("decoder", Outcome.PASS)], options=("--collect-only",)).ret == 0


def test_the_gate_fails_where_a_rung_did_not_answer(climb, monkeypatch):
    monkeypatch.setattr("harness.ladder.NAMES", ("decoder",))
    monkeypatch.setattr("harness.session.describe", lambda subject, run: setattr(run, "policy", subject.policy.record()))
    result = climb("test_zz_gate.py", checks=[rung("decoder", Outcome.PASS)], options=("--report", "out"))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*nothing was compared*"])
    assert (Path("out") / "certificate.json").exists()


def test_the_header_states_what_is_judged_and_by_what(climb):
    result = climb("test_decoder.py", checks=[rung("decoder", Outcome.PASS)])
    digest, policy = open_checkpoint(EMBEDDED).digest[:12], load_policy(Path("policy.toml")).digest[:12]
    result.stdout.fnmatch_lines([f"harness * at *, policy test ({policy})",
                                 f"checkpoint qwen3-vl-tiny ({digest}), graph harness.graph.reference:factory",
                                 "bundle exported now, int8hu, oracle recorded here", "engine *"])


@pytest.mark.parametrize("options, word", [
    (("--checkpoint", "no/such/place"), "no/such/place: no such directory"), (("--policy", "none.toml"), "none.toml"),
    (("--graph", "no_module:factory"), "cannot be imported"), (("--bundle", "none"), "no such bundle"),
    (("--oracle", "none"), "no oracle there")])
def test_bad_input_is_one_sentence(climb, options, word):
    result = climb("test_decoder.py", checks=[rung("decoder", Outcome.PASS)], options=options)
    shown = result.stdout.str() + result.stderr.str()
    assert result.ret == pytest.ExitCode.USAGE_ERROR and word in shown
    assert "Traceback" not in shown and "INTERNALERROR" not in shown


def test_a_session_ends_what_it_started(climb, monkeypatch):
    closed = []
    monkeypatch.setattr("harness.subject.Subject.close", lambda self: closed.append(self))
    climb("test_decoder.py", checks=[rung("decoder", Outcome.FAIL)])
    assert len(closed) == 1
