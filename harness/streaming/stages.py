"""What is in memory together, and where its weights hang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.geometry import Geometry

HEAD_BYTES = 1 << 27
"""Bytes of the head in float32 that make one stage."""


@dataclass(frozen=True)
class Place:
    """A tensor of the checkpoint and the modules whose parameter `attribute` it is (none: it hangs nowhere)."""

    owners: tuple[nn.Module, ...]
    attribute: str
    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """name: of its part in the store. modules: in the order they are called. rows: of the head's matrix, or None."""

    name: str
    modules: tuple[nn.Module, ...]
    places: tuple[Place, ...]
    rows: tuple[int, int] | None = None

    @property
    def elements(self) -> int:
        """Weights, each on a boundary of 64 bytes."""
        return sum(aligned(place.shape) for place in self.places)


def aligned(shape: Sequence[int]) -> int:
    """Elements that a tensor takes in a slot."""
    return -(-int(torch.Size(shape).numel()) // 16) * 16


def module_stage(names: Mapping[int, str], name: str, modules: Sequence[nn.Module]) -> Stage:
    """A stage of whole modules. names: path of each module by id; with it its parameters' names in the checkpoint begin."""
    places = [Place((owner,), attribute, f"{names[id(owner)]}.{attribute}", tuple(parameter.shape))
              for module in modules for owner in module.modules()
              for attribute, parameter in owner._parameters.items() if parameter is not None]
    return Stage(name, tuple(modules), tuple(places))


def tower_stages(geometry: Geometry, visual: nn.Module, text: nn.Module, names: Mapping[int, str]) -> list[Stage]:
    """Stages of both towers in order; mergers go with the block that feeds them, the final norm is last."""
    stages = []
    for number, block in enumerate(visual.blocks):
        modules = [block]
        if number == 0:
            modules = [getattr(visual, name) for name in ("patch_embed", "pos_embed") if hasattr(visual, name)] + modules
        if number in geometry.deepstack_taps:
            modules.append(visual.deepstack_merger_list[geometry.deepstack_taps.index(number)])
        if number == geometry.vision_layers - 1:
            modules.append(visual.merger)
        stages.append(module_stage(names, f"vision.{number:02d}", modules))
    for number, layer in enumerate(text.layers):
        stages.append(module_stage(names, f"decoder.{number:02d}", [layer]))
    return [*stages, module_stage(names, "norm", [text.norm])]


def head_stages(geometry: Geometry, source: str, *owners: nn.Module) -> list[Stage]:
    """The head in blocks of rows, their size given by the width alone; source: the tensor it is; owners: the modules whose
    weight a block becomes, where the product is theirs to make."""
    step = head_rows(geometry)
    blocks = [(first, min(first + step, geometry.vocab)) for first in range(0, geometry.vocab, step)]
    return [Stage(f"logits.{number:03d}", (), (Place(owners, "weight", source, (rows[1] - rows[0], geometry.hidden)),), rows)
            for number, rows in enumerate(blocks)]


def head_rows(geometry: Geometry) -> int:
    """Rows of the head in one stage."""
    return min(geometry.vocab, max(1, HEAD_BYTES // (4 * geometry.hidden)))
