"""What generated code calls besides torch and its arithmetic: exact moves of numbers that torch does in several steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.errors import HarnessError


@contextmanager
def one_thread() -> Iterator[None]:
    """For work too small to share: on a busy machine threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def steps(count: int, device: str) -> Iterator[int]:
    """0 .. count - 1; what a step computes is small."""
    if device != "cpu":
        yield from range(count)
        return
    with one_thread():
        yield from range(count)


def put(x: Tensor, update: Tensor, window: Any) -> None:
    """x[window] = update, in place; shapes must be equal, for torch would broadcast without a word."""
    part = x[window]
    if part.shape != update.shape:
        raise HarnessError(f"a slice of {list(part.shape)} is to hold {list(update.shape)}: the call is longer than the "
                           "state has slots")
    part.copy_(update)


def updated(x: Tensor, update: Tensor, window: Any) -> Tensor:
    """A copy of x with x[window] = update."""
    copy = x.clone()
    put(copy, update, window)
    return copy


def gather_nd(x: Tensor, indices: Tensor) -> Tensor:
    """x [*s, *rest], indices [*i, Q] with Q = len(s) -> [*i, *rest]. Negative indices count from the end; IndexError."""
    picked = tuple(indices[..., axis].long() for axis in range(indices.shape[-1]))
    return x[picked] if picked else x.expand(*indices.shape[:-1], *x.shape)


def gather_along_axis(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """out[.., i, ..] = x[.., indices[.., i, ..], ..] along one axis; other axes have equal sizes."""
    places, size = indices.long(), x.shape[axis]
    return torch.gather(x, axis, torch.where(places < 0, places + size, places))


def first_largest(x: Tensor, axis: int) -> Tensor:
    """Index of the first of the largest values; the axis stays."""
    places = torch.arange(x.shape[axis], device=x.device).reshape([-1] + [1] * (x.ndim - 1 - axis % x.ndim))
    largest = x == x.amax(axis, keepdim=True)
    return torch.where(largest, places, x.shape[axis]).amin(axis, keepdim=True)


NAMES = ("steps", "put", "updated", "gather_nd", "gather_along_axis", "first_largest")
