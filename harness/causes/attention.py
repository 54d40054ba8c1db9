"""Attention: another scale, another mask, another grouping of heads, keys or values moved."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene
from harness.probes import formulas

WINDOWS = (16, 64, 127, 128, 256)
FACTORS = np.concatenate([np.linspace(0.8, 1.25, 10), [0.25, 0.5, 2.0, 4.0]])


def guesses(scene: Scene) -> Iterator[Guess]:
    """For the seam behind an attention."""
    match = re.fullmatch(r"(decoder|vision)\.layers\.(\d+)\.attn\.context", scene.seam)
    if not match:
        return
    name = scene.seam.removesuffix(".context")
    q, k, v = (scene.held(f"{name}.{part}") for part in ("q_rope", "k_rope", "v"))
    if q is None or k is None or v is None:
        return
    scale, size = q.shape[-1] ** -0.5, len(q)
    causal = np.tril(np.ones((size, size), bool)) if match[1] == "decoder" else np.ones((size, size), bool)

    def attend(q=q, k=k, v=v, scale=scale, visible=causal) -> np.ndarray:
        return formulas.attention(q, k, v, scale, visible).reshape(size, -1)

    masks = _decoder_masks(scene, causal) if match[1] == "decoder" else _vision_masks(causal)
    yield from (Guess(words, attend(visible=mask)) for words, mask in masks)
    yield from (Guess(words, attend(**change)) for words, change in _heads(q, k, v))
    yield from (Guess(words, attend(**change)) for words, change in _padded(k, v, causal))
    scores = np.einsum("shd,thd->hst", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1)) * scale
    yield Guess("scores and softmax are held in float16", _in_half(scores, v, causal))
    for words, other in (("1 / sqrt(heads)", q.shape[1] ** -0.5), ("1 / head_dim", 1 / q.shape[-1]), ("1", 1.0),
                         ("applied twice", scale**2)):
        yield Guess(f"the scores' scale is {words}", attend(scale=other))
    factor = _fitted(scene, lambda factor: attend(scale=factor * scale))
    yield Guess(f"the scores are scaled {factor:.4g} times too {'much' if factor > 1 else 'little'}", attend(scale=factor * scale))


def _vision_masks(everything: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "the mask is causal, as in a decoder", np.tril(everything)
    for parts in (2, 4):
        place = np.arange(len(everything)) * parts // len(everything)
        yield f"patches see only their own of {parts} parts of the image", place[:, None] == place[None]


def _decoder_masks(scene: Scene, causal: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    size = len(causal)
    yield "no mask: every token sees every other", np.ones_like(causal)
    strict = np.tril(causal, -1)
    strict[0, 0] = True
    yield "the mask is strict: a token does not see itself", strict
    yield "the mask lets a token see the one behind it", np.tril(np.ones_like(causal), 1)
    if scene.image.any() and len(scene.image) == size:
        both = scene.image[:, None] & scene.image[None]
        yield "image tokens see each other both ways, as under a mask of rope positions", causal | both
        yield "text tokens do not see the image", causal & ~(~scene.image[:, None] & scene.image[None])
    first, square = int(scene.image.argmax()), ~np.eye(size, dtype=bool)
    inner = scene.image & (np.arange(size) != first)
    yield "image tokens but the first see everything, also what comes after", causal | (inner[:, None] & square)
    for window in WINDOWS:
        if window < size:
            yield f"only the last {window} tokens are seen", causal & ~np.tril(np.ones_like(causal), -window)
    for since in (1, *WINDOWS):
        blind = causal.copy()
        blind[since:, 0] = False
        yield f"the first token is not seen from token {since} on", blind


def _heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        tiled = {name: np.tile(part, (1, groups, 1)) for name, part in (("k", k), ("v", v))}
        yield "heads are grouped by turns: key and value heads repeat as a whole, not each for its own group", tiled
    if k.shape[1] > 1:
        yield "key heads are exchanged", {"k": k[:, ::-1]}
        yield "value heads are exchanged", {"v": v[:, ::-1]}
    yield "values stand one token late", {"v": np.roll(v, 1, 0)}
    yield "keys stand one token late", {"k": np.roll(k, 1, 0)}
    yield "keys and values stand one token late", {"k": np.roll(k, 1, 0), "v": np.roll(v, 1, 0)}


def _padded(k: np.ndarray, v: np.ndarray, causal: np.ndarray) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for count in (1, 2, 3, 4, 8, 16):
        zeros = np.zeros((count, *k.shape[1:]))
        yield f"{count} zero keys of padding are attended", {
            "k": np.concatenate([k, zeros]), "v": np.concatenate([v, zeros]),
            "visible": np.concatenate([causal, np.ones((len(causal), count), bool)], axis=1)}


def _in_half(scores: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Softmax with every value rounded to float16 on its way, [S, H * D]."""
    half = np.where(visible[None], scores, -1e4).astype(np.float16)
    powers = np.exp((half - half.max(-1, keepdims=True)).astype(np.float32)).astype(np.float16)
    weights = (powers / powers.sum(-1, keepdims=True, dtype=np.float16)).astype(np.float64)
    grouped = np.repeat(v, len(scores) // v.shape[1], axis=1)
    return np.einsum("hst,thd->shd", weights, grouped).reshape(len(visible), -1)


def _fitted(scene: Scene, attend) -> float:
    """The factor on the scale that leaves least: a coarse search, then a fine one between its neighbours."""
    factors = np.sort(FACTORS)
    for _ in range(3):
        left = [scene.left(attend(factor)) for factor in factors]
        at = int(np.argmin(left))
        factors = np.linspace(factors[max(at - 1, 0)], factors[min(at + 1, len(factors) - 1)], 7)
    return float(factors[int(np.argmin([scene.left(attend(factor)) for factor in factors]))])
