"""Token by layer error maps: a dead token is a column, a broken layer an edge, a dead stretch of image a patch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.picture import short_name
from harness.report.plain import figure, integer, mapping, number, rows
from harness.report.png import NOTHING, data_uri, level, palette
from harness.run import Run

MOST_TOKENS, MOST_SEAMS = 1200, 400
MERGE = 2
ZERO = -11.9
"""Below this a logarithm stands for an error of zero: `harness.exhibits` cuts at 1e-12."""
_PICTURE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]+")
_LONGEST_PICTURE = 120_000
Values = list[list[float | None]]


@dataclass(frozen=True)
class Grid:
    """Image tokens back on their grid: rows x columns, a picture as a data URI, and the worst cell (row, column)."""

    title: str
    rows: int
    columns: int
    uri: str
    worst: tuple[int, int]
    value: str


@dataclass(frozen=True)
class Map:
    """One case's map: `uri` is one pixel a token and seam. Ranges are in tokens; `joined` tokens share a pixel."""

    case: str
    part: str
    way: str
    label: str
    unit: str
    seams: list[str]
    names: list[tuple[int, str]]
    tokens: int
    joined: int
    uri: str
    worst_token: int
    worst_seam: str
    worst_row: int
    worst: str
    length: int | None
    image: tuple[int, int] | None
    cut: int
    grids: list[Grid]
    thumbnail: str | None


LABELS = {("decoder", "accumulated"): "decoder, accumulated: the graph against the oracle",
          ("decoder", "local"): "decoder, local: each layer fed the oracle's input",
          ("decoder", "engine"): "inside the bundle: the engine against the twin",
          ("vision", "accumulated"): "vision tower, accumulated: patches of the graph against the oracle"}


@dataclass(frozen=True)
class Scale:
    """Decades that the colours of one way of measuring span, the same for every case."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    uri: str


def heat_maps(run: Run) -> tuple[dict[str, Scale], list[Map]]:
    """Scales by way, and the maps case by case; rows that do not fit together are left out."""
    cases = {row.get("name"): row for row in rows(run.cases) if isinstance(row.get("name"), str)}
    read = [(row, *_values(row)) for row in rows(run.heat)]
    read = [(row, seams, values) for row, seams, values in read if values and isinstance(row.get("case"), str)]
    names = list(dict.fromkeys(row["case"] for row, _, _ in read))
    scales = {way: _scale([values for row, _, values in read if row.get("way") == way])
              for way in dict.fromkeys(row.get("way") for row, _, _ in read) if isinstance(way, str)}
    order = {kind: number for number, kind in enumerate(LABELS)}
    read.sort(key=lambda one: (names.index(one[0]["case"]),
                               order.get((one[0].get("part", "decoder"), one[0].get("way")), len(order))))
    maps = [_map(row, seams, values, scales[row["way"]], mapping(cases.get(row["case"])))
            for row, seams, values in read if row.get("way") in scales]
    return scales, maps


def by_case(maps: Sequence[Map]) -> list[tuple[str, list[Map]]]:
    """The maps of each case together, in order."""
    found: dict[str, list[Map]] = {}
    for one in maps:
        found.setdefault(one.case, []).append(one)
    return list(found.items())


def _values(row: Mapping[str, Any]) -> tuple[list[str], Values]:
    """Seams and their rows, one value a token; a row of another length than the last is no row of this map."""
    names, lists = row.get("seams"), row.get("values")
    if not isinstance(names, list) or not isinstance(lists, list):
        return [], []
    pairs = [(str(name), values) for name, values in zip(names, lists) if isinstance(values, list) and values]
    if not pairs:
        return [], []
    width = len(pairs[-1][1])
    kept = [(name, [number(value) for value in values]) for name, values in pairs if len(values) == width]
    return [name for name, _ in kept], [values for _, values in kept]


def _scale(tables: Sequence[Values]) -> Scale:
    """From the first percentile of what is not zero to the largest, in half decades: exact tokens must not use it up."""
    finite = sorted(value for table in tables for values in table for value in values
                    if value is not None and ZERO < value < math.inf) or [0.0]
    low, high = math.floor(2 * finite[len(finite) // 100]) / 2, math.ceil(2 * finite[-1]) / 2
    high = max(high, low + 0.5)
    stride = max(1, math.ceil((high - low) / 8))
    ticks = [((power - low) / (high - low), f"1e{power}")
             for power in range(math.ceil(low), math.floor(high) + 1, stride)]
    return Scale(low, high, ticks, data_uri([bytes(range(0, 250))]))


def _map(row: Mapping[str, Any], seams: list[str], values: Values, scale: Scale, case: Mapping[str, Any]) -> Map:
    cut = max(0, len(seams) - MOST_SEAMS)
    seams, values = seams[:MOST_SEAMS], values[:MOST_SEAMS]
    tokens, joined = len(values[0]), math.ceil(len(values[0]) / MOST_TOKENS)
    worst_row, worst_token = _worst(values)
    pixels = [bytes(level(_most(line[at:at + joined]), scale.low, scale.high) for at in range(0, tokens, joined))
              for line in values]
    stride = math.ceil(len(seams) / 24)
    part = "vision" if row.get("part") == "vision" else "decoder"
    image, height, width = _image(case, tokens) if part == "decoder" else _patches(row, tokens)
    label = LABELS.get((part, row["way"]), f"{part}, {row['way'][:40]}")
    return Map(
        case=row["case"], part=part, way=row["way"], label=label, unit="patch" if part == "vision" else "token",
        seams=seams, tokens=tokens, joined=joined, uri=data_uri(pixels), cut=cut,
        names=[(at, short_name(name)[:24]) for at, name in enumerate(seams) if at % stride == 0],
        worst_token=worst_token, worst_row=worst_row, worst_seam=seams[worst_row],
        worst=error(values[worst_row][worst_token]),
        length=integer(case.get("length")) if part == "decoder" else None, image=image, thumbnail=_thumbnail(case),
        grids=_grids(seams, values if part == "decoder" else _by_rows(values, height, width), image, height, width, scale)
        if image else [])


def _most(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _worst(values: Values) -> tuple[int, int]:
    flat = ((value, at, token) for at, line in enumerate(values) for token, value in enumerate(line)
            if value is not None)
    _, row, token = max(flat, key=lambda item: item[0], default=(0.0, 0, 0))
    return row, token


def error(logarithm: float | None) -> str:
    """An error from its logarithm."""
    if logarithm is not None and logarithm <= ZERO:
        return "0"
    if logarithm is None or not math.isfinite(logarithm):
        return figure(logarithm if logarithm is None or logarithm > 0 else 0.0)
    return figure(10.0**max(-300.0, min(300.0, logarithm)))


def _image(case: Mapping[str, Any], tokens: int) -> tuple[tuple[int, int] | None, int, int]:
    """First and past-the-last image token, and the merged grid; None where the record's numbers do not fit together."""
    image = mapping(case.get("image"))
    grid, first, count = image.get("grid"), integer(image.get("first")), integer(image.get("count"))
    if first is None or not count or first + count > tokens or not isinstance(grid, list) or len(grid) != 2:
        return None, 0, 0
    height, width = (integer(side) or 0 for side in grid)
    if height * width == 4 * count:
        height, width = height // 2, width // 2
    return ((first, first + count), height, width) if height * width == count else (None, 0, 0)


