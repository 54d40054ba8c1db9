"""What probes of the decoder put in at each seam: made from a seed when it is asked for, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from harness.geometry import Geometry
from harness.probes.bench import rows
from harness.trace import layer_of

KINDS = 6
"""Kinds of rows of `bench.rows`."""
GIVEN = ("input_norm", "attn.out", "attn.q_norm", "attn.k_norm", "attn.q_rope", "attn.k_rope", "attn.v", "mlp.gate",
         "mlp.up")
"""Where in a layer values go in."""


def output(layer: int, geometry: Geometry) -> str:
    """The seam whose value enters the next layer."""
    return f"decoder.layers.{layer:02d}" + (".deepstack" if layer < len(geometry.deepstack_taps) else "")


class Values(Mapping[str, np.ndarray]):
    """What goes in at each seam, float32; the inside of a layer is made when the layer comes."""

    def __init__(self, geometry: Geometry, count: int, seed: int, kind: int | None) -> None:
        self._geometry, self._seed, self._kind = geometry, seed, kind
        self._count = count if kind is None else KINDS
        self._streams = {"decoder.embed": seed} | {output(layer, geometry): seed + 7 * layer + 1
                                                   for layer in range(geometry.layers)}
        self._inside: dict[int, dict[str, np.ndarray]] = {}

    def forget(self, layer: int) -> None:
        """A layer that has passed."""
        self._inside.pop(layer, None)

    def __getitem__(self, name: str) -> np.ndarray:
        layer = layer_of(name)
        if name in self._streams:
            made = rows(self._count, self._geometry.hidden, self._streams[name])
        elif layer is None or name.split(".", 3)[3] not in GIVEN:
            raise KeyError(name)
        else:
            if layer not in self._inside:
                self._inside[layer] = self._make(layer)
            made = self._inside[layer][name.split(".", 3)[3]]
        return made if self._kind is None else made[self._kind:self._kind + 1]

    def __contains__(self, name: object) -> bool:
        return name in self._streams or (str(name).startswith("decoder.layers.") and
                                         ".".join(str(name).split(".")[3:]) in GIVEN)

    def __iter__(self) -> Iterator[str]:
        inside = (f"decoder.layers.{layer:02d}.{part}" for layer in range(self._geometry.layers) for part in GIVEN)
        return iter((*self._streams, *inside))

    def __len__(self) -> int:
        return len(self._streams) + self._geometry.layers * len(GIVEN)

    def _make(self, layer: int) -> dict[str, np.ndarray]:
        geometry, count = self._geometry, self._count
        generator = np.random.default_rng((self._seed, layer))
        made = {"input_norm": 10.0 ** generator.uniform(-4, 0, (count, 1)) * generator.standard_normal(
            (count, geometry.hidden)), "attn.out": np.zeros((count, geometry.hidden))}
        parity = np.arange(count)[:, None, None]
        for part, heads in (("q", geometry.heads), ("k", geometry.kv_heads)):
            second = (parity + np.arange(heads)[None, :, None]) % 2
            lanes = np.arange(geometry.head_dim)[None, None] >= geometry.head_dim // 2
            made[f"attn.{part}_norm"] = (lanes == second).astype(np.float32)
            made[f"attn.{part}_rope"] = generator.standard_normal((count, heads, geometry.head_dim))
        made["attn.v"] = generator.standard_normal((count, geometry.kv_heads, geometry.head_dim))
        made["mlp.gate"] = generator.uniform(-8, 8, (count, geometry.intermediate))
        made["mlp.up"] = generator.uniform(0.5, 1.5, (count, geometry.intermediate))
        return {name: made[name].astype(np.float32) for name in GIVEN}
