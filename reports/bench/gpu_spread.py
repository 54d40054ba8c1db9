"""Whether a model that is spread over GPUs records what one GPU records: oracles of one checkpoint, compared seam by seam.

    python reports/bench/gpu_spread.py [cpu] [cuda] [auto ..] [--size 2b] [--layers N --vision-layers N]

A random checkpoint is written to a temporary directory and recorded on each device given, inside of every layer; each
oracle is compared with the one before. One of `auto` is also compared with hooks on a plain forward of the spread model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from harness.cases import Case, Turn  # noqa: E402
from harness.checkpoint import Checkpoint  # noqa: E402
from harness.oracle import forward, load_model, record, wanted_seams  # noqa: E402
from harness.oracle.hooks import SeamHooks  # noqa: E402
from harness.store import Oracle  # noqa: E402
from harness.synth import plan, synthesize  # noqa: E402

CASES = (Case("noise", "an image", (Turn("user", "Describe this image.", "noise:448x448:7"),)),
         Case("text", "no image", (Turn("user", "Hello there."),)))


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left.astype(np.float64) - right) / np.linalg.norm(left.astype(np.float64)))


def compare(what: str, left: Oracle, right: Oracle) -> None:
    for name in left.cases:
        one, other = left.case(name), right.case(name)
        tokens = np.array_equal(one.rollout.tokens, other.rollout.tokens)
        beside(f"{what}, {name}: tokens {'equal' if tokens else 'differ'}", dict(one.trace.items()), other.trace)


def beside(what: str, left: dict[str, np.ndarray], right: Any) -> None:
    same = sum(np.array_equal(array, right[seam]) for seam, array in left.items())
    worst, where = max((distance(array, right[seam]), seam) for seam, array in left.items())
    print(f"{what}, {same} of {len(left)} seams the same bits, largest relative L2 {worst:.1e} at {where}", flush=True)


def spread(checkpoint: Checkpoint, oracle: Oracle) -> None:
    model, places = load_model(checkpoint, "auto"), {}
    for module, place in model.hf_device_map.items():
        places.setdefault(place, []).append(module)
    print("spread:", {place: f"{modules[0]} .. {modules[-1]}" for place, modules in places.items()})
    for name in oracle.cases:
        found = oracle.case(name)
        seams = wanted_seams(checkpoint.geometry, "all", found.inputs.patches is not None)
        with SeamHooks(model, checkpoint.geometry, seams) as hooks:
            forward(model, found.inputs, found.rollout.tokens)
            beside(f"auto beside a plain forward, {name}", hooks.arrays(), found.trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", default=["cpu", "cuda", "auto", "auto"])
    parser.add_argument("--size", default="2b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vision-layers", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, made = Path(folder), []
        synthesize(plan(given.size, given.layers, given.vision_layers), root / "model")
        for number, device in enumerate(given.devices):
            started = time.perf_counter()
            made.append(record(Checkpoint(root / "model"), CASES, root / str(number), device=device, inside="all"))
            print(f"{device}: {time.perf_counter() - started:.1f} s", flush=True)
            if number:
                compare(f"{given.devices[number - 1]} beside {device}", *made[-2:])
        if "auto" in given.devices and torch.cuda.is_available():
            spread(Checkpoint(root / "model"), made[given.devices.index("auto")])


if __name__ == "__main__":
    main()
