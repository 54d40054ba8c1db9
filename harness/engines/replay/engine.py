"""The engine that runs a bundle's own program in torch: proof of what the shipped bytes mean, not of what a device does.

Its name says the arithmetic: `replay-fp32-cpu`, `replay-fp16-cuda`, `replay-coreai-cpu`.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.bundle import check_asset
from harness.cases import FrozenInputs
from harness.engines import Request
from harness.engines.program import DTYPES
from harness.engines.replay.arithmetic import Arithmetic, Fp16
from harness.engines.replay.arithmetics import arithmetic as arithmetic_of
from harness.engines.replay.compile import Constants, compiled
from harness.engines.replay.contract import EMBEDS, check_vision
from harness.engines.replay.decoder import ORDERS, Conversation, Decoder
from harness.engines.replay.program import Function, Program, Value, read_program
from harness.engines.replay.seams import Taps, taps_of
from harness.engines.requests import checked, image_name
from harness.errors import HarnessError, Undecided, within
from harness.geometry import Geometry
from harness.graph.contract import HostInputs
from harness.trace import Trace

PROVEN = "proven against Core AI runtime coreai-core 1.0.0b3 on Linux x86_64"
"""What `tests/test_replay_proof.py` proves bit for bit; not that anything ran on a device."""
Embeds = Callable[[FrozenInputs], tuple[np.ndarray, np.ndarray]]


class ReplayEngine:
    """Satisfies `harness.engines.Engine`.

    decoder, vision: `.aimodel` directories. arithmetic: fp32, fp16 or coreai-cpu. device: cpu or cuda. dense: hold every
    matrix as computed with, which is faster token by token and takes 2 or 4 bytes a weight; by default where they take
    less than 2 GiB, or on a GPU. order: of a program of one token a call, `layers` (many tokens a pass) or `steps`; by
    default layers where the structure allows it (`facts["order"]` says why not).
    prefill: full chunks of the prompt go through the function `prefill` beside the main one; inner seams are then not read.
    chunk: tokens a pass or a call takes at most. Other parameters as of `harness.engines.coreai.CoreAIEngine`.
    Raises HarnessError for a name that is not known, and Undecided where torch has no such device.
    """

    def __init__(self, decoder: Path, vision: Path | None = None, *, geometry: Geometry,
                 grid: tuple[int, int] = (28, 28), context: int | None = None, seam_index: Path | None = None,
                 embeds: Embeds | None = None, arithmetic: str = "fp32", device: str = "cpu", dense: bool | None = None,
                 order: str | None = None, prefill: bool = False, chunk: int | None = None, timeout_s: float = 900.0, tmp: Path | None = None) -> None:
        self.arithmetic: Arithmetic = arithmetic_of(arithmetic)
        if order not in (None, *ORDERS):
            raise HarnessError(f"{order!r} is not known", where="order", fix=f"known are {', '.join(ORDERS)}")
        if device != "cpu" and arithmetic.endswith("-cpu"):
            raise HarnessError(f"the arithmetic {arithmetic} runs on a CPU only", where=device, fix="use --device cpu")
        if device != "cpu" and not torch.cuda.is_available():
            raise Undecided(f"torch finds no device {device!r} here", fix="use --device cpu")
        self.decoder, self.vision = Path(decoder).resolve(), Path(vision).resolve() if vision else None
        self.geometry, self.grid, self.context, self.embeds = geometry, grid, context, embeds
        self.device, self.dense, self.order, self.chunk, self.prefill = device, dense, order, chunk, prefill
        self.timeout_s, self.tmp, self.seam_index = timeout_s, tmp, seam_index
        self.name = f"replay-{arithmetic}" if arithmetic.endswith("-cpu") else f"replay-{arithmetic}-{device}"
        self.facts: dict[str, Any] = {}
        """Of the last run; see `harness.engines.coreai.CoreAIEngine.facts`."""

    @cached_property
    def program(self) -> Program:
        """The decoder's program."""
        return read_program(self.decoder, self.timeout_s, self.tmp, check=False)

    @cached_property
    def vision_program(self) -> Program | None:
        """The vision tower's program, where there is one."""
        return read_program(self.vision, self.timeout_s, self.tmp, check=False) if self.vision else None

    @cached_property
    def _taps(self) -> Taps:
        assets = {"decoder": (self.decoder, self.program.main)}
        if self.vision_program:
            assets["vision"] = self.vision, self.vision_program.main
        return taps_of(self.seam_index, assets)

    def seams(self) -> frozenset[str]:
        """Logits, what the vision tower puts out, and every inner value whose place in these programs is known."""
        found = {"logits", *self._taps["decoder"], *self._taps["vision"]}
        if self.vision is not None and self.embeds is None:
            taps = range(len(self.geometry.deepstack_taps))
            found |= {"vision.merger", *(f"vision.deepstack.{tap}" for tap in taps)}
        return frozenset(found)

    def check(self, request: Request) -> HostInputs:
        """What the host hands in for a request. Raises HarnessError where this bundle cannot run it."""
        return checked(request, self.geometry, self.grid, self.context,
                       self.vision is not None or self.embeds is not None)

    def run(self, requests: Sequence[Request]) -> Iterator[Trace]:
        """One Trace a request, in order, as they come.

        Raises HarnessError for bad input and Undecided where a program cannot be read. The bytes are compared with their
        hash beside the work; no Trace is handed out before they agree.
        """
        hosts = [self.check(request) for request in requests]
        hashed = [_Hashed(asset) for asset in filter(None, (self.decoder, self.vision))]
        try:
            run = _Run(self, any(request.inputs.patches is not None for request in requests))
            for request, host in zip(requests, hosts):
                with within(request.inputs.case), _as_sentences(self.name):
                    trace = run.one(request, host)
                for check in hashed:
                    check.wait()
                yield trace
        except Undecided:
            for check in hashed:  # damage explains more than the death of whoever read it
                check.wait()
            raise


