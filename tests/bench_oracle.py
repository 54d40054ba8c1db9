"""What recording costs: the plain HF forward of the largest case beside the same forward with every hook.

    pytest tests/bench_oracle.py --benchmark-columns=min,median

Not collected by default. `test_ratio` alternates the two, so that a busy machine slows both, and holds the bar of 1.10.
Hashing and writing come after the forward, and are measured by themselves.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from harness.cases import Case, load_cases
from harness.checkpoint import EMBEDDED, Checkpoint
from harness.oracle import forward, freeze, load_model, record, wanted_seams
from harness.oracle.hooks import SeamHooks
from random_models import write_checkpoint

BAR = 1.10
ROUNDS = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    if (EMBEDDED / "model.safetensors").exists():
        return Checkpoint(EMBEDDED)
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def largest(checkpoint: Checkpoint) -> Case:
    cases = [case for case in load_cases()
             if all(":" in image or (case.root / image).exists() for image in case.images)]
    return max(cases, key=lambda case: (bool(case.images), freeze(case, checkpoint).length))


@pytest.fixture(scope="module")
def runs(checkpoint: Checkpoint, largest: Case):
    torch.set_num_threads(1)
    model, inputs = load_model(checkpoint), freeze(largest, checkpoint)
    tokens = [1] * largest.decode

    def plain() -> None:
        forward(model, inputs, tokens)

    def hooked(inside=None) -> None:
        seams = wanted_seams(checkpoint.geometry, inside, bool(largest.images))
        with SeamHooks(model, checkpoint.geometry, seams) as hooks:
            forward(model, inputs, tokens)
        hooks.arrays()

    return plain, hooked


def test_plain_forward(benchmark, runs) -> None:
    benchmark(runs[0])


def test_recording_forward(benchmark, runs) -> None:
    benchmark(runs[1])


def test_recording_the_inside_of_all_layers(benchmark, runs) -> None:
    benchmark(runs[1], "all")


def test_ratio(runs) -> None:
    spent = ([], [])
    for turn in range(ROUNDS):
        for which in ((0, 1), (1, 0))[turn % 2]:
            started = time.perf_counter()
            runs[which]()
            spent[which].append(time.perf_counter() - started)
    plain, hooked = (sorted(times)[ROUNDS // 2] for times in spent)
    print(f"\nplain {plain * 1e3:.2f} ms, recording {hooked * 1e3:.2f} ms, ratio {hooked / plain:.3f}, "
          f"medians of {ROUNDS}")
    assert hooked / plain <= BAR


def test_whole_recording(benchmark, checkpoint: Checkpoint, largest: Case, tmp_path: Path) -> None:
    folders = iter(range(1000))
    benchmark.pedantic(lambda: record(checkpoint, [largest], tmp_path / str(next(folders))), rounds=3)
