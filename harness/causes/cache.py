"""The KV cache read back: slots late, lost or never written behind the prompt, keys and values exchanged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene

SHIFTS = (1, -1, 2)


def guesses(scene: Scene) -> Iterator[Guess]:
    """For a cache: `scene.seam` is where its rows are made, `scene.prompt` how many of them one call wrote."""
    if scene.prompt is None or not 0 < scene.prompt <= len(scene.wrong):
        return
    right, prompt = scene.expected, scene.prompt
    behind = np.arange(len(right)) >= prompt
    shape = (-1, *[1] * (right.ndim - 1))
    for words, kept in (("nothing was ever written", np.zeros(len(right), bool)),
                        ("single steps never write: all slots behind the prompt are empty", ~behind),
                        ("the prompt writes its first token only", behind | (np.arange(len(right)) == 0)),
                        ("the prompt writes its last token only", behind | (np.arange(len(right)) == prompt - 1)),
                        ("the prompt writes nothing", behind), ("the last slot is empty", np.arange(len(right)) < len(right) - 1)):
        yield Guess(words, np.where(kept.reshape(shape), right, 0))
    for by in SHIFTS:
        words = f"{abs(by)} slot{'s' if abs(by) > 1 else ''} {'late' if by > 0 else 'early'}"
        yield Guess(f"every row is written {words}", _moved(right, 0, by))
        yield Guess(f"single steps write {words}", _moved(right, prompt, by))
        yield Guess(f"single steps write {words}, each over the one before", _moved(right, prompt, by, hole=False))
    late = _moved(right, prompt, 1)
    late[-1] = right[-1]
    yield Guess("single steps write 1 slot late, and the last one where there is room", late)
    stuck = right.copy()
    stuck[prompt:] = 0
    if prompt < len(right):
        stuck[prompt] = right[-1]
    yield Guess("single steps all write the same slot, the first behind the prompt", stuck)
    other = scene.held(scene.seam.replace("k_rope", "v") if scene.seam.endswith("k_rope") else scene.seam[:-1] + "k_rope")
    if other is not None and other.shape == right.shape:
        yield Guess("keys and values are exchanged", other)
    unturned = scene.held(scene.seam.replace("_rope", "_norm"))
    if scene.seam.endswith("k_rope") and unturned is not None:
        yield Guess("keys are cached before they are rotated", unturned)


def _moved(right: np.ndarray, since: int, by: int, hole: bool = True) -> np.ndarray:
    """Rows from `since` on moved by `by` slots; what they leave is empty, or what stood there before."""
    made = right.copy()
    tail = np.zeros_like(right[since:]) if hole else right[since:].copy()
    if by > 0:
        tail[by:] = right[since:len(right) - by]
    else:
        tail[:by] = right[since - by:]
    made[since:] = tail
    return made
