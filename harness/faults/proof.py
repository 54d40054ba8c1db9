"""A green run's record, certificate and oracle, to be tampered with; and everything that ought to notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import HarnessError
from harness.gate import certificate, verify
from harness.policy import policy_from
from harness.run import Run, run_from_record, write_json
from harness.store import Oracle
from harness.store.files import write_tensors
from harness.store.reader import case_digest
from harness.subject import Subject

BUNDLE = "b" * 64
"""Digest that the healthy record speaks for."""


class Evidence:
    """run.json and certificate.json in `folder`, the oracle of one case copied beside them."""

    def __init__(self, subject: Subject, run: Run, folder: Path) -> None:
        self.subject, self.folder, self.bundle_digest = subject, folder, BUNDLE
        self.case = next(iter(subject.cases))
        self.oracle = folder / "oracle"
        shutil.copytree(subject.oracle.path / "cases" / self.case, self.oracle / "cases" / self.case)
        shutil.copy(subject.oracle.path / "manifest.json", self.oracle)
        write_json(folder / "run.json", run.record())
        write_json(folder / "certificate.json", certificate(run, subject.policy))

    def edit(self, change: Callable[[dict[str, Any]], None], sign: bool = True) -> None:
        """Change the record and, with `sign`, make the certificate anew from what it says now."""
        record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        change(record)
        write_json(self.folder / "run.json", record)
        if sign:
            signed = certificate(run_from_record(record), policy_from(dict(record["policy"])))
            write_json(self.folder / "certificate.json", signed)

    def manifest(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the oracle's identity."""
        path = self.oracle / "manifest.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        change(record["identity"])
        path.write_text(json.dumps(record), encoding="utf-8")

    def part(self, name: str) -> Path:
        """A file of the copied case."""
        return self.oracle / "cases" / self.case / name

    def activations(self, suffix: str) -> Path:
        """A file of the first part that holds the decoder's values, whatever the store calls it."""
        return min(path for path in self.part("").glob(f"decoder*{suffix}"))

    def retouch(self, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
        """Change the recorded arrays and sign them again."""
        found = Oracle.open(self.oracle).case(self.case)
        tensors = {}
        for path in sorted(self.part("").glob("*.safetensors")):
            held = {name: change(name, array) for name, array in found._load(path.stem).items()}
            tensors[path.stem] = write_tensors(path, held)
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            write_json(path.with_suffix(".json"), record | {"tensors": tensors[path.stem]})
        case = json.loads(self.part("case.json").read_text(encoding="utf-8"))
        ordered = {part: tensors[part] for part in case["parts"]}
        case["digest"] = case_digest(self.case, case["definition"], ordered)
        write_json(self.part("case.json"), case)


def examine(evidence: Evidence) -> tuple[str, str] | None:
    """Who complains first, and how: record, certificate, policy, bundle or oracle; None where all is believed."""
    record, claimed = (json.loads((evidence.folder / name).read_text(encoding="utf-8"))
                       for name in ("run.json", "certificate.json"))
    subject = evidence.subject
    for sentence in verify(record, claimed, evidence.bundle_digest, subject.policy, subject.bounds):
        return _place(sentence), sentence
    if claimed["outcome"] != "PASS":
        return "record", claimed["reason"]
    try:
        oracle = Oracle.open(evidence.oracle, subject.checkpoint.digest, subject.geometry.record())
        changed = oracle.stale(subject.cases[evidence.case])
        if changed:
            return "oracle", changed
        found = oracle.case(evidence.case)
        _ = found.inputs, found.rollout, found.trace
        flaw = found.flaw()
        if flaw:
            return "oracle", flaw
    except HarnessError as error:
        return "oracle", str(error)
    return None


def _place(sentence: str) -> str:
    if "speaks for bundle" in sentence:
        return "bundle"
    if "policy" in sentence:
        return "policy"
    return "certificate" if sentence.startswith(("outcome", "reason", "rungs")) else "record"
