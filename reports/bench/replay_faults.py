"""Faults injected into exported bundles of the tiny checkpoint, and what replay and the program's own text name of them.

    python reports/bench/replay_faults.py > reports/replay/faults.md

A fault changes bytes of `main.mlirb`: tables where they lie, structure through Core AI's own text form, printed, changed
and read again. The hash is made to fit. Judged without Apple's runtime and without a seam index: by the program's
constants and weights (`weights` rung), by its structure (taps), and by replay in fp32 against the twin at every inner seam;
the first seam, in the order of computation, that is more than LIMIT away names the place. Exits 1 where a fault is not
named at its place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.cases import FrozenInputs, load_cases
from harness.checkpoint import EMBEDDED, Checkpoint, open_checkpoint
from harness.engines import Request
from harness.engines.program import read_constants
from harness.engines.replay.engine import ReplayEngine
from harness.engines.torch_graph import TorchGraph
from harness.errors import HarnessError
from harness.export import export
from harness.faults.files import Files
from harness.graph.quantize import RECIPES, twin_weights
from harness.graph.reference import Reference
from harness.options import Options
from harness.oracle import freeze
from harness.rungs import weights
from harness.rungs.decode import by_layer
from harness.subject import Subject
from harness.trace import Trace, decoder_seams, vision_seams
from harness.verdict import Outcome

LIMIT = 1e-3
"""Relative L2 at a seam; a healthy bundle is printed first and stays far below."""
GRID, CONTEXT = (28, 28), 256
Edit = Callable[[list[str]], None]


@dataclass(frozen=True)
class Fault:
    """where: what must be named, as a regular expression. kind: weights, constant, structure or state."""

    kind: str
    what: str
    where: str
    apply: Callable[[Files], None]


def find(lines: list[str], pattern: str, number: int = 0) -> int:
    """Line of the `number`-th match."""
    return [place for place, line in enumerate(lines) if re.search(pattern, line)][number]


def sub(lines: list[str], place: int, pattern: str, new: str) -> None:
    """Change one line; it must change."""
    changed = re.sub(pattern, new, lines[place], count=1)
    assert changed != lines[place], lines[place][:200]
    lines[place] = changed


def text(files: Files, bundle: Path, edit: Edit) -> None:
    """Change a program in its text form, in a process of its own."""
    asset = files.asset(bundle)
    source = asset.with_suffix(".mlir")
    _child("print", asset, source)
    lines = source.read_text(encoding="utf-8").split("\n")
    edit(lines)
    source.write_text("\n".join(lines), encoding="utf-8")
    metadata = (asset / "metadata.json").read_bytes()
    _child("read", asset, source)
    (asset / "metadata.json").write_bytes(metadata)
    source.unlink()


def _child(*words: object) -> None:
    subprocess.run([sys.executable, __file__, *map(str, words)], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def _text_form(way: str, asset: Path, source: Path) -> None:
    from coreai.authoring.asset import AIModelAsset, AIProgram
    from coreai._compiler import ir  # isort: skip

    module = AIModelAsset.load(asset).program._module._mlir_module
    if way == "print":
        source.write_text(module.operation.get_asm(), encoding="utf-8")
        return
    with module.context:
        AIProgram._from_mlir_module(ir.Module.parse(source.read_text(encoding="utf-8"))).save_asset(asset)


STREAM = r"broadcasting_add %\S+, %\S+ : \(tensor<1x1x64xf16>, tensor<1x(1x)?64xf16>\)"
WRITE = r"coreai.slice_update"


def operand(lines: list[str], place: int, pattern: str) -> str:
    """A part of a line."""
    return re.search(pattern, lines[place])[1]


def eps(lines: list[str]) -> None:
    name = operand(lines, find(lines, r"dense<9.99999997E-7> : tensor<f32>"), r"(%\S+) =")
    place = find(lines, rf"broadcasting_add %\S+, {name} ", 4 + 3)
    start = find(lines, r"coreai.graph @main")
    sub(lines, place, rf", {name} ", ", %fault ")
    lines.insert(start + 1, "    %fault = coreai.constant dense<1.000000e-02> : tensor<f32>")


def frequencies(lines: list[str]) -> None:
    place = find(lines, r"coreai.constant dense<\[1.0+e\+00, .*> : tensor<\d+xf32>")
    held = operand(lines, place, r"dense<\[(.*)\]>")
    rounded = ", ".join(f"{float(np.float16(float(part))):.9e}" for part in held.split(","))
    lines[place] = lines[place].replace(held, rounded)


def residual(lines: list[str]) -> None:
    before = operand(lines, find(lines, STREAM, 6), r"broadcasting_add (%\S+),")
    sub(lines, find(lines, STREAM, 7), r"broadcasting_add %\S+,", f"broadcasting_add {before},")


def slot(lines: list[str]) -> None:
    other = operand(lines, find(lines, WRITE, 2), r"at (\(.*?\))")
    sub(lines, find(lines, WRITE, 4), r"at \(.*?\)", f"at {other}")


def values(lines: list[str]) -> None:
    keys = operand(lines, find(lines, WRITE, 6), r"with (%\S+)")
    sub(lines, find(lines, WRITE, 7), r"with %\S+", f"with {keys}")


def constant(old: str, new: str) -> Edit:
    """Change the value of one constant."""
    return lambda lines: sub(lines, find(lines, re.escape(old)), re.escape(old), new)


def codes(files: Files) -> None:
    table = [one for one in files.healthy[files.decoder].weights if one.scale is not None and one.shape == (64, 192)]
    assert len(table) == 4
    files.table(files.decoder, (64, 192), 1, lambda held: held.__setitem__(5, 0))


def scale(files: Files) -> None:
    def double(held: np.ndarray) -> None:
        held[7, 1] *= 2

    files.table(files.decoder, (192, 64), 4, double, "scale")


def on_decoder(edit: Edit) -> Callable[[Files], None]:
    return lambda files: text(files, files.decoder, edit)


def on_vision(edit: Edit) -> Callable[[Files], None]:
    return lambda files: text(files, files.vision, edit)


FAULTS = (
    Fault("weights", "one row of codes zero, layer 1 down_proj", r"layers\.0?1\.mlp\.(down|out)", codes),
    Fault("weights", "one block's scale doubled, layer 2 gate_proj", r"layers\.0?2\.mlp\.gate", scale),
    Fault("constant", "eps 1e-2 in one norm: layer 1 before its MLP", r"layers\.01\.post_norm|norm\.eps", on_decoder(eps)),
    Fault("constant", "rotary frequencies passed through fp16", r"rope\.frequencies|q_rope", on_decoder(frequencies)),
    Fault("constant", "a hidden score is replaced by -10", r"mask\.fill",
          on_decoder(constant("dense<-1.000000e+04> : tensor<f16>", "dense<-1.000000e+01> : tensor<f16>"))),
    Fault("constant", "13 columns in the image grid", r"rope\.positions|decoder\.positions",
          on_decoder(constant("dense<14> : tensor<si32>", "dense<13> : tensor<si32>"))),
    Fault("constant", "the second DeepStack addition reads the first one's rows", r"layers\.01\.deepstack",
          on_decoder(constant("dense<196> : tensor<si32>", "dense<0> : tensor<si32>"))),
    Fault("structure", "GELU of vision block 2 lost its tanh", r"vision\.layers\.02\.mlp\.act|gelu\.flavour", on_vision(
        lambda lines: sub(lines, find(lines, r"approximate = <tanh>", 2), r"approximate = <tanh> ", ""))),
    Fault("structure", "layer 2 rotates its queries' first half the other way", r"layers\.02\.attn\.q_rope", on_decoder(
        lambda lines: sub(lines, find(lines, r"broadcasting_sub .*-> tensor<1x1x4x16xf32>", 2), "_sub", "_add"))),
    Fault("structure", "layer 2's MLP adds to the stream before attention", r"layer 2's mlp", on_decoder(residual)),
    Fault("state", "layer 2 writes its keys into layer 1's slot", r"layer 2 writes slot 2 of keyCache", on_decoder(slot)),
    Fault("state", "layer 3 keeps its keys where values belong", r"layers\.03\.attn\.(v|context)|kv\.values\.03",
          on_decoder(values)),
)


class Judge:
    """What is known of the healthy bundles, and how a pair is judged."""

    def __init__(self, checkpoint: Checkpoint, frozen: FrozenInputs, decoder: Path, vision: Path) -> None:
        self.checkpoint, self.geometry, self.frozen = checkpoint, checkpoint.geometry, frozen
        recipe = RECIPES["int8hu"]
        twin = TorchGraph(Reference(recipe.geometry(self.geometry), GRID, twin_weights(checkpoint, recipe)), self.geometry)
        self.want = by_layered(next(twin.run([Request(frozen, seams=twin.seams(), kv=True)])))
        self.decoder, self.vision = decoder, vision

    def activations(self, files: Files) -> tuple[str, float]:
        """The first seam beyond LIMIT and its distance, or "" and the largest distance; or why there are no inner seams."""
        engine = ReplayEngine(files.asset(files.decoder), files.asset(files.vision), geometry=self.geometry, grid=GRID,
                              context=CONTEXT, order="steps")
        got = by_layered(next(engine.run([Request(self.frozen, seams=engine.seams(), kv=True)])))
        structure = [how for how in engine._taps.how.values() if how.startswith("unknown")]
        worst = 0.0
        for seam in self._order():
            if seam in got and seam in self.want:
                error = distance(got[seam], self.want[seam])
                worst = max(worst, error)
                if not error <= LIMIT:
                    return structure[0] if structure else seam, error
        return (structure[0] if structure else ""), worst

    def _order(self) -> list[str]:
        names = [*vision_seams(self.geometry, inside=True), "decoder.positions"]
        for seam in decoder_seams(self.geometry, inside=True):
            layer = re.fullmatch(r"decoder\.layers\.(\d+)\.attn\.context", seam)
            names += [f"kv.keys.{layer[1]}", f"kv.values.{layer[1]}", seam] if layer else [seam]
        return names

    def text(self, files: Files) -> list[str]:
        """What the weights rung fails, by seam."""
        subject = Subject(Options(bundle=files.decoder, vision_bundle=files.vision))
        try:
            found = [verdict for case in ("constants", "bundle") for verdict in weights.measure(subject, case)]
        finally:
            subject.close()
        return [verdict.seam for verdict in found if verdict.outcome in (Outcome.FAIL, Outcome.ERROR)]


def by_layered(trace: Trace) -> Trace:
    """The trace with its cache layer by layer."""
    return Trace({**trace.arrays, **by_layer(trace).arrays})


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2; infinite for another shape."""
    if got.shape != want.shape:
        return float("inf")
    difference = got.astype(np.float64) - want.astype(np.float64)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(want.astype(np.float64)), 1e-30))


