"""Cases: one prompt with its image, decode length and why it is there; and its processed inputs, frozen once.

Cases must differ in kind, not in number: each has a `why`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint import read_toml
from harness.errors import HarnessError, within

CASES = Path(__file__).resolve().parent.parent / "ladders" / "cases.toml"


@dataclass(frozen=True)
class Turn:
    """One message. `image` is a path, or `white:448x448`, or `noise:448x448:seed` (width x height in pixels)."""

    role: str
    text: str
    image: str | None = None
    image_after_text: bool = False


@dataclass(frozen=True)
class Case:
    """A conversation to be continued by `decode` greedy tokens.

    An empty role means raw text without chat markup. `engine` says whether the bundle under test runs it too:
    torch rungs take any even grid, a shipped bundle one.
    """

    name: str
    why: str
    turns: tuple[Turn, ...]
    decode: int = 24
    engine: bool = True
    root: Path = field(default=Path("."), compare=False)

    @property
    def images(self) -> tuple[str, ...]:
        """Image references in order."""
        return tuple(turn.image for turn in self.turns if turn.image)


@dataclass(frozen=True)
class FrozenInputs:
    """Processed inputs of one case, made once and replayed by every engine.

    ids [T] int32 (HF ids, `<|image_pad|>` repeated); patches [P, F] float32 or None; grid (t, h, w) in patches or None;
    positions [3, T] int32: HF `get_rope_index` planes t, h, w.
    """

    case: str
    ids: np.ndarray
    positions: np.ndarray
    patches: np.ndarray | None = None
    grid: tuple[int, int, int] | None = None

    @property
    def length(self) -> int:
        """Prompt length T in tokens."""
        return int(self.ids.shape[0])


@dataclass(frozen=True)
class Rollout:
    """Greedy continuation: tokens [n] int32; margins [n] float32, the top-2 logit margins at each step.

    `ties` are the steps whose margin lies inside the reference's own noise when it was recorded.
    """

    tokens: np.ndarray
    margins: np.ndarray
    ties: tuple[int, ...] = ()


def load_cases(path: Path = CASES) -> tuple[Case, ...]:
    """Read cases.toml. Raises HarnessError for an unknown key, a repeated name, two images in one case, a lost file."""
    table = read_toml(path)
    with within(path):
        if set(table) != {"case"} or not table["case"]:
            raise HarnessError("must hold one or more [[case]] tables and nothing else")
        cases = tuple(_case(row, path.parent) for row in table["case"])
        names = [case.name for case in cases]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise HarnessError(f"case name {sorted(repeated)[0]!r} is used twice")
        return cases


def _case(row: dict[str, Any], root: Path) -> Case:
    known = {name for name in Case.__dataclass_fields__ if name != "root"}
    with within(row.get("name", "a case without name")):
        _known(row, known)
        for key in ("name", "why", "turns"):
            if not row.get(key):
                raise HarnessError(f"{key} is missing")
        turns = []
        for turn in row["turns"]:
            _known(turn, set(Turn.__dataclass_fields__))
            if "text" not in turn or "role" not in turn:
                raise HarnessError("a turn needs role and text")
            turns.append(Turn(**turn))
        case = Case(**{**row, "turns": tuple(turns), "root": root})
        if len(case.images) > 1:
            raise HarnessError(f"{len(case.images)} images; the contract of this port takes one image a conversation",
                               fix="split the case")
        if case.decode < 1:
            raise HarnessError(f"decode is {case.decode}; it must be at least 1")
        return case


def _known(row: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(row) - known)
    if unknown:
        raise HarnessError(f"unknown key {unknown[0]!r}", fix=f"known are {', '.join(sorted(known))}")
