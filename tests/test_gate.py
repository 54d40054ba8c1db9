"""The gate: no run passes that was not measured whole, and no certificate survives a changed record."""

from __future__ import annotations

import copy
import json

import pytest
from whole_run import whole_run

from harness.errors import HarnessError
from harness.gate import certificate, digest_of, fold, verify
from harness.ladder import NAMES
from harness.policy import load_policy, policy_from
from harness.run import Run, run_from_record, write_json
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


def run() -> Run:
    return whole_run(POLICY.record(), "b1")


def signed() -> tuple[dict, dict]:
    made = run()
    return json.loads(json.dumps(made.record())), certificate(made, POLICY)


def test_a_true_certificate_verifies():
    record, claimed = signed()
    assert verify(record, claimed, "b1") == []


def test_another_bundle_under_the_same_name_is_named():
    record, claimed = signed()
    assert "b2" in " ".join(verify(record, claimed, "b2"))


@pytest.mark.parametrize("spoil", [
    lambda record: record["verdicts"][0].update(value=1.0),
    lambda record: record["verdicts"].pop(),
    lambda record: record["verdicts"][0].update(outcome="FAIL"),
    lambda record: record["policy"].update(allow_skip=["vision"]),
    lambda record: record["subject"].update(bundle={"digest": "other"}),
    lambda record: record["tool"].update(commit="another"),
    lambda record: record.update(schema=99),
    lambda record: record.pop("verdicts"),
])
def test_a_changed_record_does_not_verify(spoil):
    record, claimed = signed()
    spoil(record)
    assert verify(record, claimed, None)


def test_a_forged_outcome_does_not_verify():
    made = run()
    made.verdicts[0] = Verdict(NAMES[0], "a", "s", Outcome.PASS, "fine", "rel_l2", 1.0, 1e-6)
    claimed = certificate(made, POLICY)
    assert any("past" in sentence for sentence in verify(json.loads(json.dumps(made.record())), claimed, None))


def test_a_forged_digest_does_not_verify():
    record, claimed = signed()
    forged = copy.deepcopy(claimed)
    forged["outcome"] = "FAIL"
    forged["digest"] = digest_of({key: value for key, value in forged.items() if key != "digest"})
    assert verify(record, forged, None)


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


@pytest.mark.parametrize("spoil, says", [
    (lambda record: record["verdicts"].append(record["verdicts"][0]), "stands 2 times"),
    (lambda record: record["verdicts"].pop(), "is not in the record"),
    (lambda record: record["verdicts"][-1].update(seam="decoder.layers.99"), "no rung writes"),
    (lambda record: record["verdicts"][-1].update(value=-1.0), "is no distance"),
    (lambda record: record["verdicts"][-1].update(value=None, bound=None), "without a figure"),
    (lambda record: record.update(cases=[]), "names no geometry or no case"),
    (lambda record: record["cases"].append({"name": "c", "image": None, "engine": False}), "is not in the record"),
    (lambda record: record.update(bounds=[_limit(1e-3)]), "by 0.001, the bounds in force say 1e-06"),
    (lambda record: record.update(bounds=[_limit(1e-7)]), "which no bound of the record"),
])
def test_a_signed_record_that_no_run_can_have_written(spoil, says):
    record, _ = signed()
    spoil(record)
    claimed = certificate(run_from_record(record), POLICY)
    assert says in " ".join(verify(record, claimed, "b1", None, [_limit(1e-6)]))


def test_figures_past_their_bound_are_seen_behind_a_small_value():
    record, _ = signed()
    record["bounds"] = [_limit(0.0)]
    row = next(row for row in record["verdicts"] if row["rung"] == "decoder")
    for figures, wrong in (({"": {"all": {"mismatches": 0.0}}}, False), ({"": {"all": {"mismatches": 0.5}}}, True),
                           ({"": {"all": {"mismatches": "nan"}}}, True)):
        row["figures"] = figures
        found = verify(record, certificate(run_from_record(record), POLICY), "b1", None, [_limit(0.0)])
        assert bool(found) is wrong, found


def _limit(limit: float) -> dict:
    return {"rung": "decoder", "metric": "mismatches", "limit": limit, "measured": 0.0, "because": "a test",
            "date": "2026-11-25", "seams": "*", "engine": "*"}
