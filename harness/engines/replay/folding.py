"""Shape arithmetic, done while compiling: about a quarter of a decoder's operations compute nothing but sizes.

Semantics: as in `ops`; only integers that come from constants and shapes are folded, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from harness.engines.replay.program import Node, Value
from harness.engines.replay.rules import INTEGERS
from harness.engines.replay.sizes import Size, hosted

MOST = 64
"""More elements than any list of sizes has; bigger integer constants are tables."""


def constant_sizes(value: Value) -> np.ndarray | None:
    """A small integer constant as a host value."""
    constant = value.constant
    if constant is None or value.dtype not in INTEGERS or constant.size > MOST:
        return None
    return hosted(constant.array)


def fold(node: Node, host: Callable[[Value], np.ndarray | None], size: Callable[[Value, int], Size]) -> np.ndarray | None:
    """What a node computes, where all it takes are host values; None for what must run.

    size: a dimension of a tensor, by axis.
    """
    if node.op == "get_shape":
        value = node.operands[0]
        return np.array([size(value, axis) for axis in range(len(value.shape))], dtype=object)
    work = _WORK.get(node.op.removeprefix("broadcasting_"))
    if work is None or len(node.results) != 1 or node.results[0].dtype not in INTEGERS:
        return None
    given = [host(value) for value in node.operands]
    if any(array is None for array in given):
        return None
    try:
        return work(*given)
    except TypeError:  # two sizes that are both known only when it runs, multiplied, or used as an index
        return None


def _plain(array: np.ndarray) -> list[int]:
    return [int(size) for size in array.ravel()]


def _slice(x: np.ndarray, start: np.ndarray, end: np.ndarray, stride: np.ndarray) -> np.ndarray:
    return x[tuple(slice(*bounds) for bounds in zip(_plain(start), _plain(end), _plain(stride)))]


def _concat(axis: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.atleast_1d(part) for part in parts], axis=int(axis[()]))


def _squeeze(x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return x.squeeze(tuple(_plain(axes)))


def _exactly(function: Callable[..., int]) -> Callable[..., np.ndarray]:
    """A function of plain integers, element by element."""
    return np.frompyfunc(lambda x, y: Size(function(int(x), int(y))), 2, 1)


def _array(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """numpy hands back the bare object where all operands have rank 0."""
    return lambda *given: np.asarray(function(*given), dtype=object)


_WORK: Mapping[str, Callable[..., np.ndarray]] = {
    "cast": lambda x: x,
    "slice": _slice,
    "concat": _concat,
    "reshape": lambda x, shape: x.reshape(_plain(shape)),
    "transpose": lambda x, order: x.transpose(_plain(order)),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(_plain(axes))),
    "shrink_dims": _squeeze,
    "broadcast_to": lambda x, shape: np.broadcast_to(x, _plain(shape)),
    "add": _array(lambda x, y: x + y),
    "sub": _array(lambda x, y: x - y),
    "mul": _array(lambda x, y: x * y),
    "floor_divide": _array(_exactly(lambda x, y: x // y)),
    "maximum": _array(_exactly(max)),
    "minimum": _array(_exactly(min)),
}
