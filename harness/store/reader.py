"""Reading an oracle: lazily, every array checked against its sha256 when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.cases import Case, FrozenInputs, Rollout
from harness.checkpoint import read_json
from harness.errors import HarnessError, within
from harness.store.files import read_tensors, safe_name
from harness.store.identity import AGAIN, SCHEMA, Identity, definition, digest, need, read_manifest
from harness.trace import Trace

NARROW = {"bfloat16": 0xFFFF, "float16 or TF32": 0x1FFF}
"""Bits of a float32 that a narrower type lacks."""
CHOSEN = 0.01
"""How far below the largest logit a chosen token's may lie: a step is recorded from the cache, its logits in one pass."""
LEAST = 256
"""Values that must be there before their digits say anything."""
INPUTS, ROLLOUT = "inputs", "rollout"
"""The parts that are no activations; every other part belongs to the trace."""


JOINED = {"logits": 1, "kv.keys": None, "kv.values": None}
"""What is recorded in pieces, and the axis they are joined along (None: a new one): logits by blocks of the vocabulary,
the cache by layers."""


class Oracle:
    """An oracle on disk. exact: it holds every value (a sketch of one does not)."""

    manifest = "manifest.json"
    exact = True

    def __init__(self, path: Path, identity: Identity, digests: Mapping[str, str]) -> None:
        self.path, self.identity, self._digests = path, identity, dict(digests)

    @classmethod
    def open(cls, path: Path, checkpoint_digest: str | None = None, geometry: Mapping[str, Any] | None = None) -> Oracle:
        """Open for reading; with `checkpoint_digest` and `geometry` (`Geometry.record()`), refuse one of another checkpoint.

        Raises HarnessError where it is no oracle, of another schema, checkpoint or geometry, not of float32, recorded
        where nobody vouches for the numbers, or holds no whole case.
        """
        path = Path(path)
        if not (path / cls.manifest).is_file():
            if (path / "pending.json").is_file():
                raise HarnessError("holds no whole case", where=path, fix="run `harness record` to its end")
            raise HarnessError("no oracle there", where=path, fix="make one with `harness record`")
        identity = read_manifest(path / cls.manifest)
        if checkpoint_digest is not None and identity.checkpoint_digest != checkpoint_digest:
            raise HarnessError(f"oracle from another checkpoint revision: recorded from {identity.checkpoint} at "
                               f"{identity.revision} with digest {identity.checkpoint_digest[:12]}, the checkpoint "
                               f"given has {checkpoint_digest[:12]}", where=path,
                               fix="record it again for this checkpoint")
        if geometry is not None and identity.geometry != geometry:
            changed = next((name for name in geometry if identity.geometry.get(name) != geometry[name]), "its keys")
            raise HarnessError(f"was recorded with {changed} {identity.geometry.get(changed)!r}, the checkpoint given says "
                               f"{geometry.get(changed)!r}", where=path, fix="record it again for this checkpoint")
        if identity.doubtful:
            raise HarnessError(f"was recorded {identity.doubtful}, which is no reference", where=path,
                               fix="record it again with this tool")
        if identity.lossy:
            raise HarnessError(f"was not recorded in true float32: {identity.lossy}", where=path,
                               fix="record it again with this tool")
        digests = {}
        for file in sorted(path.glob("cases/*/case.json")):
            with within(file):
                digests[file.parent.name] = need(read_json(file), "digest")
        if not digests:
            raise HarnessError("holds no whole case", where=path, fix="run `harness record` to its end")
        return cls(path, identity, digests)

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the whole cases, sorted."""
        return tuple(self._digests)

    @property
    def digest(self) -> str:
        """sha256 over schema, identity and the digests of all cases; the time of recording is left out."""
        return digest([SCHEMA, self.identity.record(), self._digests])

    def case(self, name: str) -> OracleCase:
        """One whole case. Raises HarnessError where there is none of that name, or its records were changed."""
        if name not in self._digests:
            raise HarnessError("the oracle has no such case", where=f"{self.path}: {name}",
                               fix=f"it has {', '.join(self.cases)}")
        found = self._case(self.path / "cases" / name)
        if found.digest != self._digests[name]:
            raise HarnessError("the case was recorded anew since the oracle was opened", where=found.folder)
        return found

    def _case(self, folder: Path) -> OracleCase:
        return OracleCase(folder)

    def stale(self, case: Case) -> str | None:
        """Why the record no longer stands for this case (changed turns, decode length or image), or None."""
        if case.name not in self._digests:
            return "it is not recorded"
        now, then = definition(case), self.case(case.name).definition
        changed = [key for key in now if now[key] != then.get(key)]
        return f"its {' and '.join(changed)} changed since it was recorded" if changed else None


class OracleCase:
    """One recorded case; tensors are read and verified when first asked for.

    `definition` is `store.definition` of the case as it was recorded, `facts` plain values about the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        with within(folder / "case.json"):
            record = read_json(folder / "case.json")
            self.definition: dict[str, Any] = need(record, "definition")
            self.case_record: dict[str, Any] = {**need(record, "case"), **self.definition}
            self.facts: dict[str, Any] = need(record, "facts")
            self.digest: str = need(record, "digest")
            self._tensors = {part: need(read_json(folder / f"{safe_name(part)}.json"), "tensors")
                             for part in need(record, "parts")}
            if self.digest != case_digest(self.name, self.definition, self._tensors):
                raise HarnessError("its records are not those that were written", fix=AGAIN)

    @property
    def seams(self) -> tuple[str, ...]:
        """Names in the trace: seams, `kv.keys`, `kv.values`."""
        names = [name for part in self._trace_parts() for name in self._tensors[part]]
        whole = [name for name in names if joined(name) is None]
        return (*whole, *(name for name in JOINED if any(joined(piece) == name for piece in names)))

    @cached_property
    def inputs(self) -> FrozenInputs:
        """The frozen processed inputs."""
        held = self._load(INPUTS)
        grid = tuple(held["grid"].tolist()) if "grid" in held else None
        return FrozenInputs(self.name, held["ids"], held["positions"], held.get("patches"), grid)

    @cached_property
    def rollout(self) -> Rollout:
        """Greedy tokens, margins and ties."""
        held = self._load(ROLLOUT)
        return Rollout(held["tokens"], held["margins"], tuple(held["ties"].tolist()))

    @cached_property
    def positions(self) -> np.ndarray:
        """Planes t, h, w [3, T + n] int32 over prompt and rollout."""
        return self._load(ROLLOUT)["positions"]

    @property
    def noise(self) -> float:
        """Largest difference between the logits of one forward and of cached steps: the reference's own noise."""
        return float(self._load(ROLLOUT)["noise"][0])

    @cached_property
    def trace(self) -> Trace:
        """All seams over prompt + rollout (logits row i predicts token i + 1), and `kv.keys`, `kv.values`.

        Read and verified once, then held as long as this object; `load` reads a part of it and holds nothing.
        """
        return self.load(self.seams)

    def load(self, seams: Sequence[str]) -> Trace:
        """Only these seams; those that were not recorded stay lacking."""
        wanted, arrays = set(seams), {}
        for part in self._trace_parts():
            arrays |= self._load(part, wanted)
        for name, axis in JOINED.items():
            pieces = [arrays.pop(piece) for piece in list(arrays) if joined(piece) == name]
            if pieces:
                arrays[name] = np.stack(pieces) if axis is None else np.concatenate(pieces, axis)
        return Trace(arrays, dict(self.facts))

    def lazily(self) -> Mapping[str, np.ndarray]:
        """The trace, each array read (and verified) when it is asked for, and not kept."""
        return _Lazily(self)

    def rounded(self) -> str | None:
        """Which narrower type all values of the final norm would fit, or None: float32 values use all their digits."""
        held = self.load(("decoder.norm",)).get("decoder.norm")
        if held is None or held.dtype != np.float32 or held.size < LEAST:
            return None
        bits = held.view(np.uint32)
        return next((name for name, tail in NARROW.items() if not (bits & tail).any()), None)

    def flaw(self) -> str | None:
        """Why this case is no reference, in one sentence, or None: rounded values, values that are not finite, tokens
        that its own logits do not choose."""
        narrow = self.rounded()
        if narrow:
            return f"every recorded value fits {narrow}, so it was not recorded in float32"
        held = self.load(("decoder.norm", "logits"))
        for name, array in held.items():
            if not np.isfinite(array).all():
                return f"{name} holds values that are not finite"
        tokens, first = self.rollout.tokens, self.inputs.length - 1
        rows = held.get("logits", np.empty((0, 0)))[first:first + len(tokens)]
        lost = [step for step, (row, token) in enumerate(zip(rows, tokens)) if row.max() - row[token] > CHOSEN]
        return f"its token at step {lost[0]} is not the one that its logits choose" if lost else None

    def _trace_parts(self) -> Iterator[str]:
        return (part for part in self._tensors if part not in (INPUTS, ROLLOUT))

    def _load(self, part: str, wanted: set[str] | None = None) -> dict[str, np.ndarray]:
        records = self._tensors.get(part)
        if records is None:
            raise HarnessError(f"the case has no part {part!r}", where=self.folder, fix=AGAIN)
        names = [name for name in records if wanted is None or (joined(name) or name) in wanted]
        return read_tensors(self.folder / f"{part}.safetensors", records, names) if names else {}


class _Lazily(Mapping[str, np.ndarray]):
    def __init__(self, case: OracleCase) -> None:
        self._case, self._seams = case, dict.fromkeys(case.seams)

    def __getitem__(self, seam: str) -> np.ndarray:
        if seam not in self._seams:
            raise KeyError(seam)
        return self._case.load((seam,))[seam]

    def __contains__(self, seam: object) -> bool:
        return seam in self._seams

    def __iter__(self) -> Iterator[str]:
        return iter(self._seams)

    def __len__(self) -> int:
        return len(self._seams)


def joined(name: str) -> str | None:
    """What a piece belongs to: `kv.keys.07` (a layer) to `kv.keys`, `logits.003` (a block of the vocabulary) to `logits`."""
    whole, _, number = name.rpartition(".")
    return whole if number.isdecimal() and whole in JOINED else None


def case_digest(name: str, defined: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """What stands for one case: its name, its definition and the sha256 of every tensor."""
    return digest([name, defined, tensors])
