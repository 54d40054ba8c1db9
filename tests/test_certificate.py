"""The certificate: no changed record keeps it; a record that contradicts itself is named, however it was signed again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from fake_run import BOUNDS, BROKEN, record_of, signed

from harness.bounds import Bounds, bounds_from
from harness.gate import CHAIN, certificate, digest_of, verify
from harness.policy import policy_from
from harness.recheck import weaker
from harness.run import run_from_record
from harness.verdict import Outcome

Record = dict[str, Any]


def rows(record: Record, rung: str, seam: str = "", case: str = "scene-211") -> list[Record]:
    """Verdicts of a rung and case, and of one seam where one is named."""
    return [row for row in record["verdicts"] if row["rung"] == rung and row["case"] == case and seam in ("", row["seam"])]


@pytest.mark.parametrize("kind", ["healthy", "failing"])
def test_a_true_certificate_verifies(kind):
    record = record_of(kind)
    assert verify(record, signed(record), record["subject"]["bundle"]["digest"]) == []


def test_the_chain_binds_every_part_in_order():
    record = record_of("healthy")
    links = signed(record)["chain"]
    assert tuple(link["name"] for link in links[:len(CHAIN)]) == CHAIN
    parts = {link["name"] for link in links} - {"checkpoint", "oracle", "bundle", "vision_bundle"}
    assert parts == set(record) - {"schema"}


@pytest.mark.parametrize("spoil, link", [
    (lambda record: record["verdicts"][0].update(value=1.0), "verdicts"),
    (lambda record: record["verdicts"].pop(), "verdicts"),
    (lambda record: record["policy"].update(allow_skip=["vision"]), "policy"),
    (lambda record: record["subject"]["bundle"].update(digest="other"), "bundle"),
    (lambda record: record["subject"]["checkpoint"].update(digest="other"), "checkpoint"),
    (lambda record: record["bounds"][3].update(limit=0.5), "bounds"),
    (lambda record: record["engine"].update(version="9"), "engine"),
    (lambda record: record["cases"].pop(), "cases"),
    (lambda record: record["heat"].pop(), "heat"),
    (lambda record: record["tool"].update(commit="another"), "tool"),
])
def test_what_was_changed_is_named(spoil, link):
    record = record_of("healthy")
    claimed = signed(record)
    spoil(record)
    assert any(sentence.startswith(f"{link} is not what the certificate was made from")
               for sentence in verify(record, claimed))


@pytest.mark.parametrize("spoil", [lambda record: record.update(schema=99), lambda record: record.pop("verdicts"),
                                   lambda record: record["subject"].update(checkpoint=[3]),
                                   lambda record: record.update(policy="none")])
def test_what_is_no_record_does_not_verify(spoil):
    record = record_of("healthy")
    claimed = signed(record)
    spoil(record)
    assert verify(record, claimed)


def test_a_link_of_the_chain_cannot_be_exchanged_alone():
    record = record_of("healthy")
    claimed = signed(record)
    claimed["chain"][2]["sum"] = "0" * 64
    assert "the chain of digests is broken at cases" in verify(record, claimed)


def test_a_forged_outcome_does_not_verify():
    record = record_of("failing")
    forged = {**signed(record), "outcome": "PASS"}
    forged["digest"] = digest_of({key: value for key, value in forged.items() if key != "digest"})
    assert verify(record, forged)


def test_another_bundle_is_named_and_both_bundles_are_spoken_for():
    record = record_of("healthy")
    claimed = signed(record)
    assert "0123456789" in " ".join(verify(record, claimed, "0123456789"))
    assert verify(record, claimed, record["subject"]["vision_bundle"]["digest"]) == []


def test_a_certificate_of_an_older_schema_is_a_sentence():
    record = record_of("healthy")
    assert verify(record, {**signed(record), "schema": 1}) == [
        "certificate of schema 1, this tool reads 2: check it with the version that wrote it, or run the gate again"]


# Attacks: the record is edited and signed again by `certificate()`, which anybody can call.

def _widen(record: Record) -> None:
    for row in record["bounds"]:
        if row["rung"] == "decoder":
            row["limit"] = 50.0
    for row in record["verdicts"]:
        if row["rung"] == "decoder":
            row |= {"outcome": "PASS", "bound": 50.0}


def _pass(record: Record) -> None:
    for row in record["verdicts"]:
        row["outcome"] = "PASS"


def _halve(record: Record) -> None:
    for row in record["verdicts"]:
        if row["outcome"] == "FAIL":
            row |= {"outcome": "PASS", "value": (row["bound"] or 0.0) / 2}


def _excuse(record: Record) -> None:
    record["verdicts"] = [row for row in record["verdicts"] if row["outcome"] == "PASS"]


def _not_finite(record: Record) -> None:
    figures = rows(record, "engine", "logits")[0]["figures"][""]["all"]
    figures |= {"candidate_nonfinite": 3}


def _nan(record: Record) -> None:
    for row in record["verdicts"]:
        if row["outcome"] == "FAIL":
            row |= {"outcome": "PASS", "value": "nan"}


def _own_bound(record: Record) -> None:
    for row in record["verdicts"]:
        if row["outcome"] == "FAIL":
            row |= {"outcome": "PASS", "bound": 1e9}


def _no_figures(record: Record) -> None:
    for row in record["verdicts"]:
        if row["outcome"] == "FAIL":
            row |= {"outcome": "PASS", "metric": None, "value": None, "bound": None, "figures": {}}


def _exact(record: Record) -> None:
    rows(record, "weights", case="bundle")[0].update(value=7.0, bound=1e6)


def _explain_flip(record: Record) -> None:
    row = rows(record, "tokens")[0]
    row |= {"outcome": "PASS", "value": 0.0}
    row["figures"] |= {"ties": [9], "flips": []}


def _one_layer(record: Record) -> None:
    record["subject"]["checkpoint"]["geometry"]["layers"] = 1
    record["verdicts"] = [row for row in record["verdicts"] if ".layers.01" not in row["seam"]]


def _no_sharp(record: Record) -> None:
    record["verdicts"] = [row for row in record["verdicts"] if not row["case"].endswith("~sharp")]


def _no_engine(record: Record) -> None:
    for row in record["cases"]:
        row["engine"] = False


def _no_because(record: Record) -> None:
    record["bounds"][0]["because"] = ""


def _cosine(record: Record) -> None:
    rows(record, "decoder", "logits")[0]["figures"]["local"]["all"]["cosine"] = 1.0001


def _mode(record: Record) -> None:
    record["subject"]["mode"] = "int4"


@pytest.mark.parametrize("kind, attack, word", [
    ("failing", _pass, "says PASS; its figures say FAIL"), ("healthy", _widen, "proves nothing"),
    ("failing", _halve, "says PASS; its figures say FAIL"), ("failing", _excuse, "must be answered in a whole run"),
    ("failing", _own_bound, "says PASS; its figures say FAIL"), ("failing", _nan, "says PASS"),
    ("failing", _no_figures, "records no figure"), ("failing", _explain_flip, "says PASS; its figures say FAIL"),
    ("healthy", _not_finite, "not finite"), ("healthy", _exact, "says PASS"),
    ("healthy", _one_layer, "must be answered"), ("healthy", _no_sharp, "must be answered"),
    ("healthy", _no_engine, "no case was run on the engine"), ("healthy", _no_because, "because"),
    ("healthy", _cosine, "which nothing has"), ("healthy", _mode, "int4"),
    ("healthy", lambda record: record.update(bounds=[]), "bound"),
    ("healthy", lambda record: record["verdicts"].append(record["verdicts"][0]), "stands 2 times"),
    ("healthy", lambda record: record["verdicts"].append({**record["verdicts"][0], "case": "other"}), "is no case that"),
    ("healthy", lambda record: record["subject"]["checkpoint"].update(geometry={}), "cannot be told"),
    ("healthy", lambda record: record["subject"]["checkpoint"]["geometry"].update(layers=10**12), "no model's"),
    ("healthy", lambda record: rows(record, "decoder", "logits")[0].update(value=1e-9), "its figures give"),
    ("healthy", lambda record: rows(record, "decoder", "logits")[0].update(figures={"local": 3}), "nothing measures"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_record_edited_and_signed_again_does_not_verify(kind, attack: Callable[[Record], Any], word):
    record = record_of(kind)
    attack(record)
    run = run_from_record(record)
    found = verify(record, certificate(run, policy_from(record["policy"])))
    assert found and word in " ".join(found)


def test_bounds_wider_than_those_asked_for_are_named():
    record = record_of("healthy")
    for row in record["bounds"]:
        if row["rung"] == "engine":
            row["limit"] = 0.9
    for row in record["verdicts"]:
        if row["rung"] == "engine":
            row["bound"] = 0.9
    claimed = certificate(run_from_record(record), policy_from(record["policy"]))
    assert verify(record, claimed) == [], "0.9 contradicts nothing by itself"
    assert "wider than 0.03" in " ".join(verify(record, claimed, bounds=BOUNDS))
    record["bounds"] = [row for row in record["bounds"] if row["rung"] != "vision"]
    assert "is missing; it should be" in " ".join(verify(record, claimed, bounds=BOUNDS))
    assert verify(record_of("healthy"), signed(record_of("healthy")), bounds=BOUNDS) == []


def test_a_row_put_behind_another_is_seen_whatever_its_pattern():
    record = record_of("healthy")
    row = {**record["bounds"][3], "limit": 0.009, "seams": "decoder.layer*", "measured": 0.0}
    record["bounds"].append(row)
    found = list(weaker(run_from_record(record), bounds_from(record["bounds"]), BOUNDS))
    assert found and "0.009, wider than 2e-05" in found[0]


def test_tighter_bounds_hold():
    record = record_of("healthy")
    loose = Bounds([type(row)(**{**vars(row), "limit": 2 * row.limit}) for row in BOUNDS.all])
    assert verify(record, signed(record), bounds=loose) == []


def test_fewer_cases_are_caught_by_the_policy_asked_for():
    record = record_of("healthy")
    record["verdicts"] = [row for row in record["verdicts"] if not row["case"].startswith("text-only")]
    record["cases"] = record["cases"][:1]
    assert verify(record, signed(record)) == [], "a run of one case says so and is whole"
    assert "laxer" in " ".join(verify(record, signed(record), least=policy_from({**record["policy"], "min_cases": 2})))


def test_a_partial_run_is_no_contradiction():
    record = record_of("healthy")
    record["verdicts"] = [row for row in record["verdicts"] if row["rung"] == "decoder"]
    claimed = signed(record)
    assert claimed["outcome"] == Outcome.ERROR.value and verify(record, claimed) == []


def test_verify_changes_nothing():
    record = record_of("failing")
    before, claimed = copy.deepcopy(record), signed(record)
    verify(record, claimed, "x", policy_from(record["policy"]), BOUNDS)
    assert record == before and BROKEN in record["localization"][0]["seam"]
