"""The policy: which rungs must answer, and which skips and unanswered seams a run may have and still pass."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.checkpoint import read_toml
from harness.errors import HarnessError, within
from harness.ladder import NAMES
from harness.verdict import Outcome, Verdict

POLICY = Path(__file__).resolve().parent.parent / "ladders" / "policy.toml"


@dataclass(frozen=True)
class Policy:
    """allow_skip: rungs that may be skipped. allow_unanswered: `rung:seam` patterns a porter's graph may lack.

    min_cases: cases that must have been judged on the decoder rung. modes: quantization modes that may pass.
    """

    name: str
    allow_skip: tuple[str, ...]
    allow_unanswered: tuple[str, ...]
    min_cases: int
    modes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
                for field in fields(self)}

    @property
    def digest(self) -> str:
        """sha256 of the record."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()

    def excuses(self, verdict: Verdict) -> bool:
        """Whether a SKIP verdict leaves its run able to pass. Only a SKIP can be excused, never an ERROR or a FAIL."""
        if verdict.outcome is not Outcome.SKIP:
            return False
        if verdict.rung in self.allow_skip:
            return True
        return any(fnmatchcase(f"{verdict.rung}:{verdict.seam}", pattern) for pattern in self.allow_unanswered)

    def stricter_or_equal(self, other: Policy) -> bool:
        """Whether everything this policy lets pass, `other` lets pass too."""
        return (set(self.allow_skip) <= set(other.allow_skip) and self.min_cases >= other.min_cases
                and set(self.allow_unanswered) <= set(other.allow_unanswered) and set(self.modes) <= set(other.modes))


def load_policy(path: Path = POLICY) -> Policy:
    """Read a policy file. Raises HarnessError for a missing or unknown key or an unknown rung."""
    table = read_toml(path)
    with within(path):
        return policy_from(table)


def policy_from(table: dict[str, Any]) -> Policy:
    """A Policy from a parsed file or a record."""
    names = {field.name for field in fields(Policy)}
    unknown, missing = sorted(set(table) - names), sorted(names - set(table))
    if unknown or missing:
        raise HarnessError(f"unknown key {unknown[0]!r}" if unknown else f"{missing[0]} is missing",
                           fix=f"a policy has exactly {', '.join(sorted(names))}")
    for key, value in table.items():
        good = {"name": isinstance(value, str), "min_cases": type(value) is int and value >= 1}
        if not good.get(key, isinstance(value, list) and all(isinstance(part, str) for part in value)):
            kind = {"name": "a text", "min_cases": "a whole number above 0"}.get(key, "a list of texts")
            raise HarnessError(f"{value!r} is not {kind}", where=key)
    strange = sorted(set(table["allow_skip"]) - set(NAMES))
    if strange:
        raise HarnessError(f"no rung is called {strange[0]!r}", where="allow_skip", fix=f"the rungs are {', '.join(NAMES)}")
    return Policy(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
