"""Patterns that need no formula: rows moved, channels scaled or lost, values rounded; at any seam."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene

SHIFTS = (1, -1, 2, -2)
FEW = 0.25
"""Channels that differ are named where they are at most this share of all."""
PART = 0.8
"""The same for tokens and heads."""


def guesses(scene: Scene) -> Iterator[Guess]:
    """Moves of rows, zeros, channels and factors; last what is fitted channel by channel."""
    yield from _moved(scene)
    right, wrong = scene.expected, scene.wrong.astype(np.float64)
    yield Guess("nothing is computed: all values are zero", np.zeros_like(right))
    yield Guess("the sign is wrong", -right)
    yield from _factors(scene)
    yield from _channels(scene)
    if len(right) > 8:
        constant = right + (wrong - right).mean(0, keepdims=True)
        scale = (wrong * right).sum(0) / np.maximum((right * right).sum(0), 1e-300)
        # A fit of one number a channel explains more by itself; it must leave clearly less to be named.
        if scene.left(constant) < scene.enough / 10:
            yield Guess("a constant is added to every token, as a bias lost or doubled does", constant)
        if scene.left(right * scale) < scene.enough / 10:
            yield Guess("every channel is multiplied by a factor of its own, as scales on the wrong axis or a wrong norm "
                        "weight do", right * scale)


def noise(scene: Scene) -> str | None:
    """What is said where no mistake explains the error and it is nowhere larger than a narrow float's rounding."""
    apart = np.abs(scene.wrong - scene.expected)
    size = np.abs(scene.expected) + 0.01 * np.abs(scene.expected).max()
    if not (apart > 0).mean() > 0.1:
        return None
    for name, unit in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        if (apart <= 4 * unit * size).mean() > 0.999 and apart.max() > 0.1 * unit * np.abs(scene.expected).max():
            return f"nowhere larger than {name} rounding and everywhere there: something here is computed or held in {name}"
    return None


def extent(scene: Scene) -> str:
    """Where in the array the error stands, if that is a part only: tokens, heads; "" where it is everywhere."""
    apart = np.square(scene.wrong - scene.expected)
    size = np.square(scene.expected)
    words = []
    for axis, name in ((0, "token"), (1, "head")):
        if axis == 1 and apart.ndim != 3:
            continue
        others = tuple(range(axis)) + tuple(range(axis + 1, apart.ndim))
        error = np.sqrt(apart.sum(others))
        off = np.flatnonzero(error > np.maximum(1e-3 * error.max(), 5e-6 * np.sqrt(size.sum(others))))
        if 0 < len(off) <= PART * apart.shape[axis]:
            words.append(_ranged(off, name))
    return ", ".join(words)


def _ranged(places: np.ndarray, name: str) -> str:
    if len(places) == 1:
        return f"{name} {places[0]}"
    if len(places) == places[-1] - places[0] + 1:
        return f"{name}s {places[0]} to {places[-1]}"
    few = ", ".join(map(str, places[:4]))
    return f"{len(places)} {name}s: {few}{' ...' if len(places) > 4 else ''}"


def _factors(scene: Scene) -> Iterator[Guess]:
    right, wrong = scene.expected, scene.wrong.astype(np.float64)
    parts = {"everything is": np.ones(len(right), bool)}
    if scene.seam.startswith(("decoder.", "logits")) and len(scene.image) == len(right) and scene.image.any():
        parts |= {"image tokens are": scene.image, "text tokens are": ~scene.image}
    for words, rows in parts.items():
        factor = float((wrong[rows] * right[rows]).sum() / max((right[rows] * right[rows]).sum(), 1e-300))
        scaled = right.copy()
        scaled[rows] *= factor
        yield Guess(f"{words} multiplied by {factor:.6g}", scaled)


def _moved(scene: Scene) -> Iterator[Guess]:
    right, image = scene.expected, scene.image
    for shift in SHIFTS:
        words = f"rows stand {abs(shift)} {'late' if shift > 0 else 'early'}"
        yield Guess(words, np.roll(right, shift, axis=0))
        if scene.seam.startswith(("decoder.", "logits")) and image.any() and len(image) == len(right):
            moved = right.copy()
            moved[image] = np.roll(right[image], shift, axis=0)
            yield Guess(f"{words} within the image", moved)
    for words, order in _orders(scene):
        moved = right.copy()
        moved[order[0]] = right[order[1]]
        yield Guess(words, moved)


def _orders(scene: Scene) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """(to, from) row numbers of grids read the wrong way."""
    right, merge = scene.expected, scene.geometry.merge
    if scene.grid is None:
        return
    rows, columns = scene.grid
    merged = (rows // merge) * (columns // merge)
    places = np.flatnonzero(scene.image) if scene.seam.startswith(("decoder.", "logits")) else np.arange(len(right))
    if len(places) == merged:
        turned = np.arange(merged).reshape(rows // merge, columns // merge)
        yield "image rows stand in column order: the grid is transposed", (places, places[turned.T.ravel()])
        yield "image rows stand in reverse order", (places, places[::-1])
    elif len(places) == rows * columns:
        raster = np.arange(rows * columns).reshape(rows, columns)
        blocks = raster.reshape(rows // merge, merge, columns // merge, merge).transpose(0, 2, 1, 3).ravel()
        yield "patches stand in raster order where merge blocks are expected", (places[blocks], places)
        yield "patches stand in merge-block order twice", (places, places[blocks])


def _channels(scene: Scene) -> Iterator[Guess]:
    """A few channels that are zero, exchanged, or, behind a linear layer, made by other rows of the weight."""
    from harness.causes.linear import source

    right, wrong = (part.reshape(len(scene.wrong), -1).astype(np.float64) for part in (scene.expected, scene.wrong))
    apart = np.linalg.norm(wrong - right, axis=0)
    off = np.flatnonzero(apart > 1e-3 * apart.max())
    if not 0 < len(off) <= max(1, FEW * right.shape[1]):
        return
    listed = _listed(off)
    for words, values in ((f"{listed} zero: a row of the weight is lost", 0.0), (f"{listed} exchanged", right[:, off[::-1]])):
        made = right.copy()
        made[:, off] = values
        if scene.left(made) <= scene.enough:
            yield Guess(words, made)
            return
    if source(scene) is not None:
        only = right.copy()
        only[:, off] = wrong[:, off]
        yield Guess(f"{listed} wrong and all others right: those rows of the weight are not the checkpoint's", only)


def _listed(channels: np.ndarray) -> str:
    if len(channels) == 1:
        return f"channel {channels[0]} is"
    few = ", ".join(map(str, channels[:4]))
    return f"channels {few}{' ...' if len(channels) > 4 else ''} are"