class _Run:
    """Everything that the requests of one run share: programs, constants, encoded images."""

    def __init__(self, engine: ReplayEngine, images: bool) -> None:
        started = time.perf_counter()
        self.engine, self.done = engine, {}
        if engine.arithmetic.name == Fp16.name:
            Fp16.exact_accumulation()
        taps = engine._taps
        with within(engine.decoder.name):
            self.decoder, order = self._decoder(taps["decoder"])
            found = self.decoder.layout
            if (found.vocab, found.layers) != (engine.geometry.vocab, engine.geometry.layers):
                raise HarnessError(f"has {found.layers} layers and vocabulary {found.vocab}, the checkpoint "
                                   f"{engine.geometry.layers} and {engine.geometry.vocab}",
                                   fix="give the checkpoint that the bundle was made from")
        self.prefill = self._prefill() if engine.prefill else None
        self.vision = None
        if images and engine.vision_program and engine.embeds is None:
            with within(engine.vision.name):
                function = engine.vision_program.main
                check_vision(function)
                self.vision = compiled(function, self._constants(function), taps=taps["vision"])
        files = [file for asset in (engine.decoder, engine.vision) if asset for file in asset.rglob("*")]
        engine.facts = {"cold_load_s": time.perf_counter() - started, "warm_load_s": None, "compute_unit": engine.device,
                        "runtime": f"judged by replay (arithmetic {engine.arithmetic.name}), {PROVEN}; "
                                   f"torch {torch.__version__}",
                        "platform": f"{platform.system()} {platform.machine()}", "dtype": DTYPES.get(found.dtype, found.dtype),
                        "vocab": found.vocab, "layers": found.layers, "slots": found.slots, "dynamic": found.tokens is None,
                        "order": order, "context": found.context, "asset_bytes": sum(file.stat().st_size for file in files)}

    def _decoder(self, taps: Mapping[str, Value]) -> tuple[Decoder, str]:
        """The decoder, compiled, and in which order it runs. What cannot be compiled is refused before any request."""
        engine, function = self.engine, self.engine.program.main
        made = Decoder(function, self._constants(function), taps, engine.order or "layers", record=engine.device != "cpu")
        if made.layout.tokens != 1 or made.order == "steps":
            made.step(bool(taps))
            return made, "steps" if made.layout.tokens == 1 else "as many tokens a call as are there"
        try:
            made.layers(bool(taps))
            return made, "layers"
        except HarnessError as error:
            if engine.order is not None:
                raise
            made.order = "steps"
            made.step(bool(taps))
            return made, f"steps: {error}"

    def _prefill(self) -> Decoder:
        functions = self.engine.program.functions
        if "prefill" not in functions:
            raise HarnessError(f"has no function prefill; its functions are {', '.join(functions)}",
                               where=self.engine.decoder.name)
        return Decoder(functions["prefill"], self.decoder.constants, {}, "steps")

    def _constants(self, function: Function) -> Constants:
        engine = self.engine
        dense = engine.dense if engine.dense is not None else engine.device != "cpu" or _size(function) < 1 << 29
        return Constants(engine.arithmetic, engine.device, dense=dense)

    def one(self, request: Request, host: HostInputs) -> Trace:
        """The Trace of one request."""
        engine = self.engine
        started = time.perf_counter()
        fixed, seams = self._image(request.inputs)
        encoded = time.perf_counter()
        fixed |= {name: torch.tensor([value], dtype=torch.int32) for name, value in
                  (("rope_shift_start", host.shift_start), ("rope_shift_amount", host.shift_amount))}
        talk = Conversation(self.decoder, fixed, engine.context, self.prefill)
        logits, rows = talk.feed(host.ids, bool(self.decoder.taps) and self.prefill is None, engine.chunk)
        prefilled = time.perf_counter()
        tokens, steps = [], [logits]
        for _ in range(request.free):
            tokens.append(int(steps[-1][-1].argmax()))
            steps.append(talk.feed(np.array([tokens[-1]]))[0])
        arrays = {"logits": torch.cat(steps), **{name: value for name, value in rows.items() if name in request.seams},
                  **{name: value for name, value in seams.items() if name in request.seams},
                  **(talk.kv() if request.kv else {})}
        trace = Trace({name: self._array(name, value) for name, value in arrays.items()})
        ended = time.perf_counter()
        trace.facts = {"engine": engine.name, **engine.facts, "tokens": tokens, "vision_s": encoded - started,
                       "prefill_s": prefilled - encoded, "decode_s": ended - prefilled, "calls": talk.calls,
                       "prefill_tokens": len(host.ids), "decode_tokens": request.free, "unread": {},
                       "prefill_tok_s": len(host.ids) / (prefilled - encoded),
                       "decode_tok_s": request.free / (ended - prefilled) if request.free else None,
                       "inner_seams": len(rows)}
        return trace

    def _array(self, name: str, value: Tensor) -> np.ndarray:
        rows = {**self.engine._taps.rows["decoder"], **self.engine._taps.rows["vision"]}
        array = value.float().cpu().numpy()
        return array.reshape(len(array), *rows[name]) if name in rows else array

    def _image(self, given: FrozenInputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeds by input name and values by seam; each distinct image is encoded once."""
        if given.patches is None:
            return {}, {}
        name = image_name(given)
        if name not in self.done:
            self.done[name] = self._encode(given)
        embeds, seams = self.done[name]
        return dict(embeds), seams

    def _encode(self, given: FrozenInputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.engine.embeds is not None:
            return {part: torch.from_numpy(np.asarray(array)) for part, array in zip(EMBEDS, self.engine.embeds(given))}, {}
        vision = self.vision
        patches = torch.from_numpy(np.asarray(given.patches, dtype=np.float32))
        patches = patches.to(vision.device, vision.arithmetic.held(vision.function.inputs[0].dtype))
        if vision.function.inputs[0].dtype == "f16":  # the host hands in what the program takes, whatever computes it
            patches = patches.half().to(patches.dtype)
        outputs, seams = vision({}, patches=patches)
        parts = outputs["deepstack_embeds"].split(len(outputs["image_embeds"]))
        return outputs, {**seams, "vision.merger": outputs["image_embeds"],
                         **{f"vision.deepstack.{tap}": part for tap, part in enumerate(parts)}}


class _Hashed:
    """The comparison of an asset's bytes with their hash, in a thread of its own: it reads the whole file."""

    def __init__(self, asset: Path) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(asset,), name="hash", daemon=True)
        self._thread.start()

    def _work(self, asset: Path) -> None:
        try:
            check_asset(asset)
        except BaseException as error:  # handed to whoever waits
            self._error = error

    def wait(self) -> None:
        """Raises HarnessError where they differ."""
        self._thread.join()
        if self._error:
            raise self._error


class _as_sentences:
    """What torch raises while a program runs is the program's fault or the device's: Undecided, with torch's words."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RuntimeError, IndexError, ValueError, TypeError, MemoryError)):
            first = str(error).splitlines()[0] if str(error) else "no message"
            raise Undecided(f"the {self.name} engine failed ({type(error).__name__}: {first})") from error


def _size(function: Function) -> int:
    """Elements of its constants."""
    return sum(value.constant.size for value in function.constants())
