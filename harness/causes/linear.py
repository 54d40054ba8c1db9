"""Linear layers: a bias lost, a weight transposed, another layer's, another tensor's, or rounded."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene

_TEXT, _VISION = "model.language_model.layers", "model.visual.blocks"
_DECODER_OPS = {"attn.v": ("input_norm", "self_attn.v_proj"), "attn.out": ("attn.context", "self_attn.o_proj"),
                "mlp.gate": ("post_norm", "mlp.gate_proj"), "mlp.up": ("post_norm", "mlp.up_proj"),
                "mlp.out": ("mlp.act", "mlp.down_proj")}
_VISION_OPS = {"attn.out": ("attn.context", "attn.proj"), "mlp.fc1": ("norm2", "mlp.linear_fc1"),
               "mlp.out": ("mlp.act", "mlp.linear_fc2")}
_OTHERS = {"mlp.gate_proj": "mlp.up_proj", "mlp.up_proj": "mlp.gate_proj", "self_attn.v_proj": "self_attn.k_proj"}
HEAD, EMBEDDING = "lm_head", "model.language_model.embed_tokens"


def guesses(scene: Scene) -> Iterator[Guess]:
    """For a seam behind a linear layer: each mistake with its weight."""
    found = source(scene)
    if found is None:
        return
    x, name, others = found
    weight, bias = scene.weight(f"{name}.weight"), _bias(scene, name)
    plain = x @ weight.T
    if bias is not None:
        yield Guess("the bias is missing", plain)
        yield Guess("the bias is added twice", plain + 2 * bias)
    offset = 0.0 if bias is None else bias
    if weight.shape[0] == weight.shape[1]:
        yield Guess("the weight is transposed", x @ weight + offset)
    yield Guess("the weight is reshaped where it had to be transposed", x @ weight.T.reshape(weight.shape).T + offset)
    for words, other in others:
        try:
            found = scene.weight(f"{other}.weight")
        except KeyError:
            continue
        if found.shape == weight.shape:
            theirs = _bias(scene, other)
            yield Guess(f"{words} stands in its place", x @ found.T + (0.0 if theirs is None else theirs))
    yield from (Guess(f"the weight is rounded to {name}", x @ held.T + offset) for name, held in narrowed(weight))


def narrowed(values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Values as narrower floats hold them."""
    import torch

    for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        held = torch.from_numpy(values.astype(np.float32)).to(getattr(torch, name))
        yield name, held.double().numpy()


def _bias(scene: Scene, name: str) -> np.ndarray | None:
    try:
        return scene.weight(f"{name}.bias")
    except KeyError:
        return None


def source(scene: Scene) -> tuple[np.ndarray, str, list[tuple[str, str]]] | None:
    """Input [T, i] of the layer behind the seam, its name, and (words, name) of what could stand in its place."""
    if scene.seam == "logits":
        x = scene.held("decoder.norm")
        name = EMBEDDING if scene.geometry.tied else HEAD
        others = [] if scene.geometry.tied else [("the text table (a head tied by mistake)", EMBEDDING)]
        return None if x is None else (x, name, others)
    match = re.fullmatch(r"(decoder|vision)\.layers\.(\d+)\.(.+)", scene.seam)
    return _layer(scene, match[1], int(match[2]), match[3]) if match else None


def _layer(scene: Scene, tower: str, number: int, op: str) -> tuple[np.ndarray, str, list[tuple[str, str]]] | None:
    ops, root = (_DECODER_OPS, _TEXT) if tower == "decoder" else (_VISION_OPS, _VISION)
    if op not in ops:
        return None
    before, name = ops[op]
    x = scene.held(f"{tower}.layers.{number:02d}.{before}")
    if x is None:
        return None
    others = [(f"the weight of layer {other}", f"{root}.{other}.{name}") for other in (number - 1, number + 1)]
    if name in _OTHERS:
        others.append((_OTHERS[name].split(".")[1], f"{root}.{number}.{_OTHERS[name]}"))
    return x.reshape(len(x), -1), f"{root}.{number}.{name}", others
