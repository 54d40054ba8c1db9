"""Recording: freeze the cases, then pass over the weights stage by stage, each stage for all cases, until all is settled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from harness import __version__
from harness.cases import Case, FrozenInputs
from harness.checkpoint import Checkpoint, stamp
from harness.errors import HarnessError
from harness.oracle import drafting
from harness.oracle.drain import Drain
from harness.oracle.hooks import Inside, SeamHooks, wanted_seams
from harness.oracle.inputs import freeze
from harness.oracle.jobs import Bench
from harness.oracle.lanes import NONE, OWN, Lane
from harness.oracle.model import load_model, one_line, true_fp32
from harness.oracle.plan import CONTEXT, DEFAULT, plan
from harness.oracle.resident import Resident
from harness.oracle.rollout import best_of, greedy
from harness.oracle.stages import EMBEDDING, skeleton, stages_of
from harness.store import Identity, Oracle, OracleWriter
from harness.streaming.parked import parking
from harness.streaming.reading import WeightReader
from harness.streaming.weights import Source, Streamed

KV = ("kv.keys", "kv.values")
Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: what is going on now, and how many of its steps are done."""
Drafts = Mapping[str, Sequence[int]]
"""Tokens by case that the reference is likely to choose."""


def record(checkpoint: Checkpoint, cases: Sequence[Case], out_dir: Path, *, device: str = "cpu",
           attention: str = "sdpa", inside: Inside = None, memory: int | None = None, drafts: Drafts | None = None,
           progress: Progress | None = None, say: Callable[[str], None] = lambda text: None) -> Oracle:
    """Record the cases that `out_dir` does not hold yet and return the oracle.

    inside: layers whose inner seams are recorded too. memory: bytes that may be held at once (default: 4 GiB; on a GPU,
    what is free there). device: cpu, cuda, or auto (spread over GPUs by Hugging Face's device map).
    drafts: of the tokens, saves passes; where none is given the model makes its own, if it can cheaply.
    Cases that are whole, of this definition and with the seams asked, are kept; no weight is read
    when nothing is to be done. All inputs are frozen first, so that a bad case is known before the work. `say` is told
    the plan. Raises HarnessError for a bad case or checkpoint, too little memory, another oracle
    in `out_dir`, a disk that is full; the same call then goes on behind the last stage that was finished.
    """
    tell = progress or (lambda what, done, total: None)
    checkpoint.digest_soon()  # it is computed beside the work: of 17.5 GB it takes as long as a third of the recording
    with OracleWriter(Path(out_dir), identity(checkpoint, device, attention), lambda: _digest(checkpoint),
                      _stamps(checkpoint)) as out:
        pending = [case for case in cases
                   if not out.complete(case, (*wanted_seams(checkpoint.geometry, inside, bool(case.images)), *KV))]
        tell("freezing inputs", 0, len(pending))
        frozen = [freeze(case, checkpoint) for case in pending]
        if pending:
            with ExitStack() as held, _gpu_errors():
                # What can be refused is refused before a case that is whole is opened again.
                bench, source = _set_up(checkpoint, pending, frozen, device, attention, inside, memory, held, say)
                lanes = [_lane(checkpoint, case, inputs, out, inside, (drafts or {}).get(case.name))
                         for case, inputs in zip(pending, frozen)]
                _guess(lanes, bench, source)
                dtype = _narrow(lanes, bench, source, say)
                real = held.enter_context(parking(module for stage in bench.stages for module in stage.modules))
                _passes(lanes, bench, source, real, dtype, out.seal, tell)
        tell("done", len(pending), len(pending))
    return Oracle.open(Path(out_dir), checkpoint.digest)


