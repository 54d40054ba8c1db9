"""Evidence: a record, certificate or oracle that no longer speaks for the bundle in hand, or never did."""

from __future__ import annotations

import json

import numpy as np

from harness.faults import fault
from harness.faults.proof import Evidence


def _verdict(record: dict, rung: str) -> dict:
    return next(row for row in record["verdicts"] if row["rung"] == rung and row["value"] is not None)


@fault("evidence", "verify", "record", source="G06")
def figure_edited(evidence: Evidence) -> None:
    """a figure changed after the certificate was written"""
    evidence.edit(lambda record: _verdict(record, "decoder").update(value=1e-9), sign=False)


@fault("evidence", "verify", "record", source="G06")
def failure_called_a_pass(evidence: Evidence) -> None:
    """a figure past its bound is recorded as PASS, and the certificate made from that"""
    def change(record):
        row = _verdict(record, "vision")
        row.update(value=row["bound"] * 10)

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G06")
def bound_loosened_afterwards(evidence: Evidence) -> None:
    """the bounds in the record are wider than those that judged"""
    evidence.edit(lambda record: record["bounds"][0].update(limit=1.0), sign=False)


@fault("evidence", "verify", "certificate|record", source="G13")
def certificate_says_pass(evidence: Evidence) -> None:
    """a red record beside a green certificate"""
    evidence.edit(lambda record: _verdict(record, "decode").update(outcome="FAIL"), sign=False)


@fault("evidence", "verify", "record", source="G13")
def not_a_number_passes(evidence: Evidence) -> None:
    """a figure that is not a number counted as PASS"""
    evidence.edit(lambda record: _verdict(record, "decoder").update(value="nan"))


@fault("evidence", "verify", "record", source="G13")
def empty_run(evidence: Evidence) -> None:
    """a run without a single verdict"""
    evidence.edit(lambda record: record.update(verdicts=[]))


@fault("evidence", "verify", "record", source="G09")
def engine_never_ran(evidence: Evidence) -> None:
    """no verdict of the engine, and a certificate all the same"""
    evidence.edit(lambda record: record.update(
        verdicts=[row for row in record["verdicts"] if row["rung"] != "engine"]))


@fault("evidence", "verify", "record", source="G10")
def one_kind_of_prompt(evidence: Evidence) -> None:
    """judged on two prompts only"""
    names = sorted(evidence.subject.cases)[:2]
    evidence.edit(lambda record: record.update(verdicts=[
        row for row in record["verdicts"] if row["case"] in names or row["case"] not in evidence.subject.cases]))


@fault("evidence", "verify", "record", source="G13")
def unknown_rung_counts(evidence: Evidence) -> None:
    """a rung renamed, so that nothing expects it"""
    evidence.edit(lambda record: _verdict(record, "tokens").update(rung="tokens-lenient"))


@fault("evidence", "verify", "policy", source="G06")
def policy_excuses_everything(evidence: Evidence) -> None:
    """a policy that lets every rung be skipped, in record and certificate"""
    evidence.edit(lambda record: record["policy"].update(allow_skip=["engine", "tokens", "quantized"], min_cases=1))


@fault("evidence", "verify", "record", source="G01")
def cosine_above_one(evidence: Evidence) -> None:
    """cosines of 1.0001, as float32 sums give them, taken for perfect"""
    def change(record):
        figures = _verdict(record, "decoder")["figures"]
        for way in figures.values():
            for region in way.values():
                region["cosine"] = 1.0001

    evidence.edit(change)


@fault("evidence", "verify", "bundle", source="G09")
def another_bundle_of_that_name(evidence: Evidence) -> None:
    """the bundle was exported again under the same name"""
    evidence.bundle_digest = "0" * 64


@fault("evidence", "verify", "oracle", source="G03")
def oracle_of_another_checkpoint(evidence: Evidence) -> None:
    """the oracle was recorded from another revision"""
    evidence.manifest(lambda identity: identity.update(checkpoint_digest="f" * 64))


@fault("evidence", "verify", "oracle", source="G12")
def oracle_in_bfloat16(evidence: Evidence) -> None:
    """the oracle was recorded in bfloat16, and says so"""
    evidence.manifest(lambda identity: identity.update(dtype="bfloat16"))


@fault("evidence", "verify", "oracle", source="O10")
def oracle_under_tf32(evidence: Evidence) -> None:
    """the oracle was recorded with TF32 products, and says so"""
    evidence.manifest(lambda identity: identity["precision"].update({"cuda.matmul": "tf32"}))


@fault("evidence", "verify", "oracle", source="G12")
def oracle_rounded_and_signed(evidence: Evidence) -> None:
    """the oracle's values were rounded to bfloat16 and signed as float32"""
    evidence.retouch(lambda name, array: (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
                     if array.dtype == np.float32 else array)


@fault("evidence", "verify", "oracle", source="G03")
def oracle_bytes_changed(evidence: Evidence) -> None:
    """a byte of a recorded activation changed on disk"""
    path = evidence.activations(".safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@fault("evidence", "verify", "oracle", source="G13")
def prompt_changed_since(evidence: Evidence) -> None:
    """the case's prompt is not the one that was recorded"""
    path = evidence.part("case.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    record["definition"]["turns"][0]["text"] += " Please."
    path.write_text(json.dumps(record), encoding="utf-8")


@fault("evidence", "verify", "oracle", source="G15")
def oracle_half_recorded(evidence: Evidence) -> None:
    """one case of the oracle lacks its activations"""
    evidence.activations(".json").unlink()
