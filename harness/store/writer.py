"""Writing an oracle: case by case, part by part; a killed run goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from harness.cases import Case
from harness.checkpoint import read_json
from harness.errors import HarnessError
from harness.store.files import clean, disk_errors, lock, read_tensors, safe_name, write_json, write_tensors
from harness.store.identity import SCHEMA, Identity, definition, digest, need, read_manifest
from harness.store.reader import OracleCase, case_digest


NOTE = "note.json"
"""What a run that is under way keeps for the next one; no part may be called so."""
MANIFEST, PENDING = "manifest.json", "pending.json"
"""The identity; and what stands for it until the digest of the checkpoint is known."""


class OracleWriter:
    """Adds cases to an oracle; one process at a time; a context manager that lets go of the directory.

    The digest of a large checkpoint takes as long as reading it. A new oracle need not wait for it: where `digest` will
    tell it, `identity` is without one, parts are written under `stamps` (what the files looked like, plain JSON), and
    `seal` comes before the first case is finished. Without a manifest or these very stamps, parts that are there are of
    nobody knows what, and are removed.

    Raises HarnessError where the directory holds an oracle of another identity, is being written by another process,
    or cannot be written.
    """

    def __init__(self, path: Path, identity: Identity, digest: Callable[[], str] | None = None,
                 stamps: Mapping[str, Any] | None = None) -> None:
        self.path, self.identity, self._digest = Path(path), identity, digest
        with disk_errors(self.path):
            (self.path / "cases").mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
        try:
            clean(self.path)
            if digest is None or (self.path / MANIFEST).exists():
                self.seal()
            else:
                self._begin({"identity": identity.record(), "stamps": dict(stamps or {})})
        except BaseException:
            self.close()
            raise

    def _begin(self, pending: dict[str, Any]) -> None:
        known = self.path / PENDING
        if known.exists() and read_json(known) == pending:
            return
        for folder in (self.path / "cases").iterdir():
            for leftover in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
                leftover.unlink()
        write_json(known, pending)

    def seal(self) -> None:
        """From here on cases may be finished: the identity is whole, and that of the manifest."""
        if self._digest is not None:
            self.identity, self._digest = replace(self.identity, checkpoint_digest=self._digest()), None
        manifest = self.path / MANIFEST
        if not manifest.exists():
            write_json(manifest, {"schema": SCHEMA, "identity": self.identity.record(),
                                  "created": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        (self.path / PENDING).unlink(missing_ok=True)
        difference = read_manifest(manifest).differs(self.identity)
        if difference:
            raise HarnessError(f"holds an oracle of another kind: {difference}", where=self.path,
                               fix="record into another directory, or remove this one")

    def close(self) -> None:
        """Let another process write."""
        os.close(self._lock)

    def __enter__(self) -> OracleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def complete(self, case: Case, seams: Collection[str] = ()) -> bool:
        """Whether this very case (turns, decode length, image bytes) is recorded with at least these seams."""
        try:
            found = OracleCase(self.path / "cases" / safe_name(case.name))
        except HarnessError:  # not there, or not whole: either way it is recorded anew
            return False
        return found.definition == definition(case) and set(seams) <= set(found.seams)

    def case(self, case: Case) -> CaseWriter:
        """Begin one case, or go on with it."""
        return CaseWriter(self.path / "cases" / safe_name(case.name), case)


class CaseWriter:
    """Parts of one case, then `finish`; until then the case does not count."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case, self.definition = folder, case, definition(case)
        self._tensors: dict[str, Any] = {}
        with disk_errors(folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "case.json").unlink(missing_ok=True)
            self._drop_other_definitions()

    def part(self, name: str, arrays: Mapping[str, np.ndarray], key: str = "") -> None:
        """Write one part: arrays of float32, float64, int32 or int64. key: what else than the case decides its values."""
        record = self.folder / f"{safe_name(name)}.json"
        record.unlink(missing_ok=True)
        self._tensors[name] = write_tensors(self.folder / f"{name}.safetensors", arrays)
        write_json(record, {"definition": digest(self.definition), "tensors": self._tensors[name], "key": key})

    def resume(self, name: str, tensors: Collection[str], key: str = "") -> bool:
        """Take over a part that an earlier run finished with exactly these tensors and this key; False where none is.

        A part in the directory is of this case and this identity: parts of other definitions are gone by now, and an
        oracle has one identity.
        """
        record = self.folder / f"{safe_name(name)}.json"
        held = read_json(record) if record.exists() else {}
        if not held or set(need(held, "tensors")) != set(tensors) or held.get("key", "") != key:
            return False
        self._tensors[name] = held["tensors"]
        return True

    def read(self, name: str, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """Arrays of a part that is there, of whatever key, each checked against its sha256."""
        held = need(read_json(self.folder / f"{safe_name(name)}.json"), "tensors")
        return read_tensors(self.folder / f"{name}.safetensors", held, tensors)

    def note(self, state: Mapping[str, Any]) -> None:
        """Keep plain values for the next run, should this one be killed; gone when the case is finished."""
        write_json(self.folder / NOTE, {"definition": digest(self.definition), "state": dict(state)})

    def noted(self) -> dict[str, Any] | None:
        """What an earlier run noted of this case, or None."""
        path = self.folder / NOTE
        return need(read_json(path), "state") if path.exists() else None

    def finish(self, facts: Mapping[str, Any] | None = None, parts: Sequence[str] | None = None) -> None:
        """Make the case count, with these parts in this order (default: all written or resumed); others are removed.

        `facts` are plain values about the run, times for example; no digest covers them.
        """
        tensors = {name: self._tensors[name] for name in (self._tensors if parts is None else parts)}
        write_json(self.folder / "case.json", {
            "case": {"name": self.case.name, "why": self.case.why, "engine": self.case.engine},
            "definition": self.definition, "parts": list(tensors), "facts": dict(facts or {}),
            "digest": case_digest(self.case.name, self.definition, tensors)})
        for path in (*self.folder.glob("*.json"), *self.folder.glob("*.safetensors")):
            if path.stem not in tensors and path.name != "case.json":
                path.unlink()

    def _drop_other_definitions(self) -> None:
        """Remove parts that were made when the case was defined otherwise."""
        for record in self.folder.glob("*.json"):
            if need(read_json(record), "definition") != digest(self.definition):
                record.unlink()
                record.with_suffix(".safetensors").unlink(missing_ok=True)
