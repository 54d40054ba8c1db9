"""Outcomes and Verdicts; `worst` is the only place where outcomes combine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from harness.errors import ExitCode


class Outcome(str, Enum):
    """PASS: measured and right. SKIP: not asked. ERROR: could not measure. FAIL: measured and wrong."""

    PASS = "PASS"
    SKIP = "SKIP"
    ERROR = "ERROR"
    FAIL = "FAIL"


# A FAIL is knowledge and an ERROR the lack of it, so FAIL is worse: a run that found a fault must say so
# even where another rung could not be measured.
SEVERITY = {Outcome.PASS: 0, Outcome.SKIP: 1, Outcome.ERROR: 2, Outcome.FAIL: 3}
_EXIT = {Outcome.PASS: ExitCode.PASS, Outcome.SKIP: ExitCode.UNDECIDED,
         Outcome.ERROR: ExitCode.UNDECIDED, Outcome.FAIL: ExitCode.FAIL}


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome of a whole; nothing compared is an ERROR, never a PASS."""
    return max(outcomes, key=SEVERITY.__getitem__, default=Outcome.ERROR)


def exit_code(outcome: Outcome) -> ExitCode:
    """The process exit code of an outcome."""
    return _EXIT[outcome]


@dataclass(frozen=True)
class Verdict:
    """One claim about one seam of one case.

    `value` is the figure of `metric` that stood nearest to, or furthest past, its `bound`; `figures` holds all that was
    measured (plain floats, ints and strings), so that a reader elsewhere can judge again without the model.
    """

    rung: str
    case: str
    seam: str
    outcome: Outcome
    reason: str
    metric: str | None = None
    value: float | None = None
    bound: float | None = None
    cause: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Stable, readable name: `decoder[scene-211-decoder.layers.03]`."""
        return f"{self.rung}[{self.case}-{self.seam}]"

    def record(self) -> dict[str, Any]:
        """Plain JSON types; non-finite numbers as strings, because JSON has none."""
        return plain(vars(self))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Verdict:
        """Inverse of `record`. Raises KeyError, TypeError or ValueError where the record is not one of ours."""
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        known["outcome"] = Outcome(record["outcome"])
        for name in ("value", "bound"):
            if known.get(name) is not None:
                known[name] = float(known[name])
        return cls(**known)


def plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
