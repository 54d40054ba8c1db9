"""The way from a GPU to the store: memory is used again when the last array in it is gone, and not before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.oracle import drain
from harness.oracle.rollout import _margins


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> list:
    """Slabs of 64 bytes in ordinary memory: a machine without a GPU can pin none."""
    monkeypatch.setattr(drain, "SLAB", 64)
    monkeypatch.setattr(drain, "pinned", lambda count: torch.empty(count))
    return []


def test_memory_goes_back_when_the_last_array_is_gone(pool: list) -> None:
    slab = drain._Slab(9, pool)
    place = slab.memory.data_ptr()
    first, second = slab.take(torch.arange(6.).view(2, 3)), slab.take(torch.full((3,), 9.0))
    del slab
    assert not pool and first.tolist() == [[0, 1, 2], [3, 4, 5]] and second.tolist() == [9, 9, 9]
    row = first[1]
    del first, second
    assert not pool and row.tolist() == [3, 4, 5]
    del row
    assert [memory.data_ptr() for memory in pool] == [place]
    assert drain._Slab(2, pool).memory.data_ptr() == place


def test_a_part_larger_than_a_slab_has_memory_of_its_own(pool: list) -> None:
    slab = drain._Slab(100, pool)
    assert slab.take(torch.ones(100)).sum() == 100
    del slab
    assert not pool


def test_margins_are_those_of_the_two_largest() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    rows[2, 4] = rows[2, 9] = 10  # a tie
    best = np.partition(rows, -2, axis=-1)[:, -2:]
    assert np.array_equal(_margins(rows), best[:, 1] - best[:, 0]) and _margins(rows)[2] == 0
