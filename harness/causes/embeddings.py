"""What enters the towers: patches and their positions, text rows and image rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene
from harness.causes.linear import narrowed

_PATCH, _TABLE = "model.visual.patch_embed.proj", "model.visual.pos_embed.weight"
_TEXT = "model.language_model.embed_tokens.weight"


def guesses(scene: Scene) -> Iterator[Guess]:
    """For the embeddings of both towers."""
    if scene.seam == "vision.embed" and scene.patches is not None and scene.grid:
        yield from _patches(scene)
    elif scene.seam == "decoder.embed":
        yield from _rows(scene)


def _rows(scene: Scene) -> Iterator[Guess]:
    right, table, ids = scene.expected, scene.weight(_TEXT), scene.ids
    if len(ids) != len(right):
        return
    for words, row in (("image tokens keep the text row of their placeholder", scene.geometry.image_token),
                       ("image tokens take the last text row: their ids are clamped into the text table", -1)):
        as_text = right.copy()
        as_text[scene.image] = table[row]
        yield Guess(words, as_text)
    nothing = right.copy()
    nothing[scene.image] = 0
    yield Guess("image rows are not put in", nothing)
    for by in (1, -1):
        other = right.copy()
        other[~scene.image] = table[np.clip(ids[~scene.image] + by, 0, len(table) - 1)]
        yield Guess(f"text rows are those of the id {by:+d}", other)
    yield Guess("rows are multiplied by the root of the width, as another family does", right * right.shape[1] ** 0.5)


def _patches(scene: Scene) -> Iterator[Guess]:
    weight, bias, flat = scene.weight(f"{_PATCH}.weight"), scene.weight(f"{_PATCH}.bias"), scene.patches.astype(np.float64)
    kernel = weight.reshape(len(weight), -1)
    plain = flat @ kernel.T
    positions = scene.expected - plain - bias
    yield Guess("the patch embedding's bias is missing", plain + positions)
    yield Guess("the position embedding is not added", plain + bias)
    yield from (Guess(f"the patch kernel {words}", flat @ other.reshape(kernel.shape).T + bias + positions)
                for words, other in _kernels(weight))
    yield from (Guess(f"the position embedding {words}", plain + bias + other) for words, other in _positions(scene, positions))
    rest = scene.wrong - bias - positions
    factor = float((rest * plain).sum() / max((plain * plain).sum(), 1e-300))
    yield Guess(f"the patch embedding is multiplied by {factor:.6g} before positions are added",
                factor * (plain + bias) + positions)
    yield Guess(f"the patches are multiplied by {factor:.6g}", factor * plain + bias + positions)


def _kernels(weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """weight [C, colours, time, y, x]; what is laid out otherwise meets the patches' (colour, time, y, x) wrongly."""
    if weight.ndim != 5:
        return
    first = weight.copy()
    first[:, :, 1:] = 0
    yield "has lost all but its first temporal slice", first
    yield "repeats its first temporal slice", np.repeat(weight[:, :, :1], weight.shape[2], axis=2)
    yield "takes colours in reverse order", weight[:, ::-1]
    yield "takes rows and columns of a patch exchanged", weight.swapaxes(3, 4)
    yield "takes features as (time, y, x, colour)", weight.transpose(0, 2, 3, 4, 1)
    yield "takes features as (time, colour, y, x)", weight.transpose(0, 2, 1, 3, 4)
    # The other way round: patches laid out so, met by a kernel that is not.
    shape = weight.shape[1:]
    for words, axes in (("meets features laid out as (time, y, x, colour)", (1, 2, 3, 0)),
                        ("meets features laid out as (time, colour, y, x)", (1, 0, 2, 3))):
        order = np.arange(weight[0].size).reshape(shape).transpose(axes).ravel()
        other = np.empty_like(weight.reshape(len(weight), -1))
        other[:, order] = weight.reshape(len(weight), -1)
        yield words, other


def _positions(scene: Scene, right: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """right: interpolated positions [P, C], by merge blocks."""
    (rows, columns), merge = scene.grid, scene.geometry.merge
    raster = np.arange(rows * columns).reshape(rows, columns)
    blocks = raster.reshape(rows // merge, merge, columns // merge, merge).transpose(0, 2, 1, 3).ravel()
    spread = np.empty_like(right)
    spread[blocks] = right
    yield "stands in raster order where merge blocks are expected", spread
    if rows == columns:
        yield "is transposed: rows and columns exchanged", spread[raster.T.ravel()][blocks]
    table = scene.weight(_TABLE)
    side = round(len(table) ** 0.5)
    for words, place in (("is resampled with align_corners=False", lambda count: (np.arange(count) + 0.5) * side / count - 0.5),
                         ("is resampled at i * side / count", lambda count: np.arange(count) * side / count)):
        yield words, _resampled(table, side, place(rows), place(columns))[blocks]
    nearest = [np.rint(np.arange(count) * (side - 1) / max(count - 1, 1)) for count in (rows, columns)]
    yield "is not interpolated: the nearest row is taken", _resampled(table, side, *nearest)[blocks]
    aligned = [np.arange(count) * (side - 1) / max(count - 1, 1) for count in (rows, columns)]
    yield from ((f"is rounded to {kind}", held) for kind, held in narrowed(_resampled(table, side, *aligned)[blocks]))
    yield from ((f"is resampled from a table rounded to {kind}", _resampled(held, side, *aligned)[blocks])
                for kind, held in narrowed(table))


def _resampled(table: np.ndarray, side: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear at the given places of a square table [side^2, C] -> [rows * columns, C], row by row."""
    square = table.reshape(side, side, -1)

    def along(values: np.ndarray, places: np.ndarray) -> np.ndarray:
        places = np.clip(places, 0, side - 1)
        low = np.floor(places).astype(int)
        part = (places - low).reshape(-1, *[1] * (values.ndim - 1))
        return values[low] * (1 - part) + values[np.minimum(low + 1, side - 1)] * part

    return along(along(square, rows).swapaxes(0, 1), columns).swapaxes(0, 1).reshape(len(rows) * len(columns), -1)
