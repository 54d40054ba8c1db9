"""The graph under test: the conversion for a grid, the engine that runs it, and what it computes for a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.engines import streams
from harness.options import factory_of
from harness.subject.given import Given, kept
from harness.trace import Trace, decoder_seams, vision_seams

if TYPE_CHECKING:
    from harness.engines.torch_graph import TorchGraph
    from harness.graph.protocol import Conversion


class GraphSide(Given):
    """The torch graph of `--graph`, in float32."""

    @kept
    def conversion(self, grid: tuple[int, int]) -> Conversion:
        """The graph under test for one grid, in float32."""
        from harness.graph.protocol import accepted

        return accepted(factory_of(self.options.graph)(self.checkpoint.root, grid), self.geometry)

    def graph(self, case: str, **settings: Any) -> TorchGraph:
        """The engine that runs the graph under test on a case's grid."""
        from harness.engines.torch_graph import TorchGraph

        return TorchGraph(self.conversion(self.grid(case)), self.geometry, **settings)

    @kept
    def graph_trace(self, case: str, way: str) -> Trace:
        """The graph over prompt and oracle rollout at all seams it offers; way "local" injects the oracle's stream."""
        from harness.engines import Request

        recorded, engine = self.recorded(case), self.graph(case)
        stream = [*vision_seams(self.geometry), *decoder_seams(self.geometry)]
        wanted = {*stream, "decoder.positions"} if streams(engine.conversion) else engine.seams()
        request = Request(recorded.inputs, forced=tuple(map(int, recorded.rollout.tokens)),
                          seams=frozenset(wanted) & engine.seams())
        return next(engine.run([request], inject=recorded.trace if way == "local" else None, inject_at=stream))


def offered(subject: GraphSide, case: str, seams: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split seams into those that the graph under test offers on this case, and those it lacks."""
    have = frozenset(subject.conversion(subject.grid(case)).seams())
    return [seam for seam in seams if seam in have], [seam for seam in seams if seam not in have]
