"""Mergers: the norm on the other side of the 2x2 join, neighbours in another order, another merger, another block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from harness.causes import Guess, Scene
from harness.causes.linear import narrowed
from harness.causes.norms import VISION_EPS
from harness.probes import formulas

STAGES = ("norm", "fc1", "act", "")


@dataclass(frozen=True)
class _Merger:
    """How a merger is computed: tensors below `root`; the norm before or behind the join; order of the joined neighbours."""

    x: np.ndarray
    root: str
    behind: bool
    order: tuple[int, ...] | None = None
    eps: float = VISION_EPS
    lost: str = ""
    narrow: tuple[str, str] = ("", "")
    tanh: bool = False

    def run(self, scene: Scene, upto: str) -> np.ndarray | None:
        """Values at a stage; None where the weights do not fit together."""
        merge = scene.geometry.merge**2
        try:
            norm, fc1, fc2 = (self._pair(scene, name) for name in ("norm", "linear_fc1", "linear_fc2"))
            joined = self._join(self.x, merge) if self.behind else self.x
            width = joined.shape[-1]
            repeat = width // len(norm[0]) if width % len(norm[0]) == 0 else 0
            made = formulas.layer_norm(joined, np.tile(norm[0], repeat), np.tile(norm[1], repeat), self.eps)
            made = made if self.behind else self._join(made, merge)
            if upto == "norm":
                return made
            made = made @ fc1[0].T + fc1[1]
            if upto == "fc1":
                return made
            made = formulas.gelu_tanh(made) if self.tanh else formulas.gelu_exact(made)
            return made if upto == "act" else made @ fc2[0].T + fc2[1]
        except (KeyError, ValueError):  # another merger's tensors need not fit this one
            return None

    def _join(self, x: np.ndarray, merge: int) -> np.ndarray:
        blocks = x.reshape(-1, merge, x.shape[-1])
        return (blocks if self.order is None else blocks[:, list(self.order)]).reshape(len(blocks), -1)

    def _pair(self, scene: Scene, name: str) -> tuple[np.ndarray, np.ndarray]:
        weight, bias = scene.weight(f"{self.root}.{name}.weight"), scene.weight(f"{self.root}.{name}.bias")
        if name == self.narrow[0]:
            weight = dict(narrowed(weight))[self.narrow[1]]
        return weight, np.zeros_like(bias) if name == self.lost else bias


def guesses(scene: Scene) -> Iterator[Guess]:
    """For the seams of a merger: it is computed again from the block's output, each time with one mistake."""
    match = re.fullmatch(r"vision\.(?:merger|deepstack\.(\d+))(?:\.(norm|fc1|act))?", scene.seam)
    if not match:
        return
    taps, last = scene.geometry.deepstack_taps, scene.geometry.vision_layers - 1
    number = last if match[1] is None else taps[int(match[1])]
    x = scene.held(f"vision.layers.{number:02d}")
    if x is None:
        return
    roots = {"the main merger": "model.visual.merger"} | {
        f"DeepStack merger {tap}": f"model.visual.deepstack_merger_list.{tap}" for tap in range(len(taps))}
    mine = "the main merger" if match[1] is None else f"DeepStack merger {match[1]}"
    plain = _Merger(x, roots[mine], behind=match[1] is not None)
    for words, changed in _changed(scene, plain, roots, mine, number):
        values = changed.run(scene, match[2] or "")
        if values is not None:
            yield Guess(words, values)


def _changed(scene: Scene, plain: _Merger, roots: dict[str, str], mine: str, number: int) -> Iterator[tuple[str, _Merger]]:
    yield f"the norm stands {'before' if plain.behind else 'behind'} the join", replace(plain, behind=not plain.behind)
    yield "the 2x2 neighbours are joined column by column", replace(plain, order=(0, 2, 1, 3))
    yield "the 2x2 neighbours are joined in reverse order", replace(plain, order=(3, 2, 1, 0))
    for words, root in roots.items():
        if words != mine:
            yield f"the weights of {words} stand in its place", replace(plain, root=root)
            yield f"the weights of {words} stand in its place, with its own norm's side", replace(
                plain, root=root, behind=root != roots["the main merger"])
    for other in range(scene.geometry.vision_layers):
        found = scene.held(f"vision.layers.{other:02d}")
        if other != number and found is not None:
            yield f"it reads block {other} where block {number} is right", replace(plain, x=found)
    for eps in (0.0, 1e-5, 1e-4, 1e-3, 1e-2):
        yield f"eps is {eps:g}, not {VISION_EPS:g}", replace(plain, eps=eps)
    yield "tanh GELU stands in the place of the exact one", replace(plain, tanh=True)
    for name in ("norm", "linear_fc1", "linear_fc2"):
        yield f"the bias of {name} is missing", replace(plain, lost=name)
        yield from ((f"the weight of {name} is rounded to {kind}", replace(plain, narrow=(name, kind)))
                    for kind in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"))
