"""What is under test and what it is judged by, each made when first asked for and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import threads
from harness.bounds import BOUNDS, REPLAY, Bounds, load_bounds
from harness.cases import Case, load_cases
from harness.checkpoint import Checkpoint, open_checkpoint, read_json
from harness.errors import HarnessError, Undecided
from harness.geometry import Geometry
from harness.options import Options, factory_of, readable
from harness.policy import Policy, load_policy
from harness.shipped import Shipped
from harness.store import Oracle, OracleCase, open_oracle
from harness.trace import Trace, decoder_seams, vision_seams

if TYPE_CHECKING:
    from harness.bundle import Bundle
    from harness.cases import FrozenInputs
    from harness.engines import Request
    from harness.engines.program import Program
    from harness.engines.replay.angles import Angles
    from harness.engines.replay.precision import Taken
    from harness.engines.replay.program import Function
    from harness.host import Preprocessing
    from harness.engines.torch_graph import TorchGraph
    from harness.graph.contract import HostInputs
    from harness.graph.protocol import Conversion
    from harness.graph.reference import Reference

RECORDED = Path(__file__).resolve().parent.parent / "oracles" / "recorded"


def kept(method: Callable) -> Callable:
    """Compute once for each object and arguments, and remember it on the object, so that it goes when the object goes."""
    @wraps(method)
    def remember(self: Any, *arguments: Any) -> Any:
        key = (method.__name__, arguments)
        if key not in self.memory:
            self.memory[key] = method(self, *arguments)
        return self.memory[key]
    return remember


@dataclass
class Subject:
    """Lazy: asking for the plan of a rung opens the checkpoint's header and the cases, nothing else.

    `progress(step, done, total)` is called while long steps run.
    """

    options: Options
    progress: Callable[[str, int, int], None] = lambda step, done, total: None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint under conversion; its width decides how many threads torch may use."""
        with readable(self.options.checkpoint):
            found = open_checkpoint(self.options.checkpoint, self.options.revision)
        threads.settle(found.geometry)
        return found

    @property
    def geometry(self) -> Geometry:
        """Its geometry."""
        return self.checkpoint.geometry

    @cached_property
    def cases(self) -> dict[str, Case]:
        """Cases by name."""
        with readable(self.options.cases):
            return {case.name: case for case in load_cases(self.options.cases)}

    @cached_property
    def bounds(self) -> Bounds:
        """Bounds in force; by default with those of the replay engines, where one of them runs the bundle."""
        with readable(self.options.bounds):
            found = load_bounds(self.options.bounds)
        return found.beside(load_bounds(REPLAY)) if self.options.replays and self.options.bounds == BOUNDS else found

    @cached_property
    def policy(self) -> Policy:
        """Policy in force."""
        with readable(self.options.policy):
            return load_policy(self.options.policy)

    @cached_property
    def oracle(self) -> Oracle:
        """The oracle given, or one recorded (or resumed) now."""
        if self.options.oracle is not None:
            return open_oracle(self.options.oracle, self.checkpoint.digest, self.geometry.record())
        from harness.oracle import record

        return record(self.checkpoint, list(self.cases.values()), recorded_folder(self.checkpoint, self.options.device),
                      device=self.options.device, memory=self.options.memory,
                      progress=lambda what, done, total: self.progress("record", done, total))

    @property
    def by_sketch(self) -> bool:
        """Whether a sketch stands for the oracle."""
        return self.options.oracle is not None and not self.oracle.exact

    @property
    def has_oracle(self) -> bool:
        """Whether there is an oracle without recording one now."""
        return self.options.oracle is not None or "oracle" in self.__dict__

    @kept
    def recorded(self, case: str) -> OracleCase:
        """What the oracle holds of a case. Raises HarnessError where it lacks it or the case has changed since."""
        if case not in self.oracle.cases:
            raise HarnessError("the oracle has no such case", where=case, fix="record it again")
        changed = self.oracle.stale(self.cases[case])
        if changed:
            raise HarnessError(changed, where=case, fix="record the oracle again")
        found = self.oracle.case(case)
        flaw = found.flaw()
        if flaw:
            raise HarnessError(flaw, where=case, fix="record the oracle again")
        return found

    def sequence(self, case: str) -> np.ndarray:
        """Prompt and oracle rollout, HF ids [T + n] int64."""
        recorded = self.recorded(case)
        return np.concatenate([recorded.inputs.ids, recorded.rollout.tokens]).astype(np.int64)

    def regions(self, case: str) -> dict[str, np.ndarray]:
        """Token indices of the prompt and rollout: image and text apart."""
        image = self.sequence(case) == self.geometry.image_token
        return {"image": np.flatnonzero(image), "text": np.flatnonzero(~image)}

    def grid(self, case: str) -> tuple[int, int]:
        """Patch grid (rows, columns) the case needs; a text case runs on the bundle's."""
        grid = self.recorded(case).inputs.grid
        return (grid[1], grid[2]) if grid else self.options.grid

    def keep_cases(self, names: Sequence[str] | None) -> None:
        """Judge only the named cases. Raises HarnessError for a name that no case has."""
        unknown = sorted(set(names or ()) - set(self.cases))
        if unknown:
            raise HarnessError("no such case", where=unknown[0], fix=f"the cases are {', '.join(self.cases)}")
        if names:
            self.cases = {name: case for name, case in self.cases.items() if name in names}

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Image numbers of preprocessor_config.json: the bundle's own where it carries one, else the checkpoint's."""
        from harness.host import Preprocessing

        name = "preprocessor_config.json"
        root = self.tokenizer if (self.tokenizer / name).is_file() else self.checkpoint.root
        return Preprocessing.from_config(read_json(root / name))

    @property
    def tokenizer(self) -> Path:
        """Tokenizer directory that the host uses: the bundle's own where one was given."""
        given = self.bundle.tokenizer if self.options.bundle is not None else None
        return given or self.checkpoint.root

    @kept
    def decode_text(self, token: int) -> str:
        """Text of one token id."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    @cached_property
    def _tokenizer(self) -> Any:
        from harness.host import load_tokenizer

        return load_tokenizer(self.tokenizer)

    def image_cases(self) -> list[str]:
        """Names of the cases with an image."""
        return [name for name, case in self.cases.items() if case.images]

    def engine_cases(self) -> list[str]:
        """Names of the cases that the bundle runs too."""
        return [name for name, case in self.cases.items() if case.engine]

    # The host under test.

    def made_inputs(self, case: str) -> FrozenInputs:
        """What the host under test makes of a case."""
        from harness.host import host_inputs_for

        return host_inputs_for(self.cases[case], self.tokenizer, self.preprocessing)

    def made_patches(self, image: Any) -> tuple[np.ndarray, tuple[int, int, int]]:
        """What it makes of an RGB image: patches and grid."""
        from harness.host import make_patches

        return make_patches(image, self.preprocessing)

    @property
    def host(self) -> Callable[..., HostInputs]:
        """Its part of the contract: `harness.graph.contract.host_inputs`."""
        from harness.graph.contract import host_inputs

        return host_inputs

    # The graph under test.

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

    # The bundle under test, and its twin.

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

    # The engine, in the background: `start_engine` returns at once.

    def start_engine(self) -> None:
        """Begin the exports and, as soon as they are done, the runs of the bundles."""
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


def streams(conversion: Conversion) -> bool:
    """Whether a conversion reads its weights for each call: then calls are made together, and little of them is kept."""
    return getattr(conversion, "streams", False)


def recorded_folder(checkpoint: Checkpoint, device: str = "cpu") -> Path:
    """Where an oracle goes unless the user says otherwise: one folder for all that an oracle must not mix."""
    from harness.oracle.recording import identity
    from harness.store.identity import digest

    made_with = identity(checkpoint, device, "sdpa")
    return RECORDED / f"{checkpoint.name}-{digest(made_with.record())[:12]}"


def offered(subject: Subject, case: str, seams: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split seams into those that the graph under test offers on this case, and those it lacks."""
    have = frozenset(subject.conversion(subject.grid(case)).seams())
    return [seam for seam in seams if seam in have], [seam for seam in seams if seam not in have]
