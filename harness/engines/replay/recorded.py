"""One token a call on a GPU without its launches: the call is recorded once (a CUDA graph) and replayed for every token.

The recorded call reads the cache up to a fixed count of slots (`padding`); when a conversation outgrows it, the next is
recorded. A replayed call writes the states that it was recorded with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.engines.replay.compile import Compiled

SLOTS = 256
"""The cache is read in steps of so many slots: a recording takes about as long as two plain calls."""


class Recorded:
    """Calls of one conversation. run: compiled with `padded`; fixed: its inputs besides ids and positions."""

    def __init__(self, run: Compiled, states: Mapping[str, Tensor], fixed: Mapping[str, Tensor], context: int) -> None:
        self.run, self.states, self.fixed, self.context = run, states, fixed, context
        self.ids = torch.zeros(1, 1, dtype=torch.int32, device=run.device)
        self.newest = torch.zeros(1, dtype=torch.int64, device=run.device)
        self.ramp = torch.arange(context, dtype=torch.int32, device=run.device)[None]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def call(self, token: Tensor, place: int) -> Tensor:
        """Logits [1, V] of one token at a place; valid until the next call."""
        self.ids.copy_(token.reshape(1, 1))
        self.newest.fill_(place)
        slots = min(-(-(place + 1) // SLOTS) * SLOTS, self.context)
        if slots not in self._graphs:
            self._graphs[slots] = self._record(slots)
        graph, logits = self._graphs[slots]
        graph.replay()
        return logits

    def plain(self, slots: int) -> Tensor:
        """The same call without a recording. Repeating it changes nothing: it writes the same row again."""
        outputs, _ = self.run(self.states, input_ids=self.ids, position_ids=self.ramp[:, :slots], newest=self.newest,
                              **self.fixed)
        return outputs["logits"][0]

    def _record(self, slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries choose their kernels and workspaces before anything is recorded
            for _ in range(2):
                self.plain(slots)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.plain(slots)
        return graph, logits
