"""Decoder: every norm, rotation, attention and activation, each fed its own values, all in one call.

What goes in: rows of six kinds at the norms (an eps or a narrow mean shows on tiny, zero and huge rows), unit vectors
at the rotations (cos and sin of every lane can be read off), random q, k and v at the attention (scale, mask, grouping),
a grid of values at the activation. The same again in calls of one token, each with a row of another kind: a decode
function may be another than prefill's. Rotations are also read at positions near 1e3, 1e4 and 1e5, attention also
behind 128, 256 and 4096 cached keys, as far as the model's own context reaches. A constant offset of all positions is
no fault: rotations are compared with the first token's, which stands at 0 however far the others are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.checkpoint import Checkpoint, Geometry
from harness.graph.contract import NO_SHIFT, positions, rope_axis
from harness.probes import DECODER_OPS, Reading, formulas
from harness.probes.bench import ULP, Feed, cache_for, decode, image_rows, lacks, of_row, reading, rows

TEXT = "model.language_model"
FAR = (1_000, 10_000, 100_000)
NEAR = 4
"""Tokens at 0, 1, 2 .. of a call whose others stand far out: a ring or a table that ends too soon moves both alike."""
BEHIND = ((129, 5), (130, 1), (257, 5), (258, 1), (4100, 5), (4100, 1))
"""Calls of the length ladder: tokens in all, tokens in the call."""
KINDS, BEFORE = 6, 40
"""Kinds of rows of `bench.rows`, each in a call of one token behind so many."""
SPARE = 2
"""Slots behind the last token, which no call may touch."""
ROW = 1e-5
"""Share of a row's largest value that float32 sums over it may cost: 80 ulp, for rows of up to 1e5 values."""
NEEDS = {"input_norm": (), "post_norm": ("attn.out",), "attn.q_norm": ("input_norm",), "attn.k_norm": ("input_norm",),
         "attn.q_rope": ("attn.q_norm", "attn.k_norm", "attn.k_rope"),
         "attn.k_rope": ("attn.q_norm", "attn.k_norm", "attn.q_rope"),
         "attn.context": ("attn.q_rope", "attn.k_rope", "attn.v"), "mlp.act": ("mlp.gate", "mlp.up")}
Arrays = dict[str, np.ndarray]


def readings(conversion: Any, checkpoint: Checkpoint, grid: tuple[int, int]) -> Iterator[Reading]:
    """Readings of every operation of every layer, and of the final norm."""
    geometry = checkpoint.geometry
    wanted = {f"decoder.layers.{layer:02d}.{op}": (layer, op) for layer in range(geometry.layers) for op in DECODER_OPS}
    missing = {seam: lacks(conversion, seam, *_needed(geometry, *place)) for seam, place in wanted.items()}
    last = _output(geometry.layers - 1, geometry)
    missing["decoder.norm"] = lacks(conversion, "decoder.norm", last)
    caches = {f"kv.{name}.{layer:02d}": (part, layer) for layer in range(geometry.layers)
              for part, name in enumerate(("keys", "values"))}
    for seam, (part, layer) in caches.items():
        found = lacks(conversion, _source(part, layer))
        missing[seam] = found and replace(found, seam=seam)
    bench = None if all(missing.values()) else _Bench(conversion, geometry, grid)
    for seam, place in wanted.items():
        yield missing[seam] or _operation(bench, checkpoint, *place)
    for seam, place in caches.items():
        yield missing[seam] or _written(bench, seam, *place)
    yield missing["decoder.norm"] or _worst(_final(run, checkpoint, last) for run in (bench.main, *bench.single))


def _needed(geometry: Geometry, layer: int, op: str) -> list[str]:
    """Seams that values must go in at, so that `op` can be read."""
    return [f"decoder.layers.{layer:02d}.{part}" for part in NEEDS[op]] + (
        [_before(layer, geometry)] if op in ("input_norm", "post_norm") else [])


def _before(layer: int, geometry: Geometry) -> str:
    return "decoder.embed" if layer == 0 else _output(layer - 1, geometry)


