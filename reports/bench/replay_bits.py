"""Replay with the arithmetic `coreai-cpu` against Apple's runtime, for every bundle that we export of the tiny checkpoint.

    python reports/bench/replay_bits.py [CASE] [MODE-ACTIVATIONS ...]     # by default scene-211 (211 prefill and 24 greedy
                                                                          # steps) and all: fp16-fp16, int8hu-fp32, ...

Prints a Markdown table: how many of the logits and cache entries differ in any bit, by order of execution. Exits 1 where
one does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from harness.cases import FrozenInputs, load_cases
from harness.checkpoint import EMBEDDED, Checkpoint, open_checkpoint
from harness.engines import Request
from harness.engines.coreai import CoreAIEngine
from harness.engines.replay.engine import ReplayEngine
from harness.export import export
from harness.oracle import freeze
from harness.trace import Trace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from externalized import save_externalized  # noqa: E402

BUNDLES = [(mode, activations) for mode in ("fp16", "int8lin", "int8hu") for activations in ("fp16", "fp32")]
CONTEXT, FREE = 256, 24


def main(name: str = "scene-211", *only: str) -> int:
    """Export, run, compare, print."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(EMBEDDED)
    case = next(case for case in load_cases() if case.name == name)
    frozen = freeze(case, checkpoint)
    print(f"| bundle | activations | tokens a call | order | logits | differ | KV entries | differ | vision values | differ "
          f"| runtime, s | replay, s |\n|{'---|' * 12}")
    failed = False
    with tempfile.TemporaryDirectory() as root:
        bundles = [bundle for bundle in BUNDLES if not only or "-".join(bundle) in only]
        for row in rows(checkpoint, frozen, Path(root), bundles):
            failed |= any(row[place] for place in (5, 7, 9))
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return int(failed)


def rows(checkpoint: Checkpoint, frozen: FrozenInputs, root: Path,
         bundles: list[tuple[str, str]]) -> Iterator[list[object]]:
    """One row a decoder and order of execution; the vision tower runs in the first of each kind of activations."""
    for mode, activations in bundles:
        made = export(checkpoint, root, mode, context=CONTEXT, activations=activations, dynamic=True, vision=True,
                      name=f"tiny-{mode}-{activations}")
        vision = asset(made.vision)
        published = save_externalized(checkpoint, root / f"published-{mode}-{activations}.aimodel", mode, grid=(28, 28),
                                      context=CONTEXT, activations=activations)
        for tokens, decoder, orders in (("1", asset(made.decoder), ("steps", "layers")),
                                        ("1, externalized norms", published, ("steps", "layers")),
                                        ("any", asset(made.dynamic), ("chunks",))):
            settings = {"geometry": checkpoint.geometry, "context": CONTEXT, "chunk": 100}
            want, runtime_s = run(CoreAIEngine(decoder, vision, **settings), frozen)
            for order in orders:
                engine = ReplayEngine(decoder, vision, arithmetic="coreai-cpu",
                                      order="layers" if order == "layers" else "steps", **settings)
                got, replay_s = run(engine, frozen)
                yield [mode, activations, tokens, order, *counts(got, want, ("logits",)),
                       *counts(got, want, ("kv.keys", "kv.values")),
                       *counts(got, want, tuple(seam for seam in want if seam.startswith("vision."))),
                       f"{runtime_s:.1f}", f"{replay_s:.1f}"]


def asset(bundle: Path) -> Path:
    """The program in a bundle directory."""
    return bundle / f"{bundle.name}.aimodel"


def run(engine: CoreAIEngine | ReplayEngine, frozen: FrozenInputs) -> tuple[Trace, float]:
    """The Trace of prefill and greedy steps, and seconds, loading included."""
    started = time.perf_counter()
    seams = engine.seams() if frozen.patches is not None else frozenset({"logits"})
    trace, = engine.run([Request(frozen, free=FREE, seams=seams, kv=True)])
    return trace, time.perf_counter() - started


def counts(got: Trace, want: Trace, seams: tuple[str, ...]) -> tuple[int, int]:
    """Values, and how many differ in any bit; a missing seam or another shape counts as all of them."""
    total = differ = 0
    for seam in seams:
        total += want[seam].size
        fits = seam in got and got[seam].shape == want[seam].shape
        differ += int((bits(got[seam]) != bits(want[seam])).sum()) if fits else want[seam].size
    return total, differ


def bits(array: np.ndarray) -> np.ndarray:
    """float32 as integers: NaN equals itself, and 0.0 differs from -0.0."""
    return np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
