"""The bundle under test: given or exported, its programs, and what its engine computes in the background."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from harness.errors import Undecided
from harness.shipped import Shipped
from harness.subject.given import kept
from harness.subject.twin import TwinSide
from harness.trace import Trace, decoder_seams, vision_seams

if TYPE_CHECKING:
    from harness.bundle import Bundle
    from harness.engines import Request
    from harness.engines.program import Program
    from harness.engines.replay.angles import Angles
    from harness.engines.replay.precision import Taken
    from harness.engines.replay.program import Function


class BundleSide(TwinSide):
    """The shipped bundle on its engine; of our own export also the sharp twin with float32 activations."""

    @cached_property
    def shipped(self) -> Shipped:
        """The bundle that is given, or that our export makes, on its engine."""
        mode = "" if self.options.bundle else self.mode
        return Shipped(self.options, self.geometry, mode, self._engine_requests)

    @cached_property
    def sharp(self) -> Shipped | None:
        """Our export's twin with float32 activations; None where the bundle is not ours, or replay runs it, whose
        arithmetic is a choice without a second export."""
        if self.options.bundle is not None or self.options.replays is not None:
            return None
        return Shipped(self.options, self.geometry, self.mode, self._engine_requests, "fp32")

    @property
    def bundle(self) -> Bundle:
        """The bundle under test."""
        return self.shipped.bundle

    @property
    def vision_bundle(self) -> Bundle | None:
        """The vision bundle that goes with it, or None."""
        return self.shipped.vision

    @kept
    def programs(self) -> tuple[Program, ...]:
        """Constants and attributes of both programs, decoder first. Raises Undecided without a vision bundle."""
        from harness.engines.program import read_constants

        if self.vision_bundle is None:
            raise Undecided("no vision bundle was given, so its weights cannot be audited", fix="give --vision-bundle")
        return tuple(read_constants(bundle.asset) for bundle in (self.bundle, self.vision_bundle))

    @kept
    def functions(self) -> dict[str, Function]:
        """Tower -> main function of its program, as replay reads it, decoder first."""
        from harness.engines.replay.program import read_program

        bundles = {"decoder": self.bundle, "vision": self.vision_bundle}
        return {tower: read_program(bundle.asset, check=False).main for tower, bundle in bundles.items() if bundle}

    def rotations(self) -> Angles:
        """What the program turns queries and keys by. Raises HarnessError where it does not show that."""
        from harness.engines.replay.angles import Angles

        return Angles(self.functions()["decoder"])

    def taken(self) -> list[Taken]:
        """In which types the programs take norms and softmaxes. Raises HarnessError where they cannot be read."""
        from harness.engines.replay.precision import taken

        return taken(self.functions())

    @property
    def mode(self) -> str:
        """Quantization mode: as a given bundle's metadata says, as asked for where it does not, or int8hu for our own."""
        from harness.bundle import UNKNOWN_MODE

        if self.options.bundle is None:
            return self.options.mode or "int8hu"
        return self.bundle.mode if self.bundle.mode != UNKNOWN_MODE else self.options.mode or UNKNOWN_MODE

    # The engine, in the background: `start_engine` returns at once.

    def start_engine(self) -> None:
        """Begin the exports and, as soon as they are done, the runs of the bundles.

        Where weights are too large to be held, memory and disk are for one at a time: each then begins when asked for.
        """
        if self.twin_streams():
            return
        for bundle in filter(None, (self.shipped, self.sharp)):
            bundle.start()

    @kept
    def _engine_requests(self) -> dict[str, Request]:
        """What the engine runs; computed here, because the memory of a Subject is not shared between threads."""
        from harness.engines import Request

        seams = frozenset((*vision_seams(self.geometry), *decoder_seams(self.geometry)))
        return {case: Request(self.recorded(case).inputs, forced=self.twin_tokens(case), seams=seams, kv=True)
                for case in self.engine_cases()}

    def engine_trace(self, case: str) -> Trace:
        """What the bundle computed for a case. Raises Undecided where the runtime did not get that far."""
        return self.shipped.trace(case)

    @property
    def engine_key(self) -> str:
        """What the bounds of the engine and tokens rungs belong to."""
        self.shipped.mode = self.mode
        return self.shipped.key

    def close(self) -> None:
        """End what still runs in the background."""
        for name in ("shipped", "sharp"):
            if self.__dict__.get(name) is not None:
                self.__dict__[name].stop()
