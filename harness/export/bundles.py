"""The verb: which bundles are made of a checkpoint, in which order, under which names."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from harness.bundle import LANGUAGE, VISION, metadata
from harness.checkpoint import Checkpoint
from harness.errors import HarnessError, Undecided
from harness.export.convert import save_asset
from harness.export.folder import clear_away, copy_tokenizer, refuse, tokenizer_files, whole, write_metadata
from harness.export.hollow import Pending, hollow_decoder, hollow_vision
from harness.export.program import Program, trace_decoder, trace_vision
from harness.export.room import Room, check_room, scratch
from harness.export.seams import find_entries, write_seams
from harness.export.values import CheckpointValues
from harness.graph.decoder import Decoder
from harness.graph.quantize import RECIPES, Recipe
from harness.graph.vision import Vision

MODEL_DEFINITION = "Qwen3VLForConditionalGeneration"
Say = Callable[[str], None]
Indexed = tuple[Path, dict[str, Any]]
"""An asset, and the entries of its seam index."""


@dataclass
class ExportResult:
    """What was made. decoder (S = 1), dynamic (any S), vision: bundle directories. bytes, operations: by directory name
    (operations counts FX nodes). seconds: by stage. quantized: Linears that hold codes and scales. seams: how many the
    index of each directory resolves. notes: what could not be done, in words.
    """

    mode: str
    activations: str
    decoder: Path
    vision: Path | None = None
    dynamic: Path | None = None
    quantized: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    seams: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Plain JSON types; paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    def describe(self) -> str:
        """A few lines for a person."""
        lines = [f"{path}: {self.bytes[path.name] / 1e6:.2f} MB, {self.operations[path.name]} operations, "
                 f"{self.seams.get(path.name, 0)} seams indexed"
                 for path in (self.decoder, self.dynamic, self.vision) if path]
        lines.append(f"{self.quantized} Linears quantized ({self.mode}), activations {self.activations}; "
                     + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()))
        return "\n".join(lines + self.notes)


def export(checkpoint: Checkpoint, out_dir: Path, mode: str, *, grid: tuple[int, int] = (28, 28), context: int = 512,
           dynamic: bool = False, activations: str = "fp16", vision: bool = True, name: str | None = None,
           overwrite: bool = False, tmp: Path | None = None, progress: Say | None = None) -> ExportResult:
    """Quantize, convert and write `<name>_decode_<mode>_s1/`, with `dynamic` also `<name>_decode_<mode>/`, and
    `<name>_vision/` below `out_dir`, and beside them `<decoder>.seams.json`.

    mode: fp16, int8lin or int8hu. grid: rows and columns of patches. context: slots of the KV cache, tokens.
    activations "fp32" makes the sharp twin: weights, codes and scales bit for bit as shipped, arithmetic in float32;
    its names have `_fp32` after the mode. name: of the model, by default the checkpoint's. tmp: where temporary files
    go, by default TMPDIR.

    Weights are made one at a time from the mapped checkpoint while a program is converted, and none is kept: memory
    holds the converter's constants below 32 MiB, larger ones lie in its files in `tmp`.
    Raises HarnessError for an unknown mode, a target that is there, a weight that coreai-opt would skip, a disk too
    small or full, a checkpoint that changes meanwhile; nothing half-written stays behind, and what a killed export left is
    removed by the next one. Where a disk fills up under it, LLVM may end the process (see `harness.apart`).
    """
    with scratch(tmp) as folder:
        return Exporter(checkpoint, Path(out_dir), mode, grid, context, activations, name, overwrite, folder,
                        progress or (lambda text: None)).run(dynamic=dynamic, vision=vision)


class Exporter:
    """One export; see `export`. scratch: an empty folder of its own for temporary files."""

    def __init__(self, checkpoint: Checkpoint, out_dir: Path, mode: str, grid: tuple[int, int], context: int,
                 activations: str, name: str | None, overwrite: bool, scratch: Path, say: Say) -> None:
        for what, value, known in (("mode", mode, RECIPES), ("activations", activations, ("fp16", "fp32"))):
            if value not in known:
                raise HarnessError(f"{value!r} is not known", where=what, fix=f"known are {', '.join(known)}")
        if not 2 < context <= checkpoint.geometry.max_positions:
            raise HarnessError(f"{context} is not within 3..{checkpoint.geometry.max_positions} tokens",
                               where="context")
        self.checkpoint, self.geometry, self.out_dir = checkpoint, checkpoint.geometry, out_dir
        self.recipe: Recipe = RECIPES[mode]
        self.grid, self.context, self.overwrite, self.scratch, self.say = grid, context, overwrite, scratch, say
        self.wide = activations == "fp32"
        self.dtype = torch.float32 if self.wide else torch.float16
        self.model = name or model_id(checkpoint).rpartition("/")[2]
        self.result = ExportResult(mode, activations, self._target(f"decode_{mode}", "_s1"))

    def _target(self, part: str, suffix: str = "") -> Path:
        wide = "_fp32" if self.wide else ""
        return self.out_dir / f"{re.sub(r'[^a-z0-9]', '_', self.model.lower())}_{part}{wide}{suffix}"

    def run(self, *, dynamic: bool, vision: bool) -> ExportResult:
        """Make all bundles as drafts, then move them to their places together."""
        result = self.result
        result.dynamic = self._target(f"decode_{self.recipe.name}") if dynamic else None
        result.vision = self._target("vision") if vision else None
        self._prepare()
        with self._stage("check names and shapes"):
            self.values = CheckpointValues(self.checkpoint, self.recipe, self.grid)
        with ExitStack() as self.drafts:
            parts = {"vision": self._vision(result.vision)} if result.vision else {}
            if result.dynamic:
                self._decoder(result.dynamic, dynamic=True)
            parts["decoder"] = self._decoder(result.decoder)
            self.checkpoint.unchanged()  # or the drafts hold weights of two checkpoints
        write_seams(result.decoder, parts)
        return result

    def _prepare(self) -> None:
        targets = [path for path in (self.result.decoder, self.result.dynamic, self.result.vision) if path]
        for target in targets:
            refuse(target, self.overwrite)
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HarnessError(f"cannot be made ({error.strerror})", where=self.out_dir,
                               fix="give another --out") from error
        for target in targets:
            clear_away(target)
        tokenizer_files(self.checkpoint)
        room = Room.of(self.geometry, self.recipe, self.grid, self.dtype, decoders=1 + bool(self.result.dynamic),
                       vision=bool(self.result.vision))
        self.say(f"export: {room.describe(self.out_dir, self.scratch)}")
        check_room(room, self.out_dir, self.scratch)

    def _hollow_vision(self) -> tuple[Vision, Pending]:
        return hollow_vision(self.geometry, self.grid, self.values, self.dtype)

    def _hollow_decoder(self) -> tuple[Decoder, Pending, int]:
        geometry = self.recipe.geometry(self.geometry)
        merged = tuple(side // geometry.merge for side in self.grid)
        return hollow_decoder(geometry, merged, self.recipe, self.values, self.dtype)

    def _vision(self, target: Path) -> Indexed:
        tower, pending = self._hollow_vision()
        with self._stage("trace vision"):
            program = trace_vision(tower, self.geometry, self.dtype)
        program.pending = pending
        return self._write(target, program, {"kind": VISION})

    def _decoder(self, target: Path, dynamic: bool = False) -> Indexed:
        tower, pending, self.result.quantized = self._hollow_decoder()
        with self._stage("trace decoder"):
            program = trace_decoder(tower, self.recipe.geometry(self.geometry), self.context, self.dtype, dynamic=dynamic)
        program.pending = pending
        if dynamic:
            program.nodes.clear()  # the runtime does not hand out inner values whose shape is dynamic
        return self._write(target, program, {"kind": LANGUAGE, "vocab_size": self.geometry.vocab,
                                             "max_context_length": self.context})

    def _write(self, target: Path, program: Program, facts: dict[str, Any]) -> Indexed:
        """The draft of one bundle; returns where its asset will be, and the entries of its seam index."""
        mode = self.recipe.name if facts["kind"] == LANGUAGE else "fp16"
        record = metadata(target.name, mode, hf_model_id=model_id(self.checkpoint), model_definition=MODEL_DEFINITION,
                          date=datetime.now(timezone.utc).isoformat(timespec="seconds"), **facts)
        draft = self.drafts.enter_context(whole(target, self.overwrite))
        with self._stage("convert"):
            save_asset(program, draft / record["assets"]["main"])
            if facts["kind"] == LANGUAGE:
                copy_tokenizer(self.checkpoint, draft)
            write_metadata(draft, record)
        self.result.bytes[target.name] = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
        self.result.operations[target.name] = program.operations
        return target / record["assets"]["main"], self._entries(program, target) if program.nodes else {}

    def _entries(self, program: Program, target: Path) -> dict[str, Any]:
        try:
            with self._stage("seams"):
                entries = find_entries(program, self.scratch)
        except Undecided as error:
            self.result.notes.append(f"{target.name} has no seam index: {error}")
            return {}
        self.result.seams[target.name] = len(entries)
        return entries

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.say(f"export: {name}")
        started = time.perf_counter()
        yield
        self.result.seconds[name] = round(self.result.seconds.get(name, 0.0) + time.perf_counter() - started, 3)


def model_id(checkpoint: Checkpoint) -> str:
    """`Qwen/Qwen3-VL-2B-Instruct` for a snapshot in the hub's cache, the directory's name for any other."""
    cached = re.fullmatch(r"models--(.+?)--(.+)", checkpoint.root.resolve().parent.parent.name)
    return f"{cached[1]}/{cached[2]}" if cached else checkpoint.name
