"""What an oracle was recorded from, and what of a case decides its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.cases import Case
from harness.checkpoint import read_json
from harness.errors import HarnessError, within

SCHEMA = 1
EXACT = ("ieee", "none")
"""What torch calls products of float32 that are float32."""
DEVICES, KERNELS = ("cpu", "cuda"), ("sdpa", "eager")
"""Where and how an oracle may be recorded: other devices and attention kernels are known to differ, or to mask by
themselves."""
AGAIN = "remove the case's directory and run `harness record`; the other cases are kept"


@dataclass(frozen=True)
class Identity:
    """What all cases of one oracle have in common; two recordings that differ in any of it never share a directory.

    `geometry` is `Geometry.record()`, `precision` the TF32 and matmul flags as they stood, `tool` this tool's version.
    """

    checkpoint: str
    revision: str
    checkpoint_digest: str
    geometry: Mapping[str, Any]
    device: str
    attention: str
    transformers: str
    torch: str
    tool: str
    precision: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_record(cls, record: Any) -> Identity:
        """Inverse of `record`. Raises HarnessError naming the keys that are missing or unknown."""
        known, held = {one.name for one in fields(cls)}, set(record) if isinstance(record, dict) else set()
        if held != known:
            raise HarnessError(f"the identity is not one of ours ({', '.join(sorted(known ^ held))})")
        return cls(**record)

    @property
    def lossy(self) -> str:
        """What of this identity is narrower than float32, "" where nothing is."""
        if self.dtype != "float32":
            return f"dtype {self.dtype}"
        narrow = sorted(f"{name} in {kind}" for name, kind in self.precision.items() if kind not in EXACT)
        return narrow[0] if narrow else ""

    @property
    def doubtful(self) -> str:
        """What of this identity nobody vouches for, "" where all is known."""
        if self.device.split(":")[0] not in DEVICES:
            return f"on device {self.device!r}"
        return "" if self.attention in KERNELS else f"with attention {self.attention!r}"

    def differs(self, other: Identity) -> str | None:
        """The first field in which the other differs, in words, or None."""
        mine, theirs = self.record(), other.record()
        for name in mine:
            if mine[name] != theirs[name]:
                return f"{name.replace('_', ' ')} is {_short(mine[name])} there and {_short(theirs[name])} here"
        return None


def read_manifest(path: Path) -> Identity:
    """The identity in a manifest.json. Raises HarnessError for another schema or a damaged record."""
    with within(path):
        manifest = read_json(path)
        if need(manifest, "schema") != SCHEMA:
            raise HarnessError(f"schema {manifest['schema']!r} is not known, only {SCHEMA}",
                               fix="record it again with this version of the tool")
        return Identity.from_record(need(manifest, "identity"))


def definition(case: Case) -> dict[str, Any]:
    """What of a case decides its numbers: turns, decode length, and sha256 of its image files (None if not a file)."""
    images = {}
    for reference in case.images:
        path = case.root / reference
        images[reference] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"turns": [asdict(turn) for turn in case.turns], "decode": case.decode, "images": images}


def need(record: Any, key: str) -> Any:
    """`record[key]`, or a HarnessError that says which key is lacking."""
    if not isinstance(record, dict) or key not in record:
        raise HarnessError(f"the record lacks {key!r}", fix=AGAIN)
    return record[key]


def digest(value: Any) -> str:
    """sha256 of plain JSON types, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