def identity(checkpoint: Checkpoint, device: str, attention: str) -> Identity:
    """What the oracle is recorded from, and with, but for the digest; makes float32 true.

    Raises HarnessError for an absent device.
    """
    place = torch.device("cuda" if device == "auto" else device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise HarnessError("torch sees no CUDA device", where=device, fix="use --device cpu")
    name = f"{place.type}: {torch.cuda.get_device_name(place)}" if place.type == "cuda" else place.type
    return Identity(checkpoint.name, checkpoint.revision, "", checkpoint.geometry.record(), name,
                    attention, transformers.__version__, torch.__version__, __version__, true_fp32())


def _stamps(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """What the files look like of which the digest is taken; the time of the last change of anything included."""
    return {path.name: [*stamp(status), status.st_ctime_ns] for path in checkpoint.stamps for status in [path.stat()]}


def _digest(checkpoint: Checkpoint) -> str:
    """Of the bytes that were read: they had not changed when it was known."""
    digest = checkpoint.digest
    checkpoint.unchanged()
    return digest


def _lane(checkpoint: Checkpoint, case: Case, inputs: FrozenInputs, out: OracleWriter, inside: Inside,
          draft: Sequence[int] | None) -> Lane:
    writer, seams = out.case(case), wanted_seams(checkpoint.geometry, inside, bool(case.images))
    arrays = _input_arrays(inputs)
    if not writer.resume("inputs", arrays):
        writer.part("inputs", arrays)
    return Lane(case, inputs, seams, writer, checkpoint.geometry, draft)


def _set_up(checkpoint: Checkpoint, cases: Sequence[Case], frozen: Sequence[FrozenInputs], device: str, attention: str,
            inside: Inside, memory: int | None, held: ExitStack, say: Callable[[str], None]) -> tuple[Bench, Source]:
    """The model with its hooks, and where its weights come from."""
    reader, geometry = held.enter_context(WeightReader(checkpoint)), checkpoint.geometry
    model = load_model(checkpoint, device, attention) if device == "auto" else skeleton(checkpoint, attention)
    stages = stages_of(model, geometry, reader.shapes())
    place = torch.device(device) if device != "auto" else model.model.language_model.embed_tokens.weight.device
    if device == "auto":
        source: Source = Resident(model)
    else:
        _constants_to(model, place)
        room = memory or (DEFAULT if place.type == "cpu" else torch.cuda.mem_get_info(place)[0])
        made = plan(geometry, stages, [(inputs, case.decode) for case, inputs in zip(cases, frozen)], room, inside is not None,
                    *([] if place.type == "cpu" else [CONTEXT]))
        say(made.describe())
        source = Streamed(reader, place, made.slots, max(stage.elements for stage in stages), made.keep,
                          made.memory - made.total)
        _read_rows(model.model.language_model.embed_tokens, reader)
    seams = wanted_seams(geometry, inside, any(inputs.patches is not None for inputs in frozen))
    hooks = held.enter_context(SeamHooks(model, geometry, seams))
    return Bench(model, geometry, place, hooks, held.enter_context(Drain(place)), stages), source


def _constants_to(model: torch.nn.Module, place: torch.device) -> None:
    """Frequencies go to the device; the parameters have none yet."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(place))


@contextmanager
def _gpu_errors() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise HarnessError(f"the GPU ran out of memory ({one_line(error)})", where="--device",
                           fix="give a smaller --memory, fewer cases, or --device auto; what is recorded is kept") from error


def _read_rows(table: torch.nn.Module, reader: WeightReader) -> None:
    """The text table is read row by row as ids ask for it: a prompt needs a few hundred of its rows."""
    def look_up(ids: torch.Tensor) -> torch.Tensor:
        unique, places = torch.unique(ids, return_inverse=True)
        return reader.rows(EMBEDDING, unique.tolist()).to(ids.device)[places]

    table.forward = look_up


def _guess(lanes: Sequence[Lane], bench: Bench, source: Source) -> None:
    """Where all weights are in memory, decoding is cheap: its tokens are the draft of a case that has none."""
    wanting = [lane for lane in lanes if lane.passes == 0 and (lane.draft == NONE or lane.known < lane.case.decode)]
    if not wanting or not source.keep:
        return
    choose = best_of(source.place_all(bench.stages), bench.geometry.image_token)
    bench.hooks.into(None)
    for lane in wanting:
        lane.draft = OWN
        lane.guess(greedy(bench.model, choose, lane.inputs, [], lane.case.decode, bench.device))


def _narrow(lanes: Sequence[Lane], bench: Bench, source: Source, say: Callable[[str], None]) -> torch.dtype | None:
    """Where weights are streamed: the 16-bit dtype that drafts are made in, or None, having said why."""
    if source.keep:
        return None
    dtype = drafting.stored_in(source.reader, bench.stages)
    reason = drafting.why_not(dtype, bench.device)
    for lane in lanes:
        lane.guesses = not reason
        if not reason and lane.passes == 0 and lane.draft == NONE:
            lane.draft, lane.known = OWN, 0
    if any(lane.draft == NONE for lane in lanes):
        say(f"no draft: {reason or 'an earlier run began without'}; each token that is not guessed right takes a pass")
    return None if reason else dtype


def _passes(lanes: list[Lane], bench: Bench, source: Source, real: Any, dtype: torch.dtype | None,
            seal: Callable[[], None], tell: Progress) -> None:
    number = 0
    while lanes:
        number += 1
        wanting = [lane for lane in lanes if lane.open]
        if wanting:
            drafting.draft(wanting, bench, source, dtype, real, tell)
        try:
            for lane in lanes:
                lane.begin(bench)
            wanted = [stage for stage in bench.stages if any(lane.needs(stage) for lane in lanes)]
            with torch.no_grad():
                for done, (stage, tensors) in enumerate(source.stages(wanted)):
                    tell(f"pass {number}: {stage.name}", done, len(wanted))
                    for lane in lanes:
                        lane.run(stage, tensors, real)
            bench.drain.flush()
            seal()
            lanes = [lane for lane in lanes if not lane.judge()]
        finally:
            for lane in lanes:
                lane.end()


def _input_arrays(inputs: FrozenInputs) -> dict[str, np.ndarray]:
    arrays = {"ids": inputs.ids, "positions": inputs.positions}
    if inputs.patches is not None:
        arrays |= {"patches": inputs.patches, "grid": np.array(inputs.grid, dtype=np.int32)}
    return arrays
