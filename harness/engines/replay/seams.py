"""Where a program holds the value of a seam: as the index beside an export of ours says, else as its structure shows.

An index entry names the node by its number in program order (`at`), which is the same in the shipped program and in its
DEBUG twin, and the shape of one token's row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.bundle import PROGRAM_HASH
from harness.checkpoint import read_json
from harness.engines.replay.program import Function, Value
from harness.engines.replay.taps import decoder_taps
from harness.engines.replay.taps_vision import vision_taps
from harness.errors import HarnessError, within

TOWERS = ("decoder", "vision")


@dataclass(frozen=True)
class Taps(Mapping[str, Mapping[str, Value]]):
    """Tower -> seam -> value; rows: tower -> seam -> shape of one token's row. how: tower -> where they are known from,
    in words."""

    places: Mapping[str, Mapping[str, Value]]
    rows: Mapping[str, Mapping[str, tuple[int, ...]]]
    how: Mapping[str, str]

    def __getitem__(self, tower: str) -> Mapping[str, Value]:
        return self.places[tower]

    def __iter__(self):
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def find_places(function: Function) -> dict[str, dict[str, int]]:
    """FX node -> {"at", "result"} of the value that is its output, in a program converted in DEBUG mode."""
    places = {value.id: {"at": node.at, "result": number} for node in function.nodes
              for number, value in enumerate(node.results)}
    return {name: places[value.id] for name, value in function.names.items() if value.id in places}


def taps_of(index: Path | None, assets: Mapping[str, tuple[Path, Function]]) -> Taps:
    """Seams of `{"decoder": (asset, function), ...}`. A program that the index was not made for is searched for them; one
    whose structure is another than the port's has none.

    Raises HarnessError for an index that cannot be read or names a node that the program lacks.
    """
    values: dict[str, dict[str, Value]] = {tower: {} for tower in TOWERS}
    rows: dict[str, dict[str, tuple[int, ...]]] = {tower: {} for tower in TOWERS}
    how = dict.fromkeys(TOWERS, "no program")
    table = read_json(index) if index is not None else {}
    for tower, (asset, function) in assets.items():
        part = table.get(tower) or {}
        known = part.get("program") == (asset / PROGRAM_HASH).read_bytes().hex()
        if not known or not any("at" in entry for entry in part["seams"].values()):
            values[tower], rows[tower], how[tower] = by_structure(tower, function)
            continue
        how[tower] = "the index of its export"
        nodes = {node.at: node for node in function.nodes}
        for name, entry in part["seams"].items():
            if "at" in entry:
                with within(index), within(name):
                    if entry["at"] not in nodes or not nodes[entry["at"]].results:
                        raise HarnessError(f"the program has no value of node {entry['at']}", fix="export the bundle again")
                    values[tower][name] = nodes[entry["at"]].results[entry.get("result", 0)]
                    rows[tower][name] = tuple(entry["row"])
    return Taps(values, rows, how)


def by_structure(tower: str, function: Function) -> tuple[dict[str, Value], dict[str, tuple[int, ...]], str]:
    """Values and rows of the seams that a program's structure shows, and in words how they are known; none, and why, for a
    structure that is not the port's."""
    try:
        found = (decoder_taps if tower == "decoder" else vision_taps)(function)
    except HarnessError as error:  # an unknown structure is no fault: its inner seams stay unanswered, with the reason
        return {}, {}, f"unknown: {error}"
    return found.values, found.rows, f"its structure ({len(found.checks)} checks hold)"
