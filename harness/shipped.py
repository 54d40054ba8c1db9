"""A bundle under test with the engine that runs it, made in the background: given by the user, or exported by us.

Of our own export there is a second one, the *sharp* twin: the same codes, scales and weights with float32 activations.
The Linux runtime rounds every fp16 sum, so only the sharp one shows a fault of structure that is smaller than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.background import EngineJob, ExportJob
from harness.bounds import engine_key
from harness.bundle import VISION, Bundle
from harness.engines import Engine, Request
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.options import Options
from harness.trace import Trace

if TYPE_CHECKING:
    from harness.engines.coreai import CoreAIEngine


class Shipped:
    """Lazy and, once started, concurrent: nothing here waits before something is asked for.

    mode: of an export of ours. requests: what the engine is to run, by case, computed when the engine is started.
    """

    def __init__(self, options: Options, geometry: Geometry, mode: str, requests: Callable[[], Mapping[str, Request]],
                 activations: str = "fp16") -> None:
        self.options, self.geometry, self.mode, self.activations = options, geometry, mode, activations
        self._requests = requests

    @cached_property
    def export(self) -> ExportJob:
        """Our own export, begun when first asked for."""
        options = self.options
        source = [options.checkpoint] if options.checkpoint else []
        revision = ["--revision", options.revision] if options.revision else []
        words = [*source, *revision, "--mode", self.mode, "--grid",
                 "x".join(map(str, options.grid)), "--context", str(options.context), "--activations", self.activations]
        return ExportJob(words, options.work / "bundles")

    @cached_property
    def bundle(self) -> Bundle:
        """The decoder's bundle."""
        return Bundle.open(self.options.bundle or Path(self.export.result()["decoder"]))

    @cached_property
    def vision(self) -> Bundle | None:
        """The vision bundle that goes with it: given, exported, or None."""
        path = self.options.vision_bundle
        if path is None and self.options.bundle is None:
            path = Path(self.export.result()["vision"])
        return Bundle.open(path, VISION) if path else None

    def start(self) -> None:
        """Begin the export and, as soon as that is done, the runs."""
        if self.options.bundle is None:
            _ = self.export
        _ = self._job

    @property
    def there(self) -> bool:
        """Whether there is a bundle without making one now."""
        return self.options.bundle is not None or "export" in self.__dict__

    @property
    def started(self) -> bool:
        """Whether the engine was asked for."""
        return "_job" in self.__dict__

    @cached_property
    def _job(self) -> EngineJob:
        return EngineJob(self._make_engine, self._requests())

    def _make_engine(self) -> Engine:
        index = self.bundle.path.with_name(self.bundle.path.name + ".seams.json")
        settings: dict[str, Any] = {
            "geometry": self.geometry, "grid": self.options.grid, "context": self.bundle.max_context_length,
            "seam_index": index if index.exists() else None, "timeout_s": self.options.timeout_s}
        vision = self.vision.asset if self.vision else None
        if self.options.replays is None:
            from harness.engines.coreai import CoreAIEngine

            return CoreAIEngine(self.bundle.asset, vision, **settings)
        from harness.engines.replay.engine import ReplayEngine

        return ReplayEngine(self.bundle.asset, vision, arithmetic=self.options.replays, device=self.options.device,
                            **settings)

    def trace(self, case: str) -> Trace:
        """What the bundle computed for a case. Raises HarnessError or Undecided where it did not get that far."""
        return self._job.trace(case)

    @cached_property
    def engine(self) -> CoreAIEngine:
        """The engine, once it has run a case. Raises what kept it from running any."""
        problem: HarnessError | None = None
        for case in self._job.cases:
            try:
                self._job.trace(case)
                return self._job.engine
            except HarnessError as error:
                problem = problem or error
        raise problem or HarnessError("no case runs on the engine", fix="leave engine = true on one of the cases")

    @property
    def key(self) -> str:
        """What bounds on this engine belong to: engine, mode, activations where they are wide, and width."""
        return engine_key(self.engine.name, self.mode, self.geometry.hidden, self.activations == "fp32")

    def stop(self) -> None:
        """End what still runs."""
        if "export" in self.__dict__:
            self.export.stop()
