"""Recording: freeze, roll out, verify with hooks, store; case by case, so that a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from harness import __version__
from harness.cases import Case, FrozenInputs
from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.oracle.hooks import Inside, SeamHooks, wanted_seams
from harness.oracle.inputs import freeze
from harness.oracle.model import load_model, true_fp32
from harness.oracle.rollout import cache_arrays, extend_positions, forward, greedy, settle
from harness.store import CaseWriter, Identity, Oracle, OracleWriter

KV = ("kv.keys", "kv.values")
Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: cases done of all that are to be recorded, and what is going on now."""


def record(checkpoint: Checkpoint, cases: Sequence[Case], out_dir: Path, *, device: str = "cpu",
           attention: str = "sdpa", inside: Inside = None, progress: Progress | None = None) -> Oracle:
    """Record the cases that `out_dir` does not hold yet and return the oracle.

    inside: layers whose inner seams are recorded too. Cases that are whole, of this definition and with the seams
    asked, are kept; the model is not loaded when nothing is to be done. All inputs are frozen first, so that a bad case
    is known before the work. Raises HarnessError for a bad case or checkpoint, another oracle in `out_dir`, a disk that
    is full.
    """
    tell = progress or (lambda what, done, total: None)
    with OracleWriter(Path(out_dir), identity(checkpoint, device, attention)) as out:
        pending = [case for case in cases
                   if not out.complete(case, (*wanted_seams(checkpoint.geometry, inside, bool(case.images)), *KV))]
        tell("freezing inputs", 0, len(pending))
        frozen = [freeze(case, checkpoint) for case in pending]
        model = None
        for done, (case, inputs) in enumerate(zip(pending, frozen)):
            if model is None:
                tell("loading the model", done, len(pending))
                model = load_model(checkpoint, device, attention)
            tell(case.name, done, len(pending))
            seams = wanted_seams(checkpoint.geometry, inside, bool(case.images))
            _record_case(model, checkpoint, case, inputs, seams, out.case(case))
        tell("done", len(pending), len(pending))
    return Oracle.open(Path(out_dir), checkpoint.digest)


def identity(checkpoint: Checkpoint, device: str, attention: str) -> Identity:
    """What the oracle is recorded from, and with; makes float32 true. Raises HarnessError for an absent device."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise HarnessError("torch sees no CUDA device", where=device, fix="use --device cpu")
    name = f"{place.type}: {torch.cuda.get_device_name(place)}" if place.type == "cuda" else place.type
    return Identity(checkpoint.name, checkpoint.revision, checkpoint.digest, checkpoint.geometry.record(), name,
                    attention, transformers.__version__, torch.__version__, __version__, true_fp32())


def _record_case(model: Any, checkpoint: Checkpoint, case: Case, inputs: FrozenInputs, seams: tuple[str, ...],
                 out: CaseWriter) -> None:
    started = time.perf_counter()
    draft = greedy(model, inputs, case.decode)
    drafted = time.perf_counter()
    with SeamHooks(model, checkpoint.geometry, seams) as hooks:
        output = forward(model, inputs, draft.tokens)
    ran = time.perf_counter()
    arrays = hooks.arrays()
    rollout, noise = settle(inputs, draft, arrays["logits"], checkpoint.geometry.image_token)
    out.part("inputs", _input_arrays(inputs))
    out.part("rollout", {
        "tokens": rollout.tokens, "margins": rollout.margins, "ties": np.array(rollout.ties, dtype=np.int32),
        "positions": extend_positions(inputs.positions, case.decode), "noise": np.array([noise])})
    vision = {name: arrays[name] for name in seams if name.startswith("vision.")}
    if vision:
        out.part("vision", vision)
    decoder = {name: arrays[name] for name in seams if name not in vision}
    out.part("decoder", decoder | cache_arrays(output.past_key_values))
    out.finish({"prompt_tokens": inputs.length, "decoded": case.decode, "rollout_s": drafted - started,
                "forward_s": ran - drafted, "store_s": time.perf_counter() - ran})


def _input_arrays(inputs: FrozenInputs) -> dict[str, np.ndarray]:
    arrays = {"ids": inputs.ids, "positions": inputs.positions}
    if inputs.patches is not None:
        arrays |= {"patches": inputs.patches, "grid": np.array(inputs.grid, dtype=np.int32)}
    return arrays
