"""Tokens a second: replay beside Apple's runtime, on one bundle, one machine, one run.

    python reports/bench/replay_speed.py [--hidden 1024] [--layers 3] [--mode int8hu] [--tokens 16]

A random checkpoint of that width is exported (S = 1, context 256). Apple's runtime takes `tokens` single steps; replay takes
the same steps one by one, then 211 tokens in layer-major order. Two threads, nothing else running, or the figures lie.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from random_models import write_checkpoint

from harness.cases import FrozenInputs
from harness.checkpoint import open_checkpoint
from harness.engines import Request
from harness.engines.coreai import CoreAIEngine
from harness.engines.replay.engine import ReplayEngine
from harness.export import export


def main() -> None:
    """Export, run, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--mode", default="int8hu")
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replay-speed-") as folder:
        root = Path(folder)
        checkpoint = open_checkpoint(write_checkpoint(
            root / "model", layers=arguments.layers, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
            num_attention_heads=arguments.hidden // 32))
        made = export(checkpoint, root / "out", arguments.mode, grid=(4, 6), context=256, vision=False)
        decoder = made.decoder / f"{made.decoder.name}.aimodel"
        settings = {"geometry": checkpoint.geometry, "grid": (4, 6), "context": 256}

        def rate(engine, tokens: int) -> float:
            ids = (np.arange(tokens) * 7 % 400).astype(np.int32)
            case = FrozenInputs("text", ids, np.zeros((3, tokens), np.int32))
            return next(engine.run([Request(case)])).facts["prefill_tok_s"]

        apple = rate(CoreAIEngine(decoder, **settings), arguments.tokens)
        print(f"{'Apple runtime, single steps':46} {apple:10.2f} tokens/s", flush=True)
        for arithmetic in ("fp16", "fp32"):
            for order, tokens in (("steps", arguments.tokens * 4), ("layers", 211)):
                engine = ReplayEngine(decoder, arithmetic=arithmetic, order=order, **settings)
                rate(engine, 8)
                started = time.perf_counter()
                ours = rate(engine, tokens)
                name = f"replay {arithmetic}, {'single steps' if order == 'steps' else 'layer-major, 211 tokens'}"
                print(f"{name:46} {ours:10.2f} tokens/s  {ours / apple:8.0f} x  ({time.perf_counter() - started:.1f} s)",
                      flush=True)


if __name__ == "__main__":
    main()
