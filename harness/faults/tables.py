"""A bundle's tables as the recipe says they must lie, made without exporting: what quantization faults change.

Its programs answer as `harness.engines.program.Program` does (`weights`, `attributes`), so the rung reads them like real ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.graph.decoder import MASKED
from harness.graph.norms import inverse_frequencies
from harness.graph.quantize import RECIPES, expected_codes, planned_weights
from harness.graph.reference import POSITIONS, PATCH
from harness.graph.vision import LAYER_NORM_EPS, interpolate_positions, rotary_tables
from harness.subject import Subject

OURS = ("rope.inv_freq", "vision.cos", "vision.sin")
"""Names of tables that no checkpoint holds."""


@dataclass
class Table:
    """plain [o, i] or [n] float16, or codes [o, i] int8 with scale and offset [o, i / block] float16 and int8."""

    name: str
    at: int
    plain: np.ndarray | None = None
    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the table as the program computes with it."""
        return self.plain.shape if self.codes is None else self.codes.shape

    @property
    def stored(self) -> str:
        """As `program.Weight.stored` says it."""
        if self.codes is None:
            return {"float16": "f16", "float32": "f32"}[str(self.plain.dtype)]
        return f"si8 x f16/{self.codes.shape[1] // self.scale.shape[1]}"

    @property
    def uses(self) -> tuple[Any, ...]:
        """One use, at the tensor's place in the order of computation."""
        return (SimpleNamespace(at=self.at, op="broadcasting_batch_matmul", writes=0),)

    def rows(self, start: int = 0, stop: int | None = None, columns: int | None = None) -> np.ndarray:
        """scale * (codes - offset), each product rounded to fp16 once; see `harness.tables.Table`."""
        if self.codes is None:
            return self.plain[start:stop, :columns] if self.plain.ndim > 1 else self.plain[start:stop]
        block = self.codes.shape[1] // self.scale.shape[1]
        scale, offset = (np.repeat(part[start:stop], block, axis=1) for part in (self.scale, self.offset))
        return (scale * (self.codes[start:stop].astype(np.float16) - offset.astype(np.float16)))[:, :columns]

    def digits(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Codes and scales of these rows, where no offset moves them."""
        if self.codes is None or self.offset.any():
            return None
        return self.codes[start:stop], self.scale[start:stop]


@dataclass
class Tables:
    """Tables by checkpoint name, and under names of their own those that no checkpoint holds; attributes of each program."""

    subject: Subject
    tables: dict[str, Table] = field(default_factory=dict)
    decoder: list[dict[str, Any]] = field(default_factory=list)
    vision: list[dict[str, Any]] = field(default_factory=list)

    def programs(self) -> tuple[SimpleNamespace, SimpleNamespace]:
        """Decoder and vision program, tables in order of use."""
        ordered = sorted(self.tables.values(), key=lambda table: table.at)
        parts = ([table for table in ordered if table.name.startswith(("model.visual", "vision.")) is wanted]
                 for wanted in (False, True))
        return tuple(SimpleNamespace(weights=tables, attributes=attributes)
                     for tables, attributes in zip(parts, (self.decoder, self.vision)))

    def values(self) -> dict[str, Tensor]:
        """What the bundle computes with, by checkpoint name and in the checkpoint's shapes, float16."""
        found = {}
        for name, table in self.tables.items():
            if name in OURS:
                continue
            tensor = torch.from_numpy(np.array(table.rows(), dtype=np.float16))
            found[name] = tensor.reshape(self.subject.checkpoint.tensor(name).shape) if name == PATCH else tensor
        found[POSITIONS] = self.subject.checkpoint.tensor(POSITIONS).half()
        return found


def ship(subject: Subject) -> Tables:
    """What a healthy export of this checkpoint in this mode holds."""
    shipped, grid = Tables(subject), subject.options.grid
    planned = list(planned_weights(subject.checkpoint, RECIPES[subject.mode]))
    for at, (name, weight, scheme) in enumerate(sorted(planned, key=lambda row: _order(row[0]))):
        if name == POSITIONS:
            weight = interpolate_positions(weight, *grid, subject.geometry.merge).to(torch.float16)
        flat = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight
        if scheme is None:
            shipped.tables[name] = Table(name, at, plain=flat.numpy().copy())
            continue
        codes, scale = (part.numpy() for part in expected_codes(flat, scheme))
        shipped.tables[name] = Table(name, at, codes=codes.copy(), scale=scale.copy(),
                                     offset=np.zeros(scale.shape, np.int8))
    geometry = subject.geometry
    cos, sin = rotary_tables(*grid, geometry.merge, geometry.vision_hidden // geometry.vision_heads)
    ours = inverse_frequencies(geometry.rope_theta, geometry.head_dim // 2), cos, sin
    shipped.tables |= {name: Table(name, 0, plain=table.numpy().copy()) for name, table in zip(OURS, ours)}
    shipped.decoder, shipped.vision = attributes(subject)
    return shipped


def attributes(subject: Subject) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The scalars of both programs as our exporter writes them: decoder, vision."""
    geometry = subject.geometry
    size = geometry.vision_hidden // geometry.vision_heads
    norms = 4 * geometry.layers + 1, 2 * geometry.vision_layers + 1 + len(geometry.deepstack_taps)
    decoder = ("eps", geometry.rms_eps, norms[0]), ("scale", geometry.head_dim**-0.5, geometry.layers), (
        "fill", MASKED, geometry.layers)
    vision = ("eps", LAYER_NORM_EPS, norms[1]), ("scale", size**-0.5, geometry.vision_layers), (
        "approximate", "tanh", geometry.vision_layers), ("approximate", "none", 1 + len(geometry.deepstack_taps))
    return tuple([{"name": name, "value": value} for name, value, count in rows for _ in range(count)]
                 for rows in (decoder, vision))


def _order(name: str) -> tuple[bool, int, str]:
    layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    tower = not name.startswith("model.visual")
    first = -1 if "embed" in name else 1 << 20
    return tower, int(layer[1]) if layer else first, name
