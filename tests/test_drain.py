"""The way from a GPU to the store: memory is used again when the last array in it is gone, and not before."""

from __future__ import annotations

from contextlib import nullcontext

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
    slab.memory[:9] = torch.arange(9.0)
    first, second = slab.whole[:6].reshape(2, 3), slab.whole[6:9]
    del slab
    assert not pool and first.tolist() == [[0, 1, 2], [3, 4, 5]] and second.tolist() == [6, 7, 8]
    row = first[1]
    del first, second
    assert not pool and row.tolist() == [3, 4, 5]
    del row
    assert [memory.data_ptr() for memory in pool] == [place]
    assert drain._Slab(2, pool).memory.data_ptr() == place


def test_a_part_larger_than_a_slab_has_memory_of_its_own(pool: list) -> None:
    slab = drain._Slab(100, pool)
    assert len(slab.whole) == 100
    del slab
    assert not pool


class Stream:
    """A stream on which all is done at once."""

    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def record_event(self) -> Stream:
        return self

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Written(list):
    """A writer that keeps what it is given: name, tensors by name as lists, key."""

    def part(self, name: str, arrays: dict[str, np.ndarray], key: str) -> None:
        self.append((name, {seam: array.tolist() for seam, array in arrays.items()}, key))


@pytest.fixture
def far(pool: list, monkeypatch: pytest.MonkeyPatch) -> drain.Drain:
    """The way from a GPU without the GPU; 64 bytes leave together."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    return drain.Drain(torch.device("cuda"))


def four(start: int) -> dict[str, torch.Tensor]:
    """Four values, one of two tensors not in C order."""
    return {"b": torch.arange(start, start + 3.0).expand(1, 3).T, "a": torch.tensor(start + 3.0)}


@pytest.mark.parametrize("age, slabs, sent", [(1e9, 16, [0, 0, 0, 0, 0, 0]), (1e9, 1, [0, 0, 0, 0, 1, 1]),
                                              (-1.0, 16, [1, 2, 3, 4, 5, 6])])
def test_parts_leave_in_order_when_they_are_many_or_old(far: drain.Drain, monkeypatch: pytest.MonkeyPatch, age: float,
                                                        slabs: int, sent: list[int]) -> None:
    monkeypatch.setattr(drain, "AGE", age)
    monkeypatch.setattr(drain, "SLABS", slabs)
    out, handed, submit = Written(), [], far._worker.submit
    monkeypatch.setattr(far._worker, "submit", lambda *task: handed.append(task) or submit(*task))
    with far:
        for number in range(6):  # 64 bytes are four of these
            far.put(out, f"p{number}", four(4 * number), "k")
            assert len(handed) == sent[number]
        far.flush()
    assert out == [(f"p{n}", {"b": [[4 * n], [4 * n + 1], [4 * n + 2]], "a": 4 * n + 3}, "k") for n in range(6)]
    assert [list(tensors) for _, tensors, _ in out] == [["b", "a"]] * 6


def test_a_part_that_is_too_large_leaves_alone(far: drain.Drain) -> None:
    out = Written()
    with far:
        for number, count in enumerate((3, 50, 5)):
            far.put(out, f"p{number}", {"a": torch.full((count,), float(number))}, "")
    assert out == [("p0", {"a": [0] * 3}, ""), ("p1", {"a": [1] * 50}, ""), ("p2", {"a": [2] * 5}, "")]
    assert sorted(map(len, far._pool)) == [16, 16], "the large one's memory is not kept"


def test_what_the_writer_raises_is_raised_where_it_is_waited_for(far: drain.Drain) -> None:
    class Full(Written):
        def part(self, *_: object) -> None:
            raise OSError("full")

    with far:
        far.put(Full(), "p", four(0), "k")
        with pytest.raises(OSError, match="full"):
            far.flush()


def test_margins_are_those_of_the_two_largest() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    rows[2, 4] = rows[2, 9] = 10  # a tie
    best = np.partition(rows, -2, axis=-1)[:, -2:]
    assert np.array_equal(_margins(rows), best[:, 1] - best[:, 0]) and _margins(rows)[2] == 0
