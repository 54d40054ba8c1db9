"""Decoder: every norm, rotation, attention and activation, each fed its own values, all in one call.

What goes in: rows of six kinds at the norms (an eps or a narrow mean shows on tiny, zero and huge rows), unit vectors
at the rotations (cos and sin of every lane can be read off), random q, k and v at the attention (scale, mask, grouping),
a grid of values at the activation. The same again in calls of one token, each with a row of another kind: a decode
function may be another than prefill's. Rotations are also read at positions near 1e3, 1e4 and 1e5, attention also
behind 128, 256 and 4096 cached keys, as far as the model's own context reaches. A constant offset of all positions is
no fault: rotations are compared with the first token's, which stands at 0 however far the others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.checkpoint import Checkpoint, Geometry
from harness.engines import streams
from harness.graph.contract import NO_SHIFT, positions, rope_axis
from harness.probes import DECODER_OPS, Call, Reading, formulas
from harness.probes.bench import ULP, Worst, cache_for, decode, image_rows, lacks, narrow, of_row, reading, wide
from harness.probes.given import KINDS, Values, output
from harness.trace import layer_of

TEXT = "model.language_model"
FAR = (1_000, 10_000, 100_000)
NEAR = 4
"""Tokens at 0, 1, 2 .. of a call whose others stand far out: a ring or a table that ends too soon moves both alike."""
BEHIND = ((129, 5), (130, 1), (257, 5), (258, 1), (4100, 5), (4100, 1))
"""Calls of the length ladder: tokens in all, tokens in the call."""
BEFORE = 40
"""Tokens before a call of one token, whose row is one of the kinds of `bench.rows`."""
SPARE = 2
"""Slots behind the last token, which no call may touch."""
ROW = 1e-5
"""Share of a row's largest value that float32 sums over it may cost: 80 ulp, for rows of up to 1e5 values."""
NEEDS = {"input_norm": (), "post_norm": ("attn.out",), "attn.q_norm": ("input_norm",), "attn.k_norm": ("input_norm",),
         "attn.q_rope": ("attn.q_norm", "attn.k_norm", "attn.k_rope"),
         "attn.k_rope": ("attn.q_norm", "attn.k_norm", "attn.q_rope"),
         "attn.context": ("attn.q_rope", "attn.k_rope", "attn.v"), "mlp.act": ("mlp.gate", "mlp.up")}
NORMS, HEADS, TURNS = ("input_norm", "post_norm"), ("attn.q_norm", "attn.k_norm"), ("attn.q_rope", "attn.k_rope")
CACHE = ("kv.keys", "kv.values")


