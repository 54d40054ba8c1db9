"""What is added to the stream: DeepStack rows at image tokens, attention and MLP."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene
from harness.trace import stream_input


def guesses(scene: Scene) -> Iterator[Guess]:
    """For a DeepStack addition and for the output of a layer."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.deepstack", scene.seam)
    if match:
        yield from _deepstack(scene, int(match[1]))
    elif re.fullmatch(r"(decoder|vision)\.layers\.\d+", scene.seam):
        yield from _layer(scene)


def _deepstack(scene: Scene, tap: int) -> Iterator[Guess]:
    before, rows = scene.held(f"decoder.layers.{tap:02d}"), scene.held(f"vision.deepstack.{tap}")
    if before is None or rows is None or scene.image.sum() != len(rows):
        return

    def added(values: np.ndarray) -> np.ndarray:
        made = before.copy()
        made[scene.image] += values
        return made

    yield Guess("the DeepStack rows are not added here", before)
    yield Guess("the DeepStack rows are added twice", added(2 * rows))
    for other in range(len(scene.geometry.deepstack_taps)):
        found = scene.held(f"vision.deepstack.{other}")
        if other != tap and found is not None and found.shape == rows.shape:
            yield Guess(f"the rows of DeepStack tap {other} are added in the place of tap {tap}'s", added(found))
            yield Guess(f"the rows of DeepStack tap {other} are added on top", added(rows + found))
    for shift in (1, -1, 2, -2):
        yield Guess(f"the DeepStack rows are added {abs(shift)} {'late' if shift > 0 else 'early'}", added(np.roll(rows, shift, 0)))
    cut = rows.copy()
    cut[-1] = 0
    yield Guess("the last DeepStack row is lost", added(cut))
    gained = scene.wrong - before
    factor = float((gained[scene.image] * rows).sum() / max((rows * rows).sum(), 1e-300))
    yield Guess(f"the DeepStack rows are multiplied by {factor:.6g}", added(factor * rows))
    yield from _masks(scene, before, rows)


def _masks(scene: Scene, before: np.ndarray, rows: np.ndarray) -> Iterator[Guess]:
    """Rows at the wrong tokens: by their own slot, of which text has the first, or one after the other."""
    image = scene.image
    own = rows[np.where(image, np.cumsum(image) - 1, 0)]
    running = rows[np.clip(np.cumsum(image) - 1, 0, len(rows) - 1)]
    masks = {"the mask of image tokens is one late": np.roll(image, 1),
             "the mask of image tokens is one early": np.roll(image, -1),
             "the mask of image tokens begins at the first token": np.arange(len(image)) < image.sum(),
             "DeepStack rows are added to text tokens too": np.ones_like(image)}
    for words, mask in masks.items():
        for which in (own, running):
            yield Guess(words, before + np.where(mask[:, None], which, 0))
    in_turn = before.copy()
    in_turn[:len(rows)] += rows[:len(before)]
    yield Guess("DeepStack rows are added from the first token on", in_turn)


def _layer(scene: Scene) -> Iterator[Guess]:
    """The two additions of a pre-norm layer: x + attention + MLP."""
    first = stream_input(scene.seam, scene.geometry)
    x, attention, mlp = (scene.held(name) for name in (first, f"{scene.seam}.attn.out", f"{scene.seam}.mlp.out") if name) if first \
        else (None, None, None)
    if x is None or attention is None or mlp is None:
        return
    yield Guess("the MLP's output is not added", x + attention)
    yield Guess("the stream is not added to the MLP's output", mlp)
    yield Guess("the stream behind the attention is left out: the MLP is added to what entered the layer", x + mlp)
    yield Guess("the attention's output is added twice", x + 2 * attention + mlp)
