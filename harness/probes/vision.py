"""Vision: patch embedding, norms, rotations, attention and GELU of the tower, each fed its own values, all in one pass.

Rotations stand right behind the fused projection, so q and k are computed from the checkpoint's weights and compared by
their scores: a constant offset of all coordinates is no fault. Where the scores are wrong and one of the two is right by
itself, up to one turn of all patches, the other one is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from harness.checkpoint import Checkpoint
from harness.graph.vision import LAYER_NORM_EPS, ROPE_THETA, block_major
from harness.probes import MERGER_OPS, VISION_OPS, Call, Reading, formulas
from harness.probes.bench import lacks, narrow, of_row, reading, rows, wide

VISION = "model.visual"
ROW = 1e-5
GELU = 5e-6
"""What a vectorised erf or tanh of float32 costs (1.05e-6 measured), times five; the two flavours are 5e-4 apart."""
NEEDS = {"norm1": (), "norm2": ("attn.out",), "attn.q_rope": ("norm1", "attn.k_rope"),
         "attn.k_rope": ("norm1", "attn.q_rope"), "attn.context": ("attn.q_rope", "attn.k_rope", "attn.v"),
         "mlp.act": ("mlp.fc1",)}
Arrays = dict[str, np.ndarray]


class Tower:
    """One call of `encode`; every operation of every block and merger is read in it, block by block."""

    def __init__(self, conversion: Any, checkpoint: Checkpoint, grid: tuple[int, int]) -> None:
        self.conversion, self.checkpoint, self.grid = conversion, checkpoint, grid
        self.values = _Values(checkpoint, grid)
        wanted = _wanted(checkpoint, grid)
        self.missing = {seam: lacks(conversion, seam, *needed) for seam, (needed, _) in wanted.items()}
        self.read = {seam: read for seam, (_, read) in wanted.items() if self.missing[seam] is None}
        self.found: dict[str, Reading] = {}
        self.seen: Arrays = {}
        self.calls = [Call(self._encode, 0, patches=grid[0] * grid[1])] if self.read else []

    def readings(self) -> Iterator[Reading]:
        """Of every operation of every block and merger."""
        for seam, missing in self.missing.items():
            yield missing or self.found[seam]

    def _encode(self) -> None:
        with torch.no_grad():
            self.conversion.encode(torch.from_numpy(_patches(self.checkpoint, self.grid)), self._tap)
        self._look()

    def _tap(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self.seen and _block_of(name) != _block_of(next(iter(self.seen))):
            self._look()
        if name in self.read:
            self.seen[name] = wide(value)
        return narrow(self.values[name], value) if name in self.values else value

    def _look(self) -> None:
        """Read what one block has shown, and let go of it."""
        for seam in self.seen:
            self.found[seam] = self.read[seam](self)
        self.seen.clear()


def _block_of(name: str) -> str:
    return ".".join(name.split(".")[:3 if "layers" in name or "deepstack" in name else 2])


def _wanted(checkpoint: Checkpoint, grid: tuple[int, int]) -> dict[str, tuple[list[str], Callable[[Tower], Reading]]]:
    """By seam: where values must go in, and how it is read."""
    geometry = checkpoint.geometry
    wanted: dict[str, tuple[list[str], Callable[[Tower], Reading]]] = {
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
    return wanted


def _patches(checkpoint: Checkpoint, grid: tuple[int, int]) -> np.ndarray:
    """Random patches of a still image, every second one empty: what comes of those is the bias and the position alone."""
    geometry, count = checkpoint.geometry, grid[0] * grid[1]
    made = np.random.default_rng(0).standard_normal((count, geometry.channels, 1, geometry.patch**2))
    made[::2] = 0
    return made.repeat(geometry.temporal_patch, axis=2).reshape(count, -1).astype(np.float32)


def _embed(checkpoint: Checkpoint, grid: tuple[int, int], feed: Tower) -> Reading:
    weight = _tensor(checkpoint, "patch_embed.proj.weight").reshape(checkpoint.geometry.vision_hidden, -1)
    place = block_major(*grid, checkpoint.geometry.merge).numpy()
    learned = formulas.resampled(_tensor(checkpoint, "pos_embed.weight"), *grid)[place[:, 0], place[:, 1]]
    expected = _patches(checkpoint, grid) @ weight.T + _tensor(checkpoint, "patch_embed.proj.bias") + learned
    return reading("vision.embed", feed.seen["vision.embed"], expected, of_row(expected, ROW),
                   "patches, every second one empty, and positions")


class _Values(Mapping[str, np.ndarray]):
    """What goes in at each seam, float32, made when it is asked for; the few last ones are kept."""

    def __init__(self, checkpoint: Checkpoint, grid: tuple[int, int]) -> None:
        geometry, self._count = checkpoint.geometry, grid[0] * grid[1]
        self._width, self._group = geometry.vision_hidden, geometry.merge**2
        heads = (geometry.vision_heads, geometry.vision_hidden // geometry.vision_heads)
        names = [f"vision.layers.{layer:02d}" for layer in range(geometry.vision_layers)]
        self._streams = {name: 11 + place for place, name in enumerate(("vision.embed", *names))}
        self._shapes = {f"{name}.{part}": (self._count, *shape) for name in names for part, shape in (
            ("norm1", (self._width,)), ("attn.out", (self._width,)), ("attn.q_rope", heads), ("attn.k_rope", heads),
            ("attn.v", heads), ("mlp.fc1", (geometry.vision_intermediate,)))}
        for name in ("vision.merger", *(f"vision.deepstack.{tap}" for tap in range(len(geometry.deepstack_taps)))):
            self._shapes[f"{name}.fc1"] = (self._count // self._group, self._width * self._group)
        self._seeds = {name: (5, place) for place, name in enumerate(self._shapes)}
        self._made = lru_cache(12)(self._make)

    def _make(self, name: str) -> np.ndarray:
        if name in self._streams:
            return rows(self._count, self._width, self._streams[name], self._group)
        generator, shape = np.random.default_rng(self._seeds[name]), self._shapes[name]
        if name.endswith("attn.out"):
            return np.zeros(shape, np.float32)
        drawn = generator.uniform(-6, 6, shape) if name.endswith("fc1") else generator.standard_normal(shape)
        return drawn.astype(np.float32)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._streams and name not in self._shapes:
            raise KeyError(name)
        return self._made(name)

    def __contains__(self, name: object) -> bool:
        return name in self._streams or name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter((*self._streams, *self._shapes))

    def __len__(self) -> int:
        return len(self._streams) + len(self._shapes)


def _tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.tensor(f"{VISION}.{name}").double().numpy()


def _block(checkpoint: Checkpoint, grid: tuple[int, int], layer: int, op: str, before: str, feed: Tower) -> Reading:
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


def _rope(feed: Tower, checkpoint: Checkpoint, grid: tuple[int, int], layer: int, seam: str) -> Reading:
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


def _merger(checkpoint: Checkpoint, name: str, op: str, layer: int, feed: Tower) -> Reading:
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
