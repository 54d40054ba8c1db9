"""Evidence once more: rows lost, repeated or invented, wider bounds, and an oracle that is nearly the right one."""

from __future__ import annotations

import copy
import json

import numpy as np

from harness.faults import fault
from harness.faults.proof import Evidence


def _row(record: dict, rung: str, outcome: str = "PASS") -> dict:
    return next(row for row in record["verdicts"] if row["rung"] == rung and row["value"] is not None
                and row["outcome"] == outcome)


@fault("evidence", "verify", "record", source="G13")
def one_verdict_dropped(evidence: Evidence) -> None:
    """one seam of one case is no longer in the record"""
    evidence.edit(lambda record: record["verdicts"].remove(_row(record, "decoder")))


@fault("evidence", "verify", "record", source="G13")
def a_red_row_beside_its_green_copy(evidence: Evidence) -> None:
    """a verdict stands twice, once past its bound and once as it was"""
    def change(record):
        row = copy.deepcopy(_row(record, "decoder"))
        row.update(value=row["bound"] * 5)
        record["verdicts"].append(row)

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G13")
def a_verdict_twice(evidence: Evidence) -> None:
    """a green verdict counted twice"""
    evidence.edit(lambda record: record["verdicts"].append(copy.deepcopy(_row(record, "vision"))))


@fault("evidence", "verify", "record", source="G10")
def hard_case_left_out(evidence: Evidence) -> None:
    """one case is missing from one rung"""
    name = list(evidence.subject.cases)[-1]
    evidence.edit(lambda record: record.update(verdicts=[
        row for row in record["verdicts"] if (row["rung"], row["case"]) != ("decoder", name)]))


@fault("evidence", "verify", "record", source="G10")
def cases_under_invented_names(evidence: Evidence) -> None:
    """one case, repeated under other names, stands for all"""
    def change(record):
        cases = evidence.subject.cases
        first = next(iter(cases))
        kept = [row for row in record["verdicts"] if row["case"] not in cases or row["case"] == first]
        copies = [row | {"case": f"case-{number}"} for number in range(10) for row in kept if row["case"] == first]
        record["verdicts"] = kept + copies

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G06")
def bounds_widened_and_signed(evidence: Evidence) -> None:
    """all bounds of the record ten times as wide, and the certificate made from that"""
    def change(record):
        for bound in record["bounds"]:
            bound["limit"] *= 10

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G06")
def bound_of_one_row_widened(evidence: Evidence) -> None:
    """one row's own bound is wider than the file's, and its figure lies between"""
    def change(record):
        row = _row(record, "vision")
        row.update(value=row["bound"] * 2, bound=row["bound"] * 3)

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G06")
def all_bounds_widened_alike(evidence: Evidence) -> None:
    """bounds, rows' bounds and one figure widened together"""
    def change(record):
        for bound in record["bounds"]:
            bound["limit"] *= 10
        for row in record["verdicts"]:
            if row["bound"]:
                row["bound"] *= 10
        row = _row(record, "decoder")
        row.update(value=row["bound"] / 2)

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G13")
def figures_not_a_number(evidence: Evidence) -> None:
    """a figure inside a row is not a number, the row's value is"""
    def change(record):
        figures = _row(record, "decoder")["figures"]
        region = next(iter(next(iter(figures.values())).values()))
        region["rel_l2"] = "nan"

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G13")
def figures_beyond_their_bound(evidence: Evidence) -> None:
    """a distance inside a row is far past its bound, the row's value is not"""
    def change(record):
        figures = _row(record, "decoder")["figures"]
        for way in figures.values():
            for region in way.values():
                region["rel_l2"] = 0.5

    evidence.edit(change)


@fault("evidence", "verify", "record", source="G13")
def distance_below_zero(evidence: Evidence) -> None:
    """a distance below zero taken for small"""
    evidence.edit(lambda record: _row(record, "decoder").update(value=-1.0))


@fault("evidence", "verify", "record", source="G13")
def green_without_a_figure(evidence: Evidence) -> None:
    """a row passes and holds no figure at all"""
    evidence.edit(lambda record: _row(record, "decoder").update(value=None, bound=None, figures={}, metric=None))


@fault("evidence", "verify", "record", source="G13")
def seam_renamed(evidence: Evidence) -> None:
    """a seam under a name that no layer has"""
    evidence.edit(lambda record: _row(record, "decoder").update(seam="decoder.layers.99"))


