"""Bounds with a `because`: how much error is healthy, for which rung, seam and engine, and from what that was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.checkpoint import read_toml
from harness.errors import HarnessError, within
from harness.geometry import SHAPE

BOUNDS = Path(__file__).resolve().parent.parent / "ladders" / "qwen3_vl.toml"
REPLAY = BOUNDS.with_name("qwen3_vl.replay.toml")
"""Bounds of the replay engines on the same model, kept apart because each engine and mode has its own."""
_REQUIRED = {"rung", "metric", "limit", "measured", "because", "date"}


@dataclass(frozen=True)
class Bound:
    """`limit` on `metric` (see `metrics.Distance`; prefixed `local.` or `accumulated.` where a rung measures both).

    `seams` and `engine` are patterns. `measured` is the largest benign value seen, `because` says what was varied.
    `calibrated` is the limit that calibration set; a file whose limit differs from it says why in `by_hand`.
    """

    rung: str
    metric: str
    limit: float
    measured: float
    because: str
    date: str
    seams: str = "*"
    engine: str = "*"
    calibrated: float | None = None
    by_hand: str = ""

    def covers(self, rung: str, seam: str, engine: str) -> bool:
        """Whether the bound speaks of this seam on this engine."""
        return self.rung == rung and fnmatchcase(seam, self.seams) and fnmatchcase(engine, self.engine)


class Bounds:
    """The bounds of one model. Where several cover a seam for a metric, the last in the file wins.

    made_for: name and shape (see `Geometry.shape`) of the model that they were measured on; empty where nobody says.
    """

    def __init__(self, bounds: Iterable[Bound], made_for: Mapping[str, Any] | None = None) -> None:
        self.all, self.made_for = tuple(bounds), dict(made_for or {})

    def foreign(self, shape: Mapping[str, int]) -> bool:
        """Whether they were measured on a model of another shape: its rounding is another, so they cannot blame this one."""
        return bool(self.made_for) and any(self.made_for[name] != size for name, size in shape.items())

    def at(self, rung: str, seam: str, engine: str = "") -> dict[str, Bound]:
        """Bounds by metric."""
        return {bound.metric: bound for bound in self.all if bound.covers(rung, seam, engine)}

    def limit(self, rung: str, metric: str, seam: str = "", engine: str = "") -> float:
        """One limit. Raises HarnessError where there is none: a rung without a bound decides nothing."""
        found = self.at(rung, seam, engine).get(metric)
        if found is None:
            raise HarnessError(f"no bound on {metric!r} for rung {rung!r} (engine {engine!r})", where="bounds",
                               fix="add one with its because")
        return found.limit

    def record(self) -> list[dict[str, Any]]:
        """Plain JSON types, in order."""
        return [dict(vars(bound)) for bound in self.all]

    def beside(self, other: Bounds) -> Bounds:
        """Both. Raises HarnessError where they were measured on different models."""
        if self.made_for != other.made_for:
            raise HarnessError("two files of bounds were made for different models", where="bounds")
        return Bounds([*self.all, *other.all], self.made_for)


def load_bounds(path: Path = BOUNDS) -> Bounds:
    """Read a bounds file. Raises HarnessError for a bound without its because, an unknown key, or a limit below measured."""
    table = read_toml(path)
    with within(path):
        if not table.get("bound") or not set(table) <= {"bound", "made_for"}:
            raise HarnessError("must hold one or more [[bound]] tables, [made_for] and nothing else")
        return Bounds([_bound(number, row) for number, row in enumerate(table["bound"], 1)],
                      _made_for(table["made_for"]) if "made_for" in table else None)


def _made_for(row: dict[str, Any]) -> dict[str, Any]:
    with within("made_for"):
        if set(row) != {"checkpoint", *SHAPE} or not all(type(row[name]) is int for name in SHAPE):
            raise HarnessError(f"must name the checkpoint and, as whole numbers, {', '.join(SHAPE)}",
                               fix="let harness calibrate write it")
        return row


def bounds_from(rows: Any) -> Bounds:
    """Bounds of a run record, as strictly read as a file's. Raises HarnessError where a row is none."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise HarnessError("must be a list of tables", where="bounds")
    with within("bounds"):
        try:
            return Bounds(_bound(number, row) for number, row in enumerate(rows, 1))
        except (TypeError, ValueError) as error:
            raise HarnessError(f"holds what no bound has ({error})") from error


def engine_key(engine: Any, mode: Any, hidden: Any, wide: bool = False) -> str:
    """What bounds on an engine belong to: engine, mode, activations where they are wide, and width."""
    return f"{engine}:{mode}{'-fp32' if wide else ''}:h{hidden}"


def _bound(number: int, row: dict[str, Any]) -> Bound:
    with within(f"bound {number} ({row.get('rung')} {row.get('metric')})"):
        unknown = sorted(set(row) - set(Bound.__dataclass_fields__))
        if unknown:
            raise HarnessError(f"unknown key {unknown[0]!r}")
        missing = sorted(key for key in _REQUIRED if row.get(key) in (None, ""))
        if missing:
            raise HarnessError(f"{missing[0]} is missing", fix="a bound says what it was measured from")
        if isinstance(row["date"], date):
            row = {**row, "date": row["date"].isoformat()}
        limit, measured = float(row["limit"]), float(row["measured"])
        if not (math.isfinite(limit) and 0 <= measured <= limit):
            raise HarnessError(f"limit {limit} must be finite and at least the measured {measured}")
        set_to = row.get("calibrated")
        if set_to is not None and float(set_to) != limit and not row.get("by_hand"):
            raise HarnessError(f"limit {limit} is not the calibrated {set_to}, and no by_hand says why",
                               fix='write by_hand = "why", or calibrate again')
        return Bound(**{**row, "limit": limit, "measured": measured})
