"""A run that was judged by a sketch says so wherever its outcome is shown, and cannot pass for one judged by the oracle."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_run import make, signed

from harness.attest import Asked, check_report
from harness.bounds import bounds_from
from harness.gate import BY_SKETCH, verify
from harness.ladder import decide
from harness.plan import NOT_IN_SKETCH, SKETCHED
from harness.policy import load_policy
from harness.report import render_html, render_markdown
from harness.report.card import render_card
from harness.run import run_from_record
from harness.sketch import Estimate
from harness.verdict import Outcome, Verdict

SKIPPED = [f"{rung}:{NOT_IN_SKETCH}" for rung in SKETCHED] + ["decode:kl", "quantized:kl"]


def estimate(figures: dict[str, Any]) -> Estimate:
    value = {name: float(figures[name]) for name in ("rel_l2", "worst_token", "norm_drift", "cosine_gap")}
    low, high = ({name: one * factor for name, one in value.items()} for factor in (0.9, 1.1))
    return Estimate(**value, worst_token_at=3, low=low, high=high, candidate_nonfinite=0, tokens=figures["tokens"],
                    degenerate=False)


def by_sketch(verdict: Verdict, run) -> Verdict:
    """The verdict that a sketch gives in the place of one by the whole oracle."""
    if verdict.rung not in SKETCHED or verdict.case == "mode":
        return verdict
    if verdict.seam == "kl":
        return Verdict(verdict.rung, verdict.case, "kl", Outcome.SKIP, "judged by sketch")
    if verdict.seam == "tokens":
        return verdict
    measured = {way: {region: estimate(figures) for region, figures in found.items()}
                for way, found in verdict.figures.items() if way != "local"}
    limits = bounds_from(run.bounds).at(verdict.rung, verdict.seam, "int8hu" if verdict.rung == "quantized" else "")
    return decide(verdict.rung, verdict.case, verdict.seam, measured, limits)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """A healthy record, judged by sketch."""
    run = run_from_record(make(layers=2, vision_layers=2, cases=2, inside=False))
    run.policy |= {"name": "by sketch", "allow_unanswered": SKIPPED}
    run.subject["oracle"] = {"digest": "77" * 32, "identity": {"torch": "2.13"}, "sketch_of": "ab" * 32}
    verdicts = [by_sketch(verdict, run) for verdict in run.verdicts]
    rows = dict.fromkeys((verdict.rung, verdict.case) for verdict in verdicts if verdict.rung in SKETCHED)
    run.verdicts = verdicts + [Verdict(rung, case, NOT_IN_SKETCH, Outcome.SKIP, "judged by sketch: worst channel")
                               for rung, case in rows if case != "mode"]
    return json.loads(json.dumps(run.record()))


def test_certificate_verify_report_and_card_say_it(record, tmp_path):
    certificate = signed(record)
    assert certificate["outcome"] == "PASS" and certificate["reason"].startswith(BY_SKETCH)
    assert verify(record, certificate) == []
    for text in (render_markdown(record, certificate), render_html(record, certificate), render_card(record, certificate)):
        assert "judged by sketch" in text
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    lines, code = check_report(tmp_path, [], Asked())
    assert code == 0 and "judged again by a sketch of the oracle" in lines[0]


def test_the_usual_policy_refuses_it(record):
    found = verify(record, signed(record), None, load_policy())
    assert any("laxer than 'default'" in sentence for sentence in found)


def test_a_sketch_cannot_be_given_out_as_an_oracle(record):
    forged = json.loads(json.dumps(record))
    del forged["subject"]["oracle"]["sketch_of"]
    found = verify(forged, signed(forged))
    assert any("names a whole oracle" in sentence for sentence in found)
    forged = json.loads(json.dumps(record))
    forged["verdicts"] = [row for row in forged["verdicts"] if row["seam"] != NOT_IN_SKETCH]
    assert any(NOT_IN_SKETCH in sentence for sentence in verify(forged, signed(forged)))
