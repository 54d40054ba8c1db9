"""Every operation of the table, compiled by replay with the arithmetic `coreai-cpu`, against Apple's runtime.

Programs of one operation are written as text: shapes with empty and size-1 dimensions, indices from either end and out of
range. Where the runtime refuses an input, replay must refuse it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_child import DTYPES, Refused, Runtime, program, tensor
from test_coreai_cpu import draw, same

from harness.engines.replay.compile import Constants, compiled
from harness.engines.replay.coreai_cpu import CoreAICpu
from harness.engines.replay.ops import TABLE

pytest.importorskip("coreai")
KINDS = ("f16", "f32", "si32", "i1")
SOME = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
FAR = 2**31 - 1


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    child = Runtime()
    yield child
    child.close()


class Operation:
    """One operation: tensors given at run time, constants written into the program."""

    def __init__(self, name: str, result: tuple[str, tuple[int, ...]] | list[tuple[str, tuple[int, ...]]],
                 *operands: Any, attributes: str = "") -> None:
        """operands: (dtype, array) is given at run time, (dtype, list or number) is a constant."""
        self.inputs, lines, names, kinds = {}, [], [], []
        for number, (dtype, value) in enumerate(operands):
            constant = not isinstance(value, np.ndarray)
            shape = np.shape(value)
            names.append(f"%p{number}")
            kinds.append(tensor(dtype, shape))
            if constant:
                text = "" if 0 in shape else str(value).lower()
                lines.append(f"%p{number} = coreai.constant dense<{text}> : {kinds[-1]}")
            else:
                self.inputs[f"p{number}"] = (dtype, value)
        results = [result] if isinstance(result, tuple) else result
        given = [tensor(*entry) for entry in results]
        targets = [f"%y{number}" for number in range(len(results))]
        lines.append(f'{", ".join(targets)} = "coreai.{name}"({", ".join(names)}) {attributes} : '
                     f"({', '.join(kinds)}) -> ({', '.join(given)})")
        self.text = program({name: tensor(dtype, value.shape) for name, (dtype, value) in self.inputs.items()},
                            "\n".join(lines), dict(zip(targets, given)))


def run_both(runtime: Runtime, operation: Operation, **changed: np.ndarray) -> None:
    """Run on both sides; results must be equal bit for bit, or both must refuse."""
    arrays = {name: changed.get(name, value) for name, (_, value) in operation.inputs.items()}
    made = compiled(runtime.read(operation.text), Constants(CoreAICpu()))
    try:
        want: Mapping[str, np.ndarray] | None = runtime.run(operation.text, arrays)
    except Refused:
        want = None
    held = {name: torch.from_numpy(array.astype(np.int64) if array.dtype == np.uint32 else array)
            for name, array in arrays.items()}
    if want is None:
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            made({}, **held)
        return
    outputs, _ = made({}, **held)
    assert outputs.keys() == want.keys()
    for name, array in want.items():
        same(outputs[name].contiguous(), array.astype(np.int64) if array.dtype == np.uint32 else array)


def tensors(data: st.DataObject, kinds: tuple[str, ...] = KINDS, sizes: st.SearchStrategy = SIZES) -> tuple[str, np.ndarray]:
    """A type and values of it."""
    dtype, shape = data.draw(st.sampled_from(kinds)), data.draw(sizes)
    return dtype, draw(dtype, shape, data.draw(st.integers(0, 1 << 20)))


@SOME
@given(data=st.data())
def test_slice(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    bound = st.one_of(st.integers(-9, 9), st.just(FAR))
    parts = [(data.draw(bound), data.draw(bound), data.draw(st.integers(1, 3))) for _ in x.shape]
    want = x[tuple(slice(*part) for part in parts)]
    run_both(runtime, Operation("slice", (dtype, want.shape), (dtype, x), *(
        ("si32", [part[number] for part in parts]) for number in range(3))))


@SOME
@given(data=st.data())
def test_slice_update(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    # Apple's verifier counts a start before -size otherwise than its runtime and its docstring, and refuses the program.
    bounds = [st.one_of(st.integers(-size, size), st.just(FAR)) for size in x.shape]
    parts = [(data.draw(bound), data.draw(bound), data.draw(st.integers(1, 2))) for bound in bounds]
    update = draw(dtype, x[tuple(slice(*part) for part in parts)].shape, data.draw(st.integers(0, 99)))
    columns = [("si32", [part[number] for part in parts]) for number in range(3)]
    run_both(runtime, Operation("slice_update", (dtype, x.shape), (dtype, x), *columns, (dtype, update)))


@SOME
@given(data=st.data())
def test_reshape_transpose(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    order = data.draw(st.permutations(range(x.ndim)))
    turned = x.transpose(order)
    run_both(runtime, Operation("transpose", (dtype, turned.shape), (dtype, x), ("ui32", list(order))))
    flat = data.draw(st.sampled_from(((x.size,), (1, x.size), (x.size, 1, 1), x.shape[::-1])))
    run_both(runtime, Operation("reshape", (dtype, flat), (dtype, x), ("ui32", list(flat))))


@SOME
@given(data=st.data())
def test_dimensions_come_and_go(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    axes = sorted(data.draw(st.sets(st.integers(0, x.ndim), min_size=1, max_size=2)))
    wide = np.expand_dims(x, tuple(axes))
    asked = [axis - wide.ndim if data.draw(st.booleans()) else axis for axis in axes]
    run_both(runtime, Operation("expand_dims", (dtype, wide.shape), (dtype, x), ("si32", asked)))
    run_both(runtime, Operation("shrink_dims", (dtype, x.shape), (dtype, np.ascontiguousarray(wide)), ("si32", asked)))


@SOME
@given(data=st.data())
def test_broadcasts(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    axis = data.draw(st.integers(0, x.ndim - 1))
    row = np.ascontiguousarray(x.take([0], axis))
    size = data.draw(st.integers(1, 4))
    wide = tuple(size if place == axis else length for place, length in enumerate(row.shape))
    asked = axis - x.ndim if data.draw(st.booleans()) else axis
    run_both(runtime, Operation("broadcast_in_dims", (dtype, wide), (dtype, row), ("ui32", [size]), ("si32", [asked])))
    run_both(runtime, Operation("broadcast_to", (dtype, (2, *wide)), (dtype, row), ("ui32", [2, *wide])))


@SOME
@given(data=st.data())
def test_joins_and_parts(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    joined = np.concatenate([x, x, x], axis)
    run_both(runtime, Operation("concat", (dtype, joined.shape), ("si32", axis), (dtype, x), (dtype, x), (dtype, x)))
    cut = data.draw(st.integers(0, x.shape[axis]))
    parts = [(dtype, part.shape) for part in np.split(x, [cut], axis)]
    run_both(runtime, Operation("split", parts, (dtype, x), ("ui32", [cut, x.shape[axis] - cut]), ("si32", axis)))


@SOME
@given(data=st.data())
def test_repetitions(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    times = [data.draw(st.integers(1, 3)) for _ in x.shape]
    run_both(runtime, Operation("tile", (dtype, np.tile(x, times).shape), (dtype, x), ("ui32", times)))
    axes = sorted(data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1)))
    run_both(runtime, Operation("reverse", (dtype, x.shape), (dtype, x), ("si32", axes)))


@SOME
@given(data=st.data())
def test_gathers(runtime: Runtime, data: st.DataObject) -> None:
    """Indices wrap once from the end; one that is out of range raises on both sides."""
    dtype, x = tensors(data)
    axis, seed = data.draw(st.integers(0, x.ndim - 1)), data.draw(st.integers(0, 1 << 20))
    size, rng = x.shape[axis], np.random.default_rng(seed)
    spread = data.draw(st.sampled_from((0, 0, 1)))
    shape = tuple(data.draw(st.integers(1, 4)) if place == axis else length for place, length in enumerate(x.shape))
    places = rng.integers(-size - spread, size + spread, shape, dtype=np.int32)
    asked = axis - x.ndim if data.draw(st.booleans()) else axis
    run_both(runtime, Operation("gather_along_axis", (dtype, shape), (dtype, x), ("si32", places), ("si32", asked)))
    depth = data.draw(st.integers(1, x.ndim))
    bounds = np.array(x.shape[:depth])
    vectors = rng.integers(-bounds - spread, bounds + spread, (3, 2, depth)).astype(np.int32)
    run_both(runtime, Operation("gather_nd", (dtype, (3, 2, *x.shape[depth:])), (dtype, x), ("si32", vectors)))


@SOME
@given(data=st.data())
def test_choices(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    other, picked = draw(dtype, x.shape, 5), draw("i1", x.shape[-1:], 6)
    operands = ("i1", picked), (dtype, x), (dtype, other)
    run_both(runtime, Operation("decomposable.broadcasting_where", (dtype, x.shape), *operands))
    for name in ("equal", "not_equal", *(("greater",) if dtype != "i1" else ())):
        run_both(runtime, Operation(f"decomposable.broadcasting_{name}", ("i1", x.shape), (dtype, x), (dtype, other)))
    if dtype == "i1":
        run_both(runtime, Operation("not", ("i1", x.shape), ("i1", x)))
        for name in ("and", "or", "xor"):
            run_both(runtime, Operation(f"decomposable.broadcasting_{name}", ("i1", x.shape), ("i1", x), ("i1", other)))


@SOME
@given(data=st.data())
def test_summaries(runtime: Runtime, data: st.DataObject) -> None:
    dtype, x = tensors(data)
    axis = data.draw(st.integers(0, x.ndim - 1))
    kept = tuple(1 if place == axis else length for place, length in enumerate(x.shape))
    if dtype == "i1":
        for name in ("all", "any"):
            run_both(runtime, Operation(name, ("i1", kept), ("i1", x), ("si32", [axis])))
    else:
        tied = np.where(np.isfinite(x), np.round(x), 0).astype(x.dtype)  # NaN is no number to be the largest
        run_both(runtime, Operation("argmax", ("ui32", kept), (dtype, tied), ("si32", axis)))


@SOME
@given(data=st.data())
def test_ranges(runtime: Runtime, data: st.DataObject) -> None:
    start, stop, step = (data.draw(st.integers(*bounds)) for bounds in ((-5, 5), (6, 20), (1, 4)))
    x = np.zeros(len(range(start, stop, step)), np.int32)
    operation = Operation("range", ("si32", x.shape), ("si32", start), ("si32", stop), ("si32", step))
    run_both(runtime, operation)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 3)])
@pytest.mark.parametrize("dtype", KINDS)
def test_nothing_at_all(runtime: Runtime, dtype: str, shape: tuple[int, ...]) -> None:
    """Empty tensors go through moves, arithmetic and products."""
    x = np.zeros(shape, DTYPES[dtype])
    run_both(runtime, Operation("transpose", (dtype, shape[::-1]), (dtype, x), ("ui32", [*range(len(shape))][::-1])))
    run_both(runtime, Operation("concat", (dtype, shape), ("si32", 0), (dtype, x), (dtype, x[:0])))
    if dtype != "i1":
        run_both(runtime, Operation("decomposable.broadcasting_add", (dtype, shape), (dtype, x), (dtype, x[..., :1])))
    if dtype in ("f16", "f32") and len(shape) > 1:
        turned = np.ascontiguousarray(np.swapaxes(x, -1, -2))
        run_both(runtime, Operation("decomposable.broadcasting_batch_matmul",
                                    (dtype, (*shape[:-1], shape[-2])), (dtype, x), (dtype, turned)))


FLOATING = ("add", "sub", "mul", "divide", "maximum", "minimum", "pow", "modulo", "floor_divide")
COMPARING = ("equal", "not_equal", "greater")
LOGICAL = ("and", "or", "xor")
BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor")


@pytest.mark.parametrize("name", [*FLOATING, *COMPARING, *LOGICAL, *BITWISE, "where", "batch_matmul"])
def test_operations_that_do_not_broadcast(runtime: Runtime, name: str) -> None:
    """The same rules serve the operations of equal shapes."""
    dtype = "i1" if name in LOGICAL else "si32" if name in BITWISE else "f16"
    x, y = (draw(dtype, (3, 4, 4), seed) for seed in (1, 2))
    result = "i1" if name in COMPARING else dtype
    operands = [(dtype, x), (dtype, y)]
    if name == "where":
        operands.insert(0, ("i1", draw("i1", (3, 4, 4), 3)))
    run_both(runtime, Operation(name, (result, x.shape), *operands))


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("dtype", ["si8", "si32", "i1"])
def test_bits(runtime: Runtime, name: str, dtype: str) -> None:
    x, y = draw(dtype, (5, 7), 1), draw(dtype, (7,), 2)
    run_both(runtime, Operation(f"decomposable.broadcasting_{name}", (dtype, x.shape), (dtype, x), (dtype, y)))


def test_every_operation_of_the_table_is_tried() -> None:
    """A rule that is added is tried here or in `test_coreai_cpu`."""
    tried = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8")
                    for name in ("test_replay_ops.py", "test_coreai_cpu.py"))
    assert not [name for name in TABLE if not re.search(rf'[". ]{name.removeprefix("broadcasting_")}[" ]', tried)]