class _Bench:
    """The calls that all readings share: an image prompt in one call, a few tokens far out, a few behind a long cache,
    and single ones."""

    def __init__(self, conversion: Any, geometry: Geometry, grid: tuple[int, int]) -> None:
        ids = np.concatenate([np.arange(3), geometry.vocab + np.arange(conversion.slots), np.arange(13)])
        shift = 3 + conversion.slots, conversion.slots - max(grid) // geometry.merge
        most = geometry.max_positions
        self.planes = positions(ids, geometry.vocab, *shift, grid[1] // geometry.merge)
        self.main = _run(conversion, geometry, ids, len(ids), shift, cache_for(geometry, len(ids) + SPARE, 5), seed=1)
        self.places = sorted({min(place, most - 8) for place in FAR})
        self.far = [_run(conversion, geometry, np.arange(8), 8, (NEAR, -place), cache_for(geometry, 8 + SPARE), seed=2)
                    for place in self.places]
        total = BEFORE + 1
        self.single = [_run(conversion, geometry, np.arange(1), total, (NO_SHIFT, 0),
                            cache_for(geometry, total + SPARE, total), seed=4, kind=kind) for kind in range(KINDS)]
        self.behind = [_run(conversion, geometry, np.arange(count), total, (NO_SHIFT, 0),
                            cache_for(geometry, total + SPARE, total), seed=3)
                       for total, count in sorted({(min(total, most), count) for total, count in BEHIND})]


def _operation(bench: _Bench, checkpoint: Checkpoint, layer: int, op: str) -> Reading:
    geometry, name = checkpoint.geometry, f"decoder.layers.{layer:02d}"
    runs = bench.main, *bench.single
    if op in ("input_norm", "post_norm"):
        return _worst(_norm(run, checkpoint, layer, op, _before(layer, geometry)) for run in runs)
    if op in ("attn.q_norm", "attn.k_norm"):
        return _worst(_head_norm(run, checkpoint, layer, op) for run in runs)
    if op in ("attn.q_rope", "attn.k_rope"):
        far = [(run, np.tile(np.arange(8) + place * (np.arange(8) >= NEAR), (3, 1)))
               for run, place in zip(bench.far, bench.places)]
        return _worst(_rope(run, geometry, name, op, planes) for run, planes in [(bench.main, bench.planes), *far])
    if op == "attn.context":
        return _worst(_attention(run, geometry, layer) for run in (bench.main, *bench.behind))
    return _worst(_activation(run, name) for run in runs)


@dataclass(frozen=True)
class _Run:
    """What went in at each seam, what came there, tokens of the call and in all, and the cache before and after."""

    values: Arrays
    seen: Arrays
    count: int
    total: int
    before: tuple[np.ndarray, ...]
    after: tuple[np.ndarray, ...]


def _run(conversion: Any, geometry: Geometry, ids: np.ndarray, total: int, shift: tuple[int, int],
         cache: tuple[Any, Any], seed: int, kind: int | None = None) -> _Run:
    """One call; with `kind`, of a single token whose rows are the kind-th of `KINDS`."""
    values = _values(geometry, len(ids) if kind is None else KINDS, seed)
    feed = Feed(values if kind is None else {name: value[kind:kind + 1] for name, value in values.items()})
    before = tuple(part.numpy().copy() for part in cache)
    decode(conversion, ids, total, image_rows(conversion, geometry, seed), shift, cache, feed)
    return _Run(feed.values, feed.seen, len(ids), total, before, tuple(part.numpy() for part in cache))


def _values(geometry: Geometry, count: int, seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    values = {"decoder.embed": rows(count, geometry.hidden, seed)}
    parity = np.arange(count)[:, None, None]
    for layer in range(geometry.layers):
        name = f"decoder.layers.{layer:02d}"
        values[_output(layer, geometry)] = rows(count, geometry.hidden, seed + 7 * layer + 1)
        values[f"{name}.input_norm"] = 10.0 ** generator.uniform(-4, 0, (count, 1)) * generator.standard_normal(
            (count, geometry.hidden))
        values[f"{name}.attn.out"] = np.zeros((count, geometry.hidden))
        for part, heads in (("q", geometry.heads), ("k", geometry.kv_heads)):
            second = (parity + np.arange(heads)[None, :, None]) % 2
            lanes = np.arange(geometry.head_dim)[None, None] >= geometry.head_dim // 2
            values[f"{name}.attn.{part}_norm"] = (lanes == second).astype(np.float32)
            values[f"{name}.attn.{part}_rope"] = generator.standard_normal((count, heads, geometry.head_dim))
        values[f"{name}.attn.v"] = generator.standard_normal((count, geometry.kv_heads, geometry.head_dim))
        values[f"{name}.mlp.gate"] = generator.uniform(-8, 8, (count, geometry.intermediate))
        values[f"{name}.mlp.up"] = generator.uniform(0.5, 1.5, (count, geometry.intermediate))
    return {name: value.astype(np.float32) for name, value in values.items()}


def _output(layer: int, geometry: Geometry) -> str:
    """The seam whose value enters the next layer."""
    return f"decoder.layers.{layer:02d}" + (".deepstack" if layer < len(geometry.deepstack_taps) else "")


def _tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.tensor(f"{TEXT}.{name}").double().numpy()


def _norm(run: _Run, checkpoint: Checkpoint, layer: int, op: str, before: str) -> Reading:
    held = "input_layernorm" if op == "input_norm" else "post_attention_layernorm"
    expected = formulas.rms_norm(run.values[before], _tensor(checkpoint, f"layers.{layer}.{held}.weight"),
                                 checkpoint.geometry.rms_eps)
    seam = f"decoder.layers.{layer:02d}.{op}"
    return reading(seam, run.seen[seam], expected, of_row(expected, ROW), "RMS norm of tiny, zero and huge rows")


def _final(run: _Run, checkpoint: Checkpoint, last: str) -> Reading:
    expected = formulas.rms_norm(run.values[last], _tensor(checkpoint, "norm.weight"), checkpoint.geometry.rms_eps)
    return reading("decoder.norm", run.seen["decoder.norm"], expected, of_row(expected, ROW),
                   "RMS norm of tiny, zero and huge rows")


def _head_norm(run: _Run, checkpoint: Checkpoint, layer: int, op: str) -> Reading:
    """The norm behind a projection: its input cannot be put in, so it is computed from the checkpoint's weight."""
    geometry, part = checkpoint.geometry, op.split(".")[1][0]
    x = run.values[f"decoder.layers.{layer:02d}.input_norm"].astype(np.float64)
    weight = _tensor(checkpoint, f"layers.{layer}.self_attn.{part}_proj.weight")
    projected = (x @ weight.T).reshape(run.count, -1, geometry.head_dim)
    expected = formulas.rms_norm(projected, _tensor(checkpoint, f"layers.{layer}.self_attn.{part}_norm.weight"),
                                 geometry.rms_eps)
    seam = f"decoder.layers.{layer:02d}.{op}"
    return reading(seam, run.seen[seam], expected, of_row(expected, 2 * ROW), "norm of heads, tiny ones among them")


def _rope(run: _Run, geometry: Geometry, name: str, op: str, planes: np.ndarray) -> Reading:
    """Turn between each token's q (or k) and the first token's k (or q), lane by lane, from unit vectors.

    An angle of float32 is off by half an ulp of itself, so at position p a lane of frequency f may be off by 2^-23 p f.
    """
    other = "k" if op.endswith("q_rope") else "q"
    lanes = geometry.head_dim // 2
    frequency = formulas.inverse_frequencies(geometry.rope_theta, lanes)
    place = planes.astype(np.float64)[rope_axis(geometry.mrope_section, lanes)].T
    turned = _turns(run, name, op.split(".")[1][0]) * np.conj(_turns(run, name, other)[:1, :1])
    expected = np.exp(1j * (place - place[:1]) * frequency)[:, None]
    allowed = (1e-6 + 2 * ULP * np.abs(place).max(0) * frequency)[None, None] * np.ones(turned.shape)
    both = [np.concatenate([part.real, part.imag], -1) for part in (turned, np.broadcast_to(expected, turned.shape))]
    return reading(f"{name}.{op}", *both, np.concatenate([allowed, allowed], -1),
                   f"turn of every lane up to position {int(planes.max())}")


def _turns(run: _Run, name: str, part: str) -> np.ndarray:
    """cos + i sin of each token, head and lane, from rotated unit vectors: (1, 0) -> (c, s), (0, 1) -> (-s, c)."""
    first, second = np.split(run.seen[f"{name}.attn.{part}_rope"], 2, axis=-1)
    unit = run.values[f"{name}.attn.{part}_norm"][..., :1] == 1
    return np.where(unit, first + 1j * second, second - 1j * first)


def _attention(run: _Run, geometry: Geometry, layer: int) -> Reading:
    """Softmax over what went in and what the cache held. Scores of a few units lose a few ulp, and weights as much."""
    name = f"decoder.layers.{layer:02d}"
    q, k, v = (run.values[f"{name}.attn.{part}"] for part in ("q_rope", "k_rope", "v"))
    past = run.total - run.count
    keys, values = (np.concatenate([state[layer, 0, :, :past].transpose(1, 0, 2), new])
                    for state, new in zip(run.before, (k, v)))
    visible = np.arange(past + run.count)[None] <= past + np.arange(run.count)[:, None]
    expected = formulas.attention(q, keys, values, geometry.head_dim**-0.5, visible).reshape(run.count, -1)
    seam = f"{name}.attn.context"
    return reading(seam, run.seen[seam].reshape(run.count, -1), expected, 1e-5 * np.abs(values).max(),
                   f"attention of {run.count} queries over {past + run.count} keys")


def _source(part: int, layer: int) -> str:
    """The seam whose value goes into the cache of keys (0) or values (1)."""
    return f"decoder.layers.{layer:02d}.attn.{('k_rope', 'v')[part]}"


def _written(bench: _Bench, seam: str, part: int, layer: int) -> Reading:
    """The cache read back slot by slot: what went in stands in its slots, and every other slot is what it was."""
    def read(run: _Run) -> Reading:
        expected = run.before[part][layer, 0].transpose(1, 0, 2).astype(np.float64)
        expected[run.total - run.count:run.total] = run.values[_source(part, layer)]
        return reading(seam, run.after[part][layer, 0].transpose(1, 0, 2).astype(np.float64), expected, 8 * ULP,
                       f"cache slots behind a call of {run.count} tokens, {run.total} in all")

    return _worst(read(run) for run in (bench.main, *bench.behind))


def _activation(run: _Run, name: str) -> Reading:
    gate, up = run.values[f"{name}.mlp.gate"], run.values[f"{name}.mlp.up"]
    expected = formulas.silu(gate) * up
    return reading(f"{name}.mlp.act", run.seen[f"{name}.mlp.act"], expected, 4 * ULP * (1 + np.abs(expected)),
                   "silu(gate) * up on -8..8")


def _worst(found: Iterator[Reading]) -> Reading:
    return max(found, key=lambda one: one.error)