def main() -> int:
    """Export, inject, judge, print a Markdown table."""
    checkpoint = open_checkpoint(EMBEDDED)
    frozen = freeze(next(case for case in load_cases() if case.name == "scene-211"), checkpoint)
    missed = 0
    with tempfile.TemporaryDirectory() as root:
        made = export(checkpoint, Path(root) / "healthy", "int8hu", context=CONTEXT, grid=GRID)
        programs = tuple(read_constants(path / f"{path.name}.aimodel") for path in (made.decoder, made.vision))
        judge = Judge(checkpoint, frozen, made.decoder, made.vision)
        print("| kind | fault | the program says | replay says | named |\n|---|---|---|---|---|")
        for number, fault in enumerate((Fault("none", "healthy", "^$", lambda files: None), *FAULTS)):
            folder = Path(root) / str(number)
            folder.mkdir()
            files = Files(made.decoder, made.vision, folder, programs)
            fault.apply(files)
            said = judge.text(files)
            try:
                seam, error = judge.activations(files)
            except HarnessError as problem:
                seam, error = str(problem), float("nan")
            named = not said and not seam if fault.kind == "none" else any(
                re.search(fault.where, answer) for answer in (*said, seam))
            missed += not named
            short = ", ".join(said[:2]) + (f" and {len(said) - 2} more" if len(said) > 2 else "")
            print(f"| {fault.kind} | {fault.what} | {short or '-'} | {seam or 'nothing'} ({error:.2g}) | "
                  f"{'yes' if named else 'NO'} |", flush=True)
            shutil.rmtree(folder)
    return int(missed > 0)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _text_form(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
