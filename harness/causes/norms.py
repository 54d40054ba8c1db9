"""Norms: another eps, no weight, one added to the weight, another norm's weight, a mean taken away or not."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene
from harness.causes.linear import narrowed
from harness.trace import stream_input

EPS = (0.0, 1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
VISION_EPS = 1e-6
_TEXT, _VISION = "model.language_model.layers", "model.visual.blocks"
_HELD = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", "attn.q_norm": "self_attn.q_norm",
         "attn.k_norm": "self_attn.k_norm"}


def guesses(scene: Scene) -> Iterator[Guess]:
    """For a seam behind a norm."""
    if scene.seam == "decoder.norm":
        last = stream_input(scene.seam, scene.geometry)
        others = [(f"the weight of {op} of layer {number}", f"{_TEXT}.{number}.{_HELD[op]}")
                  for number in range(scene.geometry.layers) for op in ("input_norm", "post_norm")]
        yield from _rms(scene, scene.held(last), "model.language_model.norm", others)
        return
    match = re.fullmatch(r"(decoder|vision)\.layers\.(\d+)\.(input_norm|post_norm|attn\.[qk]_norm|norm[12])", scene.seam)
    if match and match[1] == "decoder":
        yield from _decoder(scene, int(match[2]), match[3])
    elif match:
        number, name = int(match[2]), match[3]
        before = stream_input(f"vision.layers.{number:02d}", scene.geometry)
        x = _sum(scene, before, f"vision.layers.{number:02d}.attn.out" if name == "norm2" else None)
        others = [(f"the norm of block {other}", f"{_VISION}.{other}.{name}") for other in (number - 1, number + 1)]
        others.append((f"{'norm1' if name == 'norm2' else 'norm2'}", f"{_VISION}.{number}.{'norm1' if name == 'norm2' else 'norm2'}"))
        yield from _layer_norm(scene, x, f"{_VISION}.{number}.{name}", others)


def _sum(scene: Scene, first: str | None, second: str | None) -> np.ndarray | None:
    """The stream that a norm reads: what entered the layer, and what attention added to it."""
    parts = [scene.held(name) for name in (first, second) if name is not None]
    return None if not parts or any(part is None for part in parts) else np.sum(parts, axis=0)


def _decoder(scene: Scene, number: int, op: str) -> Iterator[Guess]:
    name = f"decoder.layers.{number:02d}"
    others = [(f"the weight of layer {other}", f"{_TEXT}.{other}.{_HELD[op]}") for other in (number - 1, number + 1)]
    if op in ("input_norm", "post_norm"):
        x = _sum(scene, stream_input(name, scene.geometry), f"{name}.attn.out" if op == "post_norm" else None)
        other = "post_norm" if op == "input_norm" else "input_norm"
        others.append((f"the weight of {other}", f"{_TEXT}.{number}.{_HELD[other]}"))
    else:
        x = _projected(scene, name, number, op.split(".")[1][0])
        other = "attn.k_norm" if op == "attn.q_norm" else "attn.q_norm"
        others.append((f"the weight of {other}", f"{_TEXT}.{number}.{_HELD[other]}"))
    yield from _rms(scene, x, f"{_TEXT}.{number}.{_HELD[op]}", others)


def _projected(scene: Scene, name: str, number: int, part: str) -> np.ndarray | None:
    x = scene.held(f"{name}.input_norm")
    if x is None:
        return None
    weight = scene.weight(f"{_TEXT}.{number}.self_attn.{part}_proj.weight")
    return (x @ weight.T).reshape(len(x), -1, scene.geometry.head_dim)


def _rms(scene: Scene, x: np.ndarray | None, name: str, others: list[tuple[str, str]]) -> Iterator[Guess]:
    if x is None:
        return
    weight, eps = scene.weight(f"{name}.weight"), scene.geometry.rms_eps
    mean = np.square(x).mean(-1, keepdims=True)
    unit = x / np.sqrt(mean + eps)
    yield Guess("the norm's weight is left out", unit)
    yield Guess("1 is added to the norm's weight", unit * (1 + weight))
    yield Guess("the norm is left out" + (", or stands behind the rotation" if x.ndim == 3 else ""), x)
    yield from (Guess(f"eps is {other:g}, not {eps:g}", x / np.sqrt(mean + other) * weight) for other in EPS if other != eps)
    yield Guess("eps stands outside the root", x / (np.sqrt(mean) + eps) * weight)
    largest = np.square(np.abs(x).max(-1, keepdims=True))
    yield Guess("rows are divided by their largest value first, and eps is added after", x / np.sqrt(mean + eps * largest) * weight)
    for kind, held in narrowed(mean):
        yield Guess(f"the mean of squares is held in {kind}", x / np.sqrt(held + eps) * weight)
    if x.ndim == 3:
        yield Guess("statistics are taken over all heads together", x / np.sqrt(mean.mean(1, keepdims=True) + eps) * weight)
        yield from (Guess(words, _unit(moved, eps) * weight) for words, moved in _reordered(x))
    yield from (Guess(f"{words} stands in its place", unit * found) for words, found in _weights(scene, others, weight.shape))
    centred = x - x.mean(-1, keepdims=True)
    yield Guess("the mean is taken away first, as LayerNorm does",
                centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps) * weight)


def _unit(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)


def _reordered(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Heads and rows of a projection in another order."""
    yield "heads stand in reverse order", x[:, ::-1]
    yield "rows of the projection are ordered for neighbouring lanes, where halves are paired", np.concatenate(
        [x[..., ::2], x[..., 1::2]], axis=-1)
    yield "rows of the projection are ordered for halves, where neighbouring lanes are paired", np.stack(
        np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def _layer_norm(scene: Scene, x: np.ndarray | None, name: str, others: list[tuple[str, str]]) -> Iterator[Guess]:
    if x is None:
        return
    weight, bias = scene.weight(f"{name}.weight"), scene.weight(f"{name}.bias")
    centred = x - x.mean(-1, keepdims=True)
    mean = np.square(centred).mean(-1, keepdims=True)
    unit = centred / np.sqrt(mean + VISION_EPS)
    yield Guess("the norm's bias is missing", unit * weight)
    yield Guess("the norm's weight is left out", unit + bias)
    yield from (Guess(f"eps is {other:g}, not {VISION_EPS:g}", centred / np.sqrt(mean + other) * weight + bias) for other in EPS)
    count = x.shape[-1]
    yield Guess("the variance is divided by n - 1", centred / np.sqrt(mean * count / (count - 1) + VISION_EPS) * weight + bias)
    for (words, found), (_, shift) in zip(_weights(scene, others, weight.shape), _weights(scene, others, weight.shape, "bias")):
        yield Guess(f"{words} stands in its place", unit * found + shift)
    yield Guess("the mean is not taken away, as in RMSNorm",
                x / np.sqrt(np.square(x).mean(-1, keepdims=True) + VISION_EPS) * weight + bias)


def _weights(scene: Scene, others: list[tuple[str, str]], shape: tuple[int, ...],
             part: str = "weight") -> Iterator[tuple[str, np.ndarray]]:
    for words, name in others:
        try:
            found = scene.weight(f"{name}.{part}")
        except KeyError:
            continue
        if found.shape == shape:
            yield words, found