def _patches(row: Mapping[str, Any], tokens: int) -> tuple[tuple[int, int] | None, int, int]:
    """The tower's own grid of patches; None where it does not fit the row."""
    grid = row.get("grid")
    height, width = (integer(side) or 0 for side in grid) if isinstance(grid, list) and len(grid) == 2 else (0, 0)
    good = height * width == tokens and height % MERGE == 0 and width % MERGE == 0 and tokens
    return ((0, tokens), height, width) if good else (None, 0, 0)


def _by_rows(values: Values, height: int, width: int) -> Values:
    """Patches row by row; a tower holds them block by block, MERGE x MERGE patches each (`harness.host.make_patches`)."""
    if not height:
        return values
    across = width // MERGE
    places = [((y // MERGE * across + x // MERGE) * MERGE + y % MERGE) * MERGE + x % MERGE
              for y in range(height) for x in range(width)]
    return [[line[place] for place in places] for line in values]


def _grids(seams: Sequence[str], values: Values, image: tuple[int, int], height: int, width: int,
           scale: Scale) -> list[Grid]:
    """Where on the image the error lies: over all layers, and at the first, the middle and the last of them."""
    chosen = dict.fromkeys((0, len(seams) // 2, len(seams) - 1))
    tables = [("worst of all layers", [_most([line[token] for line in values]) for token in range(*image)])]
    tables += [(seams[at], values[at][slice(*image)]) for at in chosen]
    return [_grid(title, table, height, width, scale) for title, table in tables]


def _grid(title: str, table: Sequence[float | None], height: int, width: int, scale: Scale) -> Grid:
    _, at = _worst([list(table)])
    pixels = [bytes(level(value, scale.low, scale.high) for value in table[row * width:(row + 1) * width])
              for row in range(height)]
    return Grid(title, height, width, data_uri(pixels), divmod(at, width), error(table[at]))


def _thumbnail(case: Mapping[str, Any]) -> str | None:
    """The case's picture, only where it is one inside the record: an address would be a request to the network."""
    found = mapping(case.get("image")).get("thumbnail")
    if isinstance(found, str) and len(found) <= _LONGEST_PICTURE and _PICTURE.fullmatch(found):
        return found
    return None


def colours() -> list[str]:
    """The scale's colours as hex, for the script that reads a value back from a pixel."""
    return ["".join(f"{part:02x}" for part in colour) for colour in palette()[:NOTHING]]
