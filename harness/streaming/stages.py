"""What is in memory together, and where its weights hang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


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
    """A stage of whole modules. names: path of each module by id, which its parameters' names in the checkpoint begin with."""
    places = [Place((owner,), attribute, f"{names[id(owner)]}.{attribute}", tuple(parameter.shape))
              for module in modules for owner in module.modules()
              for attribute, parameter in owner._parameters.items() if parameter is not None]
    return Stage(name, tuple(modules), tuple(places))
