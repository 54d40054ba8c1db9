"""A model that Hugging Face has loaded whole, as a source of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from harness.streaming.stages import Stage


class Resident:
    """A model that is loaded whole, on one device or several: nothing to read, nothing to take away."""

    keep = True

    def __init__(self, model: nn.Module) -> None:
        self._head = model.lm_head.weight

    def stages(self, wanted: Sequence[Stage]) -> Iterator[tuple[Stage, list[Tensor]]]:
        """See `harness.streaming.weights.Source`."""
        for stage in wanted:
            yield stage, [self._head[slice(*stage.rows)]] if stage.rows else []

    def place_all(self, stages: Sequence[Stage]) -> list[Tensor]:
        """The head's blocks; all else is in place."""
        return [tensor for _, tensors in self.stages(stages) for tensor in tensors]
