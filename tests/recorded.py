"""A tied and an untied random checkpoint, three cases, and their oracle; fixtures for the tests of the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from random_models import write_checkpoint

from harness.cases import Case, Turn
from harness.checkpoint import Checkpoint
from harness.oracle import load_model, record
from harness.store import Oracle

DECODE = 5
IMAGE = Case("image", "w", (Turn("user", "Describe this image.", "noise:160x128:1"),), DECODE)
TEXT = Case("text", "w", (Turn("", "Hello there, Zoë."),), DECODE)
TURNS = Case("turns", "w", (Turn("user", "Look: ", "noise:128x192:2", True), Turn("assistant", "Yes."),
                            Turn("user", "And?")), DECODE)
CASES = (IMAGE, TEXT, TURNS)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("model"), tied=request.param, seed=3, dtype="bfloat16"))


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint, tmp_path_factory) -> Oracle:
    return record(checkpoint, CASES, tmp_path_factory.mktemp("oracle") / "o", inside="all")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint):
    return load_model(checkpoint)


def close(left: np.ndarray, right: np.ndarray, limit: float = 2e-6) -> bool:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return left.shape == right.shape and np.linalg.norm(left - right) <= limit * np.linalg.norm(right)
