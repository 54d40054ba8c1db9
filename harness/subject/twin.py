"""The twin: our graph with the weights that the bundle should hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import Undecided
from harness.subject.given import Given, kept
from harness.trace import Trace

if TYPE_CHECKING:
    from harness.engines.torch_graph import TorchGraph
    from harness.graph.reference import Reference


class TwinSide(Given):
    """What the bundle should compute."""

    @kept
    def twin(self, grid: tuple[int, int]) -> Reference:
        """Our graph with the weights that the bundle should hold: quantized as its mode says, widened to float32."""
        from harness.graph.quantize import RECIPES, twin_weights
        from harness.graph.reference import Reference

        if self.mode not in RECIPES:
            raise Undecided(f"quantization mode {self.mode!r} is not known, so no twin can be made",
                            where=self.bundle.path, fix=f"known are {', '.join(RECIPES)}")
        recipe = RECIPES[self.mode]
        return Reference(recipe.geometry(self.geometry), grid, twin_weights(self.checkpoint, recipe))

    def _twin_engine(self, case: str) -> TorchGraph:
        from harness.engines.torch_graph import TorchGraph

        return TorchGraph(self.twin(self.grid(case)), self.geometry, name="twin-fp32")

    @kept
    def twin_tokens(self, case: str) -> tuple[int, ...]:
        """The twin's own greedy rollout, as long as the oracle's: what python says."""
        from harness.engines import Request

        recorded = self.recorded(case)
        request = Request(recorded.inputs, free=len(recorded.rollout.tokens))
        return tuple(next(self._twin_engine(case).run([request])).facts["tokens"])

    @kept
    def twin_trace(self, case: str, tokens: tuple[int, ...]) -> Trace:
        """The twin over prompt and `tokens`, at every seam, the cache included."""
        from harness.engines import Request

        engine = self._twin_engine(case)
        request = Request(self.recorded(case).inputs, forced=tokens, seams=engine.seams(), kv=True)
        return next(engine.run([request]))