class Layers:
    """The calls that all readings share: an image prompt in one call, a few tokens far out, a few behind a long cache,
    and single ones. Each is read layer by layer; of several readings of an operation the worst stands."""

    def __init__(self, conversion: Any, checkpoint: Checkpoint, grid: tuple[int, int]) -> None:
        self.conversion, self.checkpoint, self.geometry = conversion, checkpoint, checkpoint.geometry
        self.missing = _missing(conversion, self.geometry)
        self.read = frozenset(seam for seam, missing in self.missing.items() if missing is None)
        self.found = Worst()
        self.weights = _Weights(checkpoint)
        self.calls = [Call(run.make, run.count, run.total + SPARE, 1 if run.shared else self.geometry.layers)
                      for run in self._runs(grid)] if self.read else []

    def readings(self) -> Iterator[Reading]:
        """Of every operation of every layer, of every layer's cache, and of the final norm."""
        for seam, missing in self.missing.items():
            yield missing or self.found[seam]

    def _runs(self, grid: tuple[int, int]) -> Iterator[Run]:
        geometry, slots = self.geometry, self.conversion.slots
        ids = np.concatenate([np.arange(3), geometry.vocab + np.arange(slots), np.arange(13)])
        shift, most = (3 + slots, slots - max(grid) // geometry.merge), geometry.max_positions
        everything = (*NORMS, *HEADS, *TURNS, "attn.context", "mlp.act", *CACHE)
        yield Run(self, ids, len(ids), shift, everything, cache_seed=5, seed=1, planes=positions(
            ids, geometry.vocab, *shift, grid[1] // geometry.merge))
        for place in sorted({min(place, most - 8) for place in FAR}):
            planes = np.tile(np.arange(8) + place * (np.arange(8) >= NEAR), (3, 1))
            yield Run(self, np.arange(8), 8, (NEAR, -place), TURNS, seed=2, planes=planes)
        total = BEFORE + 1
        for kind in range(KINDS):
            yield Run(self, np.arange(1), total, (NO_SHIFT, 0), (*NORMS, *HEADS, "mlp.act"), cache_seed=total, seed=4,
                      kind=kind)
        for total, count in sorted({(min(total, most), count) for total, count in BEHIND}):
            yield Run(self, np.arange(count), total, (NO_SHIFT, 0), ("attn.context", *CACHE), cache_seed=total, seed=3)


def _missing(conversion: Any, geometry: Geometry) -> dict[str, Reading | None]:
    """By seam, in order: what the conversion lacks to be read there, or None."""
    wanted = {f"decoder.layers.{layer:02d}.{op}": (layer, op) for layer in range(geometry.layers) for op in DECODER_OPS}
    missing = {seam: lacks(conversion, seam, *_needed(geometry, *place)) for seam, place in wanted.items()}
    for layer in range(geometry.layers):
        for part, name in enumerate(CACHE):
            found = lacks(conversion, _source(part, layer))
            missing[f"{name}.{layer:02d}"] = found and replace(found, seam=f"{name}.{layer:02d}")
    return missing | {"decoder.norm": lacks(conversion, "decoder.norm", output(geometry.layers - 1, geometry))}


def _needed(geometry: Geometry, layer: int, op: str) -> list[str]:
    """Seams that values must go in at, so that `op` can be read."""
    return [f"decoder.layers.{layer:02d}.{part}" for part in NEEDS[op]] + (
        [_before(layer, geometry)] if op in ("input_norm", "post_norm") else [])


def _before(layer: int, geometry: Geometry) -> str:
    return "decoder.embed" if layer == 0 else output(layer - 1, geometry)


class _Weights:
    """Weights in float64; those of one layer are kept, which several calls ask for in turn."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._layer, self._held = checkpoint, "", {}

    def __getitem__(self, name: str) -> np.ndarray:
        layer = ".".join(name.split(".")[:2])
        if layer != self._layer:
            self._layer, self._held = layer, {}
        if name not in self._held:
            self._held[name] = self._checkpoint.tensor(f"{TEXT}.{name}").double().numpy()
        return self._held[name]


class Run:
    """One call, and the tap of it: what went in at each seam and what came there, of the layer under way; tokens of the
    call and in all; the cache before and as it stands. With `kind`, of a single token whose rows are the kind-th of `KINDS`.
    """

    def __init__(self, bench: Layers, ids: np.ndarray, total: int, shift: tuple[int, int], ops: Sequence[str], *, seed: int,
                 cache_seed: int | None = None, kind: int | None = None, planes: np.ndarray | None = None) -> None:
        self.bench, self.ids, self.count, self.total, self.shift = bench, ids, len(ids), total, shift
        self.ops, self.seed, self.cache_seed, self.planes = ops, seed, cache_seed, planes
        # Layer by layer, one layer's memory serves all of them; a conversion that we did not write gets a whole cache.
        self.shared = streams(bench.conversion)
        self.values = Values(bench.geometry, self.count, seed, kind)
        self.seen: dict[str, np.ndarray] = {}
        self.came: set[str] = set()
        self.layer = 0
        self.left = [(layer, op) for layer in range(bench.geometry.layers) for op in ops
                     if (f"{op}.{layer:02d}" if op in CACHE else f"decoder.layers.{layer:02d}.{op}") in bench.read]

    def make(self) -> None:
        """The call."""
        bench = self.bench
        cache = cache_for(bench.geometry, self.total + SPARE, self.cache_seed, self.shared)
        layers = slice(0, 1 if self.shared else None)
        self.before = tuple(part[layers].numpy().copy() for part in cache)
        self.after = tuple(part.numpy() for part in cache)
        image = image_rows(bench.conversion, bench.geometry, self.seed)
        decode(bench.conversion, self.ids, self.total, image, self.shift, cache, self._tap)
        self.layer = bench.geometry.layers
        self._look(whole=True)
        if "decoder.norm" in bench.read and NORMS[0] in self.ops:
            bench.found.add(_final(self))
        self.seen, self.before, self.after = {}, (), ()

    def held(self, part: int, layer: int) -> np.ndarray:
        """Keys (0) or values (1) that a layer's cache held before the call, [slots, heads, lanes]."""
        return self.before[part][0 if self.shared else layer, 0].transpose(1, 0, 2)

    def _tap(self, name: str, value: Any) -> Any:
        layer = layer_of(name)
        if layer is None or layer > self.layer:
            self._look()
            self.layer = self.layer if layer is None else layer
        self.came.add(name)
        if name in self.bench.read:
            self.seen[name] = wide(value)
        return narrow(self.values[name], value) if name in self.values else value

    def _look(self, whole: bool = False) -> None:
        """Read what has come, and let go of it; whole: the call has ended, so what has not come is missing."""
        left = []
        for layer, op in self.left:
            needed = _shown(layer, op)
            # A cache of its own is read at the end: a later layer may have written where it must not.
            if whole or layer <= self.layer and (self.shared or op not in CACHE) and self.came.issuperset(needed):
                seam = f"{op}.{layer:02d}" if op in CACHE else needed[0]
                self.bench.found.add(_written(self, seam, CACHE.index(op), layer) if op in CACHE else
                                     READERS[op](self, layer, op))
            else:
                left.append((layer, op))
        self.left = left
        waited = {seam for layer, op in left for seam in _shown(layer, op)}
        self.seen = {seam: value for seam, value in self.seen.items() if seam in waited or seam == "decoder.norm"}
        self.values.forget(self.layer)


def _shown(layer: int, op: str) -> tuple[str, ...]:
    """The seams that must have come for an operation to be read."""
    name = f"decoder.layers.{layer:02d}"
    if op in CACHE:
        return (_source(CACHE.index(op), layer),)
    return tuple(f"{name}.{one}" for one in (op, *(turn for turn in TURNS if op in TURNS and turn != op)))


def _norm(run: Run, layer: int, op: str) -> Reading:
    held, geometry = "input_layernorm" if op == "input_norm" else "post_attention_layernorm", run.bench.geometry
    expected = formulas.rms_norm(run.values[_before(layer, geometry)],
                                 run.bench.weights[f"layers.{layer}.{held}.weight"], geometry.rms_eps)
    seam = f"decoder.layers.{layer:02d}.{op}"
    return reading(seam, run.seen[seam], expected, of_row(expected, ROW), "RMS norm of tiny, zero and huge rows")


def _final(run: Run) -> Reading:
    geometry = run.bench.geometry
    expected = formulas.rms_norm(run.values[output(geometry.layers - 1, geometry)], run.bench.weights["norm.weight"],
                                 geometry.rms_eps)
    return reading("decoder.norm", run.seen["decoder.norm"], expected, of_row(expected, ROW),
                   "RMS norm of tiny, zero and huge rows")


def _head_norm(run: Run, layer: int, op: str) -> Reading:
    """The norm behind a projection: its input cannot be put in, so it is computed from the checkpoint's weight."""
    geometry, weights, part = run.bench.geometry, run.bench.weights, op.split(".")[1][0]
    x = run.values[f"decoder.layers.{layer:02d}.input_norm"].astype(np.float64)
    projected = (x @ weights[f"layers.{layer}.self_attn.{part}_proj.weight"].T).reshape(run.count, -1, geometry.head_dim)
    expected = formulas.rms_norm(projected, weights[f"layers.{layer}.self_attn.{part}_norm.weight"], geometry.rms_eps)
    seam = f"decoder.layers.{layer:02d}.{op}"
    return reading(seam, run.seen[seam], expected, of_row(expected, 2 * ROW), "norm of heads, tiny ones among them")


def _rope(run: Run, layer: int, op: str) -> Reading:
    """Turn between each token's q (or k) and the first token's k (or q), lane by lane, from unit vectors.

    An angle of float32 is off by half an ulp of itself, so at position p a lane of frequency f may be off by 2^-23 p f.
    """
    geometry, name, planes = run.bench.geometry, f"decoder.layers.{layer:02d}", run.planes
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


def _turns(run: Run, name: str, part: str) -> np.ndarray:
    """cos + i sin of each token, head and lane, from rotated unit vectors: (1, 0) -> (c, s), (0, 1) -> (-s, c)."""
    first, second = np.split(run.seen[f"{name}.attn.{part}_rope"], 2, axis=-1)
    unit = run.values[f"{name}.attn.{part}_norm"][..., :1] == 1
    return np.where(unit, first + 1j * second, second - 1j * first)


def _attention(run: Run, layer: int, op: str) -> Reading:
    """Softmax over what went in and what the cache held. Scores of a few units lose a few ulp, and weights as much."""
    name, past = f"decoder.layers.{layer:02d}", run.total - run.count
    q, k, v = (run.values[f"{name}.attn.{part}"] for part in ("q_rope", "k_rope", "v"))
    keys, values = (np.concatenate([run.held(part, layer)[:past], new]) for part, new in enumerate((k, v)))
    visible = np.arange(past + run.count)[None] <= past + np.arange(run.count)[:, None]
    expected = formulas.attention(q, keys, values, run.bench.geometry.head_dim**-0.5, visible).reshape(run.count, -1)
    seam = f"{name}.{op}"
    return reading(seam, run.seen[seam].reshape(run.count, -1), expected, 1e-5 * np.abs(values).max(),
                   f"attention of {run.count} queries over {past + run.count} keys")


def _source(part: int, layer: int) -> str:
    """The seam whose value goes into the cache of keys (0) or values (1)."""
    return f"decoder.layers.{layer:02d}.attn.{('k_rope', 'v')[part]}"


def _written(run: Run, seam: str, part: int, layer: int) -> Reading:
    """The cache read back slot by slot: what went in stands in its slots, and every other slot is what it was."""
    expected = run.held(part, layer).astype(np.float64)
    expected[run.total - run.count:run.total] = run.values[_source(part, layer)]
    return reading(seam, run.after[part][layer, 0].transpose(1, 0, 2).astype(np.float64), expected, 8 * ULP,
                   f"cache slots behind a call of {run.count} tokens, {run.total} in all")


def _activation(run: Run, layer: int, op: str) -> Reading:
    name = f"decoder.layers.{layer:02d}"
    gate, up = run.values[f"{name}.mlp.gate"], run.values[f"{name}.mlp.up"]
    expected = formulas.silu(gate) * up
    return reading(f"{name}.{op}", run.seen[f"{name}.{op}"], expected, 4 * ULP * (1 + np.abs(expected)),
                   "silu(gate) * up on -8..8")


READERS: dict[str, Callable[[Run, int, str], Reading]] = {
    **dict.fromkeys(NORMS, _norm), **dict.fromkeys(HEADS, _head_norm), **dict.fromkeys(TURNS, _rope),
    "attn.context": _attention, "mlp.act": _activation}
