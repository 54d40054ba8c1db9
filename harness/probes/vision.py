"""Vision: patch embedding, norms, rotations, attention and GELU of the tower, each fed its own values, all in one pass.

Rotations stand right behind the fused projection, so q and k are computed from the checkpoint's weights and compared by
their scores: a constant offset of all coordinates is no fault. Where the scores are wrong and one of the two is right by
itself, up to one turn of all patches, the other one is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from harness.checkpoint import Checkpoint
from harness.graph.vision import LAYER_NORM_EPS, ROPE_THETA, block_major
from harness.probes import MERGER_OPS, VISION_OPS, Reading, formulas
from harness.probes.bench import Feed, lacks, of_row, reading, rows

VISION = "model.visual"
ROW = 1e-5
GELU = 5e-6
"""What a vectorised erf or tanh of float32 costs (1.05e-6 measured), times five; the two flavours are 5e-4 apart."""
NEEDS = {"norm1": (), "norm2": ("attn.out",), "attn.q_rope": ("norm1", "attn.k_rope"),
         "attn.k_rope": ("norm1", "attn.q_rope"), "attn.context": ("attn.q_rope", "attn.k_rope", "attn.v"),
         "mlp.act": ("mlp.fc1",)}
Arrays = dict[str, np.ndarray]


def readings(conversion: Any, checkpoint: Checkpoint, grid: tuple[int, int]) -> Iterator[Reading]:
    """Readings of every operation of every block and merger."""
    geometry = checkpoint.geometry
    wanted: dict[str, tuple[list[str], Callable[[Feed], Reading]]] = {
        "vision.embed": ([], partial(_embed, checkpoint, grid))}
    for layer in range(geometry.vision_layers):
        name = f"vision.layers.{layer:02d}"
        before = "vision.embed" if layer == 0 else f"vision.layers.{layer - 1:02d}"
        for op in VISION_OPS:
            needed = [f"{name}.{part}" for part in NEEDS[op]] + ([before] if op.startswith("norm") else [])
            wanted[f"{name}.{op}"] = needed, partial(_block, checkpoint, grid, layer, op, before)
    mergers = {f"vision.deepstack.{tap}": at for tap, at in enumerate(geometry.deepstack_taps)}
    for name, layer in {**mergers, "vision.merger": geometry.vision_layers - 1}.items():
        for op in MERGER_OPS:
            needed = [f"vision.layers.{layer:02d}" if op == "norm" else f"{name}.fc1"]
            wanted[f"{name}.{op}"] = needed, partial(_merger, checkpoint, name, op, layer)
    missing = {seam: lacks(conversion, seam, *needed) for seam, (needed, _) in wanted.items()}
    feed = Feed() if all(missing.values()) else _encoded(conversion, checkpoint, grid)
    for seam, (_, read) in wanted.items():
        yield missing[seam] or read(feed)


def _encoded(conversion: Any, checkpoint: Checkpoint, grid: tuple[int, int]) -> Feed:
    feed = Feed(_values(checkpoint, grid))
    with torch.no_grad():
        conversion.encode(torch.from_numpy(_patches(checkpoint, grid)), feed)
    return feed


def _patches(checkpoint: Checkpoint, grid: tuple[int, int]) -> np.ndarray:
    """Random patches of a still image, every second one empty: what comes of those is the bias and the position alone."""
    geometry, count = checkpoint.geometry, grid[0] * grid[1]
    made = np.random.default_rng(0).standard_normal((count, geometry.channels, 1, geometry.patch**2))
    made[::2] = 0
    return made.repeat(geometry.temporal_patch, axis=2).reshape(count, -1).astype(np.float32)


def _embed(checkpoint: Checkpoint, grid: tuple[int, int], feed: Feed) -> Reading:
    weight = _tensor(checkpoint, "patch_embed.proj.weight").reshape(checkpoint.geometry.vision_hidden, -1)
    place = block_major(*grid, checkpoint.geometry.merge).numpy()
    learned = formulas.resampled(_tensor(checkpoint, "pos_embed.weight"), *grid)[place[:, 0], place[:, 1]]
    expected = _patches(checkpoint, grid) @ weight.T + _tensor(checkpoint, "patch_embed.proj.bias") + learned
    return reading("vision.embed", feed.seen["vision.embed"], expected, of_row(expected, ROW),
                   "patches, every second one empty, and positions")


def _values(checkpoint: Checkpoint, grid: tuple[int, int]) -> Arrays:
    geometry, count = checkpoint.geometry, grid[0] * grid[1]
    generator = np.random.default_rng(5)
    size = geometry.vision_hidden // geometry.vision_heads
    values = {"vision.embed": rows(count, geometry.vision_hidden, 11, geometry.merge**2)}
    for layer in range(geometry.vision_layers):
        name = f"vision.layers.{layer:02d}"
        values[name] = rows(count, geometry.vision_hidden, 12 + layer, geometry.merge**2)
        values[f"{name}.norm1"] = generator.standard_normal((count, geometry.vision_hidden))
        values[f"{name}.attn.out"] = np.zeros((count, geometry.vision_hidden))
        for part in ("q_rope", "k_rope", "v"):
            values[f"{name}.attn.{part}"] = generator.standard_normal((count, geometry.vision_heads, size))
        values[f"{name}.mlp.fc1"] = generator.uniform(-6, 6, (count, geometry.vision_intermediate))
    joined = geometry.vision_hidden * geometry.merge**2
    for name in ("vision.merger", *(f"vision.deepstack.{tap}" for tap in range(len(geometry.deepstack_taps)))):
        values[f"{name}.fc1"] = generator.uniform(-6, 6, (count // geometry.merge**2, joined))
    return {name: value.astype(np.float32) for name, value in values.items()}


def _tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.tensor(f"{VISION}.{name}").double().numpy()


def _block(checkpoint: Checkpoint, grid: tuple[int, int], layer: int, op: str, before: str, feed: Feed) -> Reading:
    geometry, name = checkpoint.geometry, f"vision.layers.{layer:02d}"
    seam, held = f"{name}.{op}", f"blocks.{layer}"
    got = feed.seen[seam]
    if op.startswith("norm"):
        expected = formulas.layer_norm(feed.values[before], *(_tensor(checkpoint, f"{held}.{op}.{part}")
                                                              for part in ("weight", "bias")), LAYER_NORM_EPS)
        return reading(seam, got, expected, of_row(expected, ROW), "layer norm of tiny, zero and huge rows")
    if op == "mlp.act":
        expected = formulas.gelu_tanh(feed.values[f"{name}.mlp.fc1"])
        return reading(seam, got, expected, GELU * (1 + np.abs(expected)), "tanh GELU on -6..6")
    if op == "attn.context":
        q, k, v = (feed.values[f"{name}.attn.{part}"] for part in ("q_rope", "k_rope", "v"))
        expected = formulas.attention(q, k, v, q.shape[-1]**-0.5).reshape(len(q), -1)
        return reading(seam, got.reshape(expected.shape), expected, 1e-5 * np.abs(v).max(), "attention over all patches")
    return _rope(feed, checkpoint, grid, layer, seam)


def _rope(feed: Feed, checkpoint: Checkpoint, grid: tuple[int, int], layer: int, seam: str) -> Reading:
    geometry, name, held = checkpoint.geometry, f"vision.layers.{layer:02d}", f"blocks.{layer}.attn.qkv"
    x = feed.values[f"{name}.norm1"].astype(np.float64)
    fused = x @ _tensor(checkpoint, f"{held}.weight").T + _tensor(checkpoint, f"{held}.bias")
    q, k, _ = np.moveaxis(fused.reshape(len(x), 3, geometry.vision_heads, -1), 1, 0)
    frequency = formulas.inverse_frequencies(ROPE_THETA, q.shape[-1] // 4)
    angles = (block_major(*grid, geometry.merge).numpy()[:, :, None] * frequency).reshape(len(x), 1, -1)
    right = np.einsum("phd,qhd->hpq", *(formulas.rotate(part, angles) for part in (q, k)))
    seen = {part: feed.seen[f"{name}.attn.{part}_rope"] for part in "qk"}
    scores = reading(seam, np.einsum("phd,qhd->hpq", seen["q"], seen["k"]), right, 1e-5 * np.abs(right).max(),
                     "scores of rotated q and k over all patches")
    if scores.error <= 1:
        return scores
    mine, other = ("q", "k") if seam.endswith("q_rope") else ("k", "q")
    alone = {part: _alone(seam, seen[part], plain, angles) for part, plain in (("q", q), ("k", k))}
    return alone[mine] if alone[mine].error <= 1 < alone[other].error else scores


def _alone(seam: str, seen: np.ndarray, plain: np.ndarray, angles: np.ndarray) -> Reading:
    """q or k [P, heads, D] by itself: its lanes, paired as complex numbers, turned by one angle a pair for all patches."""
    got, right = (first + 1j * second for first, second in (
        np.split(part, 2, axis=-1) for part in (seen, formulas.rotate(plain, angles))))
    turn = (got * right.conj()).sum(axis=(0, 1))
    right = right * turn / np.maximum(np.abs(turn), 1e-30)
    flat = [np.concatenate([part.real, part.imag], axis=-1) for part in (got, right)]
    return reading(seam, *flat, 1e-4 * np.abs(flat[1]).max(), "rotated values, up to one turn of all patches")


def _merger(checkpoint: Checkpoint, name: str, op: str, layer: int, feed: Feed) -> Reading:
    seam = f"{name}.{op}"
    if op == "act":
        expected = formulas.gelu_exact(feed.values[f"{name}.fc1"])
        return reading(seam, feed.seen[seam], expected, GELU * (1 + np.abs(expected)), "exact GELU on -6..6")
    main = name == "vision.merger"
    held = "merger" if main else f"deepstack_merger_list.{name.rsplit('.', 1)[1]}"
    weight, bias = (_tensor(checkpoint, f"{held}.norm.{part}") for part in ("weight", "bias"))
    x = feed.values[f"vision.layers.{layer:02d}"]
    joined = checkpoint.geometry.merge**2 * x.shape[1]
    expected = formulas.layer_norm(x if main else x.reshape(-1, joined), weight, bias, LAYER_NORM_EPS).reshape(-1, joined)
    return reading(seam, feed.seen[seam], expected, of_row(expected, ROW),
                   f"layer norm {'before' if main else 'behind'} the 2x2 join")
