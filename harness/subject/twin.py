"""The twin: our graph with the weights that the bundle should hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.engines import Request
from harness.errors import Undecided
from harness.subject.given import Given, kept
from harness.subject.sweeps import for_all
from harness.trace import Trace

if TYPE_CHECKING:
    from harness.bundle import Bundle
    from harness.engines.torch_graph import Sink, TorchGraph
    from harness.graph.reference import Reference


class TwinSide(Given):
    """What the bundle should compute: our graph with dequantized weights; of a large checkpoint it streams."""

    if TYPE_CHECKING:
        mode: str
        bundle: Bundle

    @kept
    def twin(self, grid: tuple[int, int]) -> Reference:
        """Our graph with the weights that the bundle should hold: quantized as its mode says, widened to float32."""
        from harness.graph.quantize import RECIPES
        from harness.graph.twin import twin

        if self.mode not in RECIPES:
            raise Undecided(f"quantization mode {self.mode!r} is not known, so no twin can be made",
                            where=self.bundle.path, fix=f"known are {', '.join(RECIPES)}")
        return twin(self.checkpoint, RECIPES[self.mode], grid)

    def twin_streams(self) -> bool:
        """Whether the twin's weights are read for each call: then its calls are made together, and judged as they come."""
        from harness.graph.reference import large

        return large(self.checkpoint)

    def twin_engine(self, case: str) -> TorchGraph:
        """The engine that runs the twin on a case's grid."""
        from harness.engines.torch_graph import TorchGraph

        return TorchGraph(self.twin(self.grid(case)), self.geometry, name="twin-fp32")

    def oracle_tokens(self, case: str) -> tuple[int, ...]:
        """What the oracle chose: the draft of the twin's own."""
        return tuple(map(int, self.recorded(case).rollout.tokens))

    def twin_tokens(self, case: str) -> tuple[int, ...]:
        """The twin's own greedy rollout, as long as the oracle's: what python says. Of a twin that streams, all at once."""
        if ("twin_tokens", case) not in self.memory:
            if self.twin_streams():
                self.keep_twin_tokens(for_all(self, "the twin's tokens", self.twin, lambda name: self.verify_twin(
                    name, lambda seam, values: None, frozenset())))
            else:
                self.keep_twin_tokens({case: self.twin_trace(case, self.oracle_tokens(case)).facts["tokens"]})
        return self.memory["twin_tokens", case]

    def keep_twin_tokens(self, found: Mapping[str, Sequence[int]]) -> None:
        """Remember rollouts that were made beside something else."""
        self.memory |= {("twin_tokens", case): tuple(tokens) for case, tokens in found.items()}

    def verify_twin(self, case: str, sink: Sink, seams: frozenset[str]) -> list[int]:
        """The twin over prompt and the oracle's tokens; its values at `seams` go to the sink, its own tokens come back."""
        request = Request(self.recorded(case).inputs, forced=self.oracle_tokens(case), seams=seams)
        return self.twin_engine(case).verified(request, sink).facts["tokens"]

    @kept
    def twin_trace(self, case: str, tokens: tuple[int, ...]) -> Trace:
        """The twin over prompt and `tokens`, at every seam, the cache included; `facts["tokens"]` are its greedy ones.

        All of it is held: of a twin that streams, ask for some seams only.
        """
        engine = self.twin_engine(case)
        request = Request(self.recorded(case).inputs, forced=tokens, seams=engine.seams(), kv=True)
        return engine.verified(request)
