"""Sketches of oracles on disk: small enough for git and a model card, judged from like an oracle, with intervals.

    <sketch>/sketch.json                          schema, Identity of the oracle, its digest
    <sketch>/cases/<case>/{inputs,rollout,sketch}.safetensors, .json and case.json, as in an oracle

Exactly kept: ids, positions, patches (deflated), grid, tokens, margins, ties, and the TOP largest logits of every
position. Of every other activation a `harness.sketch.Sketch` is kept, the cache layer by layer.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.cases import FrozenInputs
from harness.checkpoint import read_json
from harness.errors import HarnessError, within
from harness.sketch import Sketch, fingerprint, make, seed_of
from harness.store.files import disk_errors, lock, write_json, write_tensors
from harness.store.identity import SCHEMA, need
from harness.store.reader import INPUTS, ROLLOUT, Oracle, OracleCase, case_digest
from harness.trace import Trace

MANIFEST, PART = "sketch.json", "sketch"
TOP = 64
"""Largest logits kept of each position: whose choice lies outside them is no tie."""
_FLAT = ("squares", "tokens", "whole")


def open_oracle(path: Path, checkpoint_digest: str | None = None, geometry: Mapping[str, Any] | None = None) -> Oracle:
    """An oracle or a sketch of one, whichever `path` is. Raises HarnessError as `Oracle.open` does."""
    kind = SketchOracle if (Path(path) / MANIFEST).is_file() else Oracle
    return kind.open(Path(path), checkpoint_digest, geometry)


class SketchOracle(Oracle):
    """A sketch in the place of an oracle; `of` is the digest of the oracle that it was made of."""

    manifest = MANIFEST
    exact = False

    @classmethod
    def open(cls, path: Path, checkpoint_digest: str | None = None,
             geometry: Mapping[str, Any] | None = None) -> SketchOracle:
        """As `Oracle.open`. Raises HarnessError also for a sketch that was made with other projections."""
        found = super().open(path, checkpoint_digest, geometry)
        if read_json(found.path / MANIFEST).get("projections") != fingerprint():
            raise HarnessError("was made with other projections than this version's", where=path,
                               fix="sketch the oracle again with this version of the tool")
        return found

    @cached_property
    def of(self) -> str:
        """Digest of the oracle."""
        return str(need(read_json(self.path / MANIFEST), "of"))

    def _case(self, folder: Path) -> SketchCase:
        return SketchCase(folder, self.of)


class SketchCase(OracleCase):
    """One sketched case: `trace` gives a Sketch at every seam."""

    def __init__(self, folder: Path, of: str) -> None:
        super().__init__(folder)
        self._of = of

    @cached_property
    def seams(self) -> tuple[str, ...]:
        """Names in the trace: seams, and `kv.keys.NN`, `kv.values.NN` of every layer."""
        return tuple(self._load(PART, {"names"})["names"].tobytes().decode().split("\n"))

    @cached_property
    def inputs(self) -> FrozenInputs:
        """The frozen processed inputs."""
        held = self._load(INPUTS)
        if "grid" not in held:
            return FrozenInputs(self.name, held["ids"], held["positions"])
        try:
            packed = zlib.decompress(held["patches.zlib"].tobytes())
            patches = np.frombuffer(packed, dtype="<f4").reshape(held["patches.shape"]).astype(np.float32)
        except (zlib.error, ValueError) as error:
            raise HarnessError(f"its patches are damaged ({error})", where=self.folder) from error
        return FrozenInputs(self.name, held["ids"], held["positions"], patches, tuple(held["grid"].tolist()))

    def load(self, seams: Sequence[str]) -> Trace:
        """Sketches of these seams."""
        held, places = self._load(PART), {part: 0 for part in _FLAT}
        wanted, found = set(seams), {}
        for row, name in enumerate(self.seams):
            shape = tuple(int(side) for side in held["shapes"][row] if side >= 0)
            counts = dict(zip(_FLAT, (shape[0], shape[0] * int(held["sizes"][row, 0]), int(held["sizes"][row, 1]))))
            parts = {part: held[part][places[part]:places[part] + counts[part]] for part in _FLAT}
            places = {part: places[part] + counts[part] for part in _FLAT}
            if name in wanted:
                found[name] = Sketch(shape, seed_of(self._of, self.name, name), parts["squares"],
                                     parts["tokens"].reshape(shape[0], -1), parts["whole"], float(held["largest"][row]))
        return Trace(found, dict(self.facts))

    def flaw(self) -> str | None:
        """None: values are looked at before an oracle is sketched."""
        return None

    def logits(self, rows: slice) -> np.ndarray:
        """Logits [n, V] of some positions: the TOP largest as recorded, in the place of every other the least of them."""
        held = self._load(PART, {"top.values", "top.ids", "vocab"})
        values, ids = held["top.values"][rows], held["top.ids"][rows]
        whole = np.repeat(values.min(axis=1, keepdims=True), int(held["vocab"][0]), axis=1)
        np.put_along_axis(whole, ids.astype(np.int64), values, axis=1)
        return whole


def write_sketch(oracle: Oracle, folder: Path) -> str:
    """Sketch every case of an oracle into a new `folder`, whole or not at all; returns a sentence on how small it is.

    Raises HarnessError where the folder is there, the oracle is a sketch itself or was not recorded in float32, or the
    disk refuses.
    """
    if not oracle.exact:
        raise HarnessError("is a sketch already", where=oracle.path, fix="give a recorded oracle")
    if folder.exists():
        raise HarnessError("is already there", where=folder, fix="give another folder, or remove it")
    draft = folder.with_name(f".{folder.name}.unfinished")
    with disk_errors(folder.parent):
        draft.mkdir(parents=True, exist_ok=True)
    held = lock(draft)
    try:
        for leftover in draft.iterdir():  # of a run that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_json(draft / MANIFEST, {"schema": SCHEMA, "identity": oracle.identity.record(), "of": oracle.digest,
                                      "projections": fingerprint()})
        for name in oracle.cases:
            with within(name):
                _write_case(oracle.case(name), oracle.digest, draft / "cases" / name)
        with disk_errors(folder.parent):
            os.rename(draft, folder)
    finally:
        os.close(held)
        shutil.rmtree(draft, ignore_errors=True)
    before, after = (sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
                     for root in (oracle.path, folder))
    return f"{len(oracle.cases)} cases sketched in {folder}, {after / 1e6:.1f} MB of {before / 1e6:.1f} MB " \
           f"({before / after:.0f} x smaller)"


def _write_case(case: OracleCase, of: str, folder: Path) -> None:
    narrow = case.flaw()
    if narrow:
        raise HarnessError(f"every recorded value fits {narrow}, so it was not recorded in float32")
    folder.mkdir(parents=True)
    parts = {INPUTS: _inputs(case.inputs), ROLLOUT: case._load(ROLLOUT), PART: _sketches(case, of)}
    tensors: dict[str, Any] = {}
    for part, arrays in parts.items():
        tensors[part] = write_tensors(folder / f"{part}.safetensors", arrays)
        write_json(folder / f"{part}.json", {"definition": None, "tensors": tensors[part]})
    record = {key: case.case_record[key] for key in ("name", "why", "engine") if key in case.case_record}
    write_json(folder / "case.json", {"case": record, "definition": case.definition, "parts": list(tensors),
                                      "facts": {}, "digest": case_digest(case.name, case.definition, tensors)})


def _inputs(inputs: FrozenInputs) -> dict[str, np.ndarray]:
    arrays = {"ids": inputs.ids, "positions": inputs.positions}
    if inputs.patches is not None:
        packed = zlib.compress(np.ascontiguousarray(inputs.patches, dtype="<f4").tobytes(), 9)
        arrays |= {"grid": np.array(inputs.grid, dtype=np.int32), "patches.zlib": np.frombuffer(packed, np.uint8),
                   "patches.shape": np.array(inputs.patches.shape, dtype=np.int64)}
    return arrays


def _sketches(case: OracleCase, of: str) -> dict[str, np.ndarray]:
    """All seams of a case, read one after the other."""
    made: dict[str, Sketch] = {}
    top: dict[str, np.ndarray] = {}
    for seam in case.seams:
        for name, array in _split(seam, case.load((seam,))[seam]).items():
            with within(name):
                # Logits are judged for every mode of quantization, and a vocabulary is wide enough to afford it.
                made[name] = make(array, seed_of(of, case.name, name), sharp=name == "logits")
            if name == "logits":
                top = _top(array)
    rows = list(made.values())
    shapes = np.full((len(rows), 4), -1, dtype=np.int64)
    for row, one in enumerate(rows):
        shapes[row, :len(one.shape)] = one.shape
    return top | {
        "names": np.frombuffer("\n".join(made).encode(), np.uint8), "shapes": shapes,
        "sizes": np.array([(one.tokens.shape[1], len(one.whole)) for one in rows], dtype=np.int64),
        "largest": np.array([one.largest for one in rows]),
        **{part: np.concatenate([getattr(one, part).ravel() for one in rows]) for part in _FLAT}}


def _split(seam: str, array: np.ndarray) -> Mapping[str, np.ndarray]:
    """A cache [L, kv_heads, T, head_dim] as one seam a layer, [T, kv_heads, head_dim]; any other seam as it is."""
    if not seam.startswith("kv."):
        return {seam: array}
    return {f"{seam}.{layer:02d}": state.transpose(1, 0, 2) for layer, state in enumerate(array)}


def _top(logits: np.ndarray) -> dict[str, np.ndarray]:
    count = min(TOP, logits.shape[1])
    ids = np.argpartition(logits, -count, axis=1)[:, -count:]
    return {"top.values": np.take_along_axis(logits, ids, axis=1), "top.ids": ids.astype(np.int32),
            "vocab": np.array([logits.shape[1]], dtype=np.int64)}