@fault("evidence", "verify", "record", source="G09")
def sharp_twin_never_ran(evidence: Evidence) -> None:
    """the cache of the engine was not read: its rows are gone"""
    evidence.edit(lambda record: record.update(verdicts=[
        row for row in record["verdicts"] if not (row["rung"] == "engine" and row["seam"].startswith("kv."))]))


@fault("evidence", "verify", "policy", source="G06")
def policy_of_fewer_cases(evidence: Evidence) -> None:
    """a policy that asks for one case, in record and certificate"""
    evidence.edit(lambda record: record["policy"].update(min_cases=1))


@fault("evidence", "verify", "policy", source="G06")
def policy_excuses_unanswered(evidence: Evidence) -> None:
    """a policy that lets every seam be unanswered"""
    evidence.edit(lambda record: record["policy"].update(allow_unanswered=["*:*"]))


@fault("evidence", "verify", "certificate|bundle|record", source="G09")
def record_of_another_bundle(evidence: Evidence) -> None:
    """the record is of another bundle than its certificate"""
    def change(record):
        record["subject"]["bundle"]["digest"] = "c" * 64

    evidence.edit(change, sign=False)


@fault("evidence", "verify", "bundle", source="G09")
def record_of_no_bundle(evidence: Evidence) -> None:
    """the record names no bundle and is shown for one"""
    evidence.edit(lambda record: record["subject"].update(bundle=None))


@fault("evidence", "verify", "certificate|record", source="G13")
def certificate_without_a_digest(evidence: Evidence) -> None:
    """the certificate no longer binds the verdicts"""
    path = evidence.folder / "certificate.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    held["chain"] = [link for link in held["chain"] if link["name"] != "verdicts"]
    path.write_text(json.dumps(held), encoding="utf-8")


@fault("evidence", "verify", "oracle", source="G12")
def oracle_in_half(evidence: Evidence) -> None:
    """the oracle's values were rounded to fp16 and signed as float32"""
    evidence.retouch(lambda name, array: array.astype(np.float16).astype(np.float32) if array.dtype == np.float32 else array)


@fault("evidence", "verify", "oracle", source="O10")
def oracle_products_in_tf32(evidence: Evidence) -> None:
    """the oracle's activations carry 10-bit mantissas and say float32"""
    evidence.retouch(lambda name, array: (array.view(np.uint32) & 0xFFFFE000).view(np.float32)
                     if array.dtype == np.float32 else array)


@fault("evidence", "verify", "oracle", source="G03")
def oracle_of_zeros(evidence: Evidence) -> None:
    """every recorded activation is zero, and signed"""
    evidence.retouch(lambda name, array: np.zeros_like(array) if array.dtype == np.float32 else array)


@fault("evidence", "verify", "oracle", source="G13")
def oracle_holds_not_a_number(evidence: Evidence) -> None:
    """one recorded value is not a number, and signed"""
    def change(name, array):
        if array.dtype == np.float32:
            array = array.copy()
            array.flat[-1] = np.nan
        return array

    evidence.retouch(change)


@fault("evidence", "verify", "oracle", source="A19")
def oracle_with_another_attention(evidence: Evidence) -> None:
    """the oracle says it was recorded with a kernel that masks by itself"""
    evidence.manifest(lambda identity: identity.update(attention="flash_attention_2"))


@fault("evidence", "verify", "oracle", source="O10")
def oracle_on_another_device(evidence: Evidence) -> None:
    """the oracle says it was recorded on a GPU of a laptop"""
    evidence.manifest(lambda identity: identity.update(device="mps"))


@fault("evidence", "verify", "oracle", source="G03")
def oracle_of_another_geometry(evidence: Evidence) -> None:
    """the oracle was recorded with another rope theta"""
    evidence.manifest(lambda identity: identity["geometry"].update(rope_theta=1e6))


@fault("evidence", "verify", "oracle", source="G13")
def rollout_of_another_run(evidence: Evidence) -> None:
    """the recorded tokens are not those the recorded logits choose, and are signed"""
    evidence.retouch(lambda name, array: (array + 1) % 480 if name == "tokens" else array)


@fault("evidence", "verify", "oracle", source="G15")
def oracle_cut_short(evidence: Evidence) -> None:
    """a file of the oracle ends early"""
    path = evidence.activations(".safetensors")
    path.write_bytes(path.read_bytes()[:-64])
