"""Probable causes, tried out: which known mistake, made on purpose, gives the very values that the thing under test gives.

A guess is one known mistake with the values it would give at the broken seam, in float64 from the oracle's own values and
the checkpoint's weights. It is named only where it accounts for nearly all of the error; otherwise nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from harness.geometry import Geometry

CLEAR = 0.03
"""Share of the error that a guess may leave unexplained; the choice of constants leaves a little."""
ROUNDING = 3e-7
"""What float32 leaves of any value, relative to the whole; a faint fault explained down to it is explained."""
MOST = 0.5
"""Even so, a guess has to account for this much of the error."""


@dataclass(frozen=True)
class Guess:
    """A mistake in plain words, and the values [T, ...] float64 that it gives."""

    words: str
    values: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A broken seam: the values there, and what they are computed from.

    wrong: values of the thing under test, fed with `right`. right: the oracle's values by seam. planes: its positions t, h, w
    [3, T] int32. ids: HF ids [T]. grid: patches, rows and columns, or None. patches [P, F]. prompt: of a cache, how many
    rows one call wrote before single steps began. weight(name) is a tensor in float64; KeyError for an unknown name.
    """

    seam: str
    wrong: np.ndarray
    right: Mapping[str, np.ndarray]
    geometry: Geometry
    weight: Callable[[str], np.ndarray]
    planes: np.ndarray
    ids: np.ndarray
    grid: tuple[int, int] | None
    patches: np.ndarray | None = None
    prompt: int | None = None

    @property
    def image(self) -> np.ndarray:
        """Which tokens are an image's [T] bool."""
        return self.ids == self.geometry.image_token

    @property
    def expected(self) -> np.ndarray:
        """The oracle's values at the seam, float64."""
        return self.right[self.seam].astype(np.float64)

    def held(self, seam: str) -> np.ndarray | None:
        """The oracle's values at another seam, float64, or None."""
        return self.right[seam].astype(np.float64) if seam in self.right else None

    def left(self, values: np.ndarray) -> float:
        """Share of the error that these values leave unexplained."""
        error = np.linalg.norm(self.wrong - self.expected)
        if values.size != self.wrong.size or not np.isfinite(values).all() or not error:
            return np.inf
        return float(np.linalg.norm(self.wrong - values.reshape(self.wrong.shape)) / error)

    @property
    def enough(self) -> float:
        """The share that an explanation may leave."""
        error = np.linalg.norm(self.wrong - self.expected)
        return max(CLEAR, min(MOST, ROUNDING * np.linalg.norm(self.expected) / error)) if error else 0.0


def explain(scene: Scene) -> str | None:
    """The mistake that explains the error, in words, or None where no known one does.

    Mistakes that fix every value come before patterns fitted to the values, which explain more and say less.
    """
    from harness.causes import activations, additions, attention, cache, embeddings, linear, mergers, norms, rotation, rows

    if not np.isfinite(scene.wrong).all() or scene.seam not in scene.right:
        return None
    known = (cache, rotation, attention, norms, activations, mergers, linear, additions, embeddings)
    for guesses in (*(family.guesses(scene) for family in known), rows.guesses(scene)):
        tried = [(scene.left(guess.values), guess.words) for guess in guesses]
        least = min(tried, default=(np.inf, ""))[0]
        if least <= scene.enough:
            # Of those that explain about as much the first: families list the plain mistake before the fitted one.
            left, words = next(row for row in tried if row[0] <= max(2 * least, scene.enough / 20))
            return f"{words} (tried out: {_share(left)})"
    return rows.noise(scene)


def _share(left: float) -> str:
    if left > CLEAR:
        return "gives these values to within float32 rounding"
    return f"accounts for {f'{100 * (1 - left):.4g} %' if left > 5e-6 else 'all'} of the error"
