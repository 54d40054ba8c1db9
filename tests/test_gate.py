"""The gate: no run passes that was not measured whole."""

from __future__ import annotations

import json

import pytest

from harness.errors import HarnessError
from harness.gate import fold
from harness.ladder import NAMES
from harness.policy import load_policy, policy_from
from harness.run import run_from_record, write_json
from harness.verdict import Outcome, Verdict

POLICY = policy_from({"name": "test", "allow_skip": [], "allow_unanswered": ["engine:decoder.*"], "min_cases": 2,
                      "modes": ["fp16"]})


def passing(rung: str, case: str, seam: str = "s") -> Verdict:
    return Verdict(rung, case, seam, Outcome.PASS, "fine", "rel_l2", 1e-7, 1e-6)


def healthy() -> list[Verdict]:
    return [passing(rung, case) for rung in NAMES for case in ("a", "b")]


def test_a_whole_run_passes():
    decision = fold(healthy(), POLICY)
    assert (decision.outcome, decision.exit_code) == (Outcome.PASS, 0)


def test_an_empty_run_is_undecided():
    decision = fold([], POLICY)
    assert (decision.outcome, decision.exit_code) == (Outcome.ERROR, 3)


@pytest.mark.parametrize("rung", NAMES)
def test_a_rung_that_did_not_answer_is_no_pass(rung):
    decision = fold([verdict for verdict in healthy() if verdict.rung != rung], POLICY)
    assert decision.outcome is Outcome.ERROR and rung in decision.reason


@pytest.mark.parametrize("outcome, code", [(Outcome.FAIL, 1), (Outcome.ERROR, 3), (Outcome.SKIP, 3)])
def test_one_bad_verdict_decides(outcome, code):
    verdicts = [*healthy(), Verdict("vision", "a", "vision.embed", outcome, "because")]
    decision = fold(verdicts, POLICY)
    assert (decision.outcome, decision.exit_code) == (outcome, code)
    assert "vision.embed" in decision.reason


def test_only_a_named_skip_is_excused():
    def with_skip(seam: str) -> Outcome:
        return fold([*healthy(), Verdict("engine", "a", seam, Outcome.SKIP, "no index")], POLICY).outcome
    assert with_skip("decoder.layers.00") is Outcome.PASS
    assert with_skip("logits") is Outcome.SKIP


def test_a_rung_of_excused_skips_alone_is_no_pass():
    verdicts = [verdict for verdict in healthy() if verdict.rung != "engine"]
    verdicts.append(Verdict("engine", "a", "decoder.layers.00", Outcome.SKIP, "no index"))
    assert fold(verdicts, POLICY).outcome is Outcome.SKIP


def test_too_few_cases_are_no_pass():
    verdicts = [verdict for verdict in healthy() if not (verdict.rung == "decoder" and verdict.case == "b")]
    assert fold(verdicts, POLICY).outcome is Outcome.ERROR


def test_a_verdict_of_an_unknown_rung_is_no_pass():
    assert fold([*healthy(), passing("vibes", "a")], POLICY).outcome is Outcome.ERROR


def test_a_record_of_another_schema_is_refused():
    with pytest.raises(HarnessError, match="schema"):
        run_from_record({"schema": 0})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError):
        write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="cannot be written"):
        write_json(tmp_path / "file" / "run.json", {})


def test_the_policy_in_the_repo_excuses_nothing():
    policy = load_policy()
    assert (policy.allow_skip, policy.allow_unanswered) == ((), ()) and policy.min_cases >= 8


@pytest.mark.parametrize("change, word", [({"extra": 1}, "extra"), ({"min_cases": None}, "min_cases"),
                                          ({"allow_skip": ["vibes"]}, "vibes")])
def test_a_bad_policy_is_refused(change, word):
    table = {**POLICY.record(), **change}
    table = {key: value for key, value in table.items() if value is not None}
    with pytest.raises(HarnessError, match=word):
        policy_from(table)
