"""`coreai-cpu` against Apple's runtime, operation by operation, bit for bit: shapes, dtypes and the edges of both."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_child import DTYPES, Runtime, along, binary, program, tensor, unary

from harness.engines.replay.coreai_cpu import CoreAICpu

pytest.importorskip("coreai")
A = CoreAICpu()
FLOATS = ("f16", "f32")
INTEGERS = ("si8", "ui8", "si16", "si32")
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 65504.0, -65504.0, 6e-8, -6e-8, 6.2e-5, 0.5, 2.5, -3.0,
           88.5, -88.5, 1e-40, 3.4e38, -3.4e38, 127.5, 255.0, 32768.0, 2147483648.0, 1e20]
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
FEW = settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    child = Runtime()
    yield child
    child.close()


def draw(dtype: str, shape: tuple[int, ...], seed: int, edges: bool = True) -> np.ndarray:
    """Values of every size, with edge values among them."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(DTYPES[dtype])
    if kind.kind in "iu":
        bounds = np.iinfo(kind)
        values = rng.integers(bounds.min, bounds.max, shape, dtype=kind, endpoint=True)
        return np.where(rng.random(shape) < 0.2, rng.integers(0, 4, shape), values).astype(kind)
    if kind == bool:
        return rng.random(shape) < 0.5
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3, shape)
    if edges:
        values = np.where(rng.random(shape) < 0.15, rng.choice(SPECIAL, shape), values)
    with np.errstate(over="ignore"):
        return values.astype(kind)


def same(got: torch.Tensor, want: np.ndarray) -> None:
    """Equal bits; any NaN is as good as another."""
    ours = got.numpy()
    assert (ours.dtype, ours.shape) == (want.dtype, want.shape)
    if want.dtype.kind != "f":
        assert np.array_equal(ours, want)
        return
    bits = f"u{want.itemsize}"
    differ = (np.ascontiguousarray(ours).view(bits) != np.ascontiguousarray(want).view(bits)) & ~(
        np.isnan(ours) & np.isnan(want))
    first = tuple(np.argwhere(differ)[0]) if differ.any() else ()
    assert not differ.any(), f"{differ.sum()} of {differ.size} differ, first {list(first)}: {ours[first]}, {want[first]}"


EVERY_FP16 = np.arange(65536, dtype=np.uint16).view(np.float16)
MANY_FP32 = np.concatenate([
    *(np.random.default_rng(1).standard_normal(4000) * scale for scale in (1e-3, 1, 10, 100)), SPECIAL,
    np.random.default_rng(2).integers(0, 0x7F800000, 8000).astype(np.uint32).view(np.float32)])
with np.errstate(all="ignore"):
    MANY_FP32 = MANY_FP32.astype(np.float32)
FUNCTIONS = {name: (lambda x, name=name: A.unary(name, x)) for name in (
    "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh",
    "atanh", "erf", "abs", "round")}
FUNCTIONS |= {"silu": A.silu, "sigmoid": A.sigmoid, "relu": A.relu}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_of_every_value(runtime: Runtime, name: str, dtype: str) -> None:
    x = EVERY_FP16 if dtype == "f16" else MANY_FP32
    same(FUNCTIONS[name](torch.from_numpy(x)), runtime.run(unary(name, dtype, x.shape), {"a": x})["y"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["none", "tanh", "sigmoid"])
def test_gelu_of_every_value(runtime: Runtime, kind: str, dtype: str) -> None:
    x = EVERY_FP16 if dtype == "f16" else MANY_FP32
    want = runtime.run(unary("gelu", dtype, x.shape, f"approximate = <{kind}>"), {"a": x})["y"]
    same(A.gelu(torch.from_numpy(x), kind), want)


@pytest.mark.parametrize("source", [*FLOATS, *INTEGERS, "ui32", "i1"])
@pytest.mark.parametrize("target", [*FLOATS, *INTEGERS, "ui32", "i1"])
def test_casts(runtime: Runtime, source: str, target: str) -> None:
    x = draw(source, (300,), 3)
    want = runtime.run(unary("cast", source, x.shape, result=target), {"a": x})["y"]
    held = x.astype(np.int64) if source == "ui32" else x
    got = A.cast(torch.from_numpy(held), target)
    same(got, want.astype(np.int64) if target == "ui32" else want)


def broadcast(shape: tuple[int, ...], data: st.DataObject) -> tuple[int, ...]:
    """A shape that broadcasts to `shape`."""
    ones = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    return tuple(1 if one else size for one, size in zip(ones, shape))[data.draw(st.integers(0, len(shape) - 1)):]


ELEMENTWISE = {"add": A.add, "sub": A.sub, "mul": A.mul, "divide": A.div, "pow": A.pow, "maximum": A.maximum,
               "minimum": A.minimum, "modulo": A.mod, "floor_divide": A.floor_div}


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
@FEW
@given(data=st.data())
def test_elementwise(runtime: Runtime, name: str, data: st.DataObject) -> None:
    dtype, shape = data.draw(st.sampled_from(FLOATS if name == "pow" else (*FLOATS, "si32"))), data.draw(SHAPES)
    other, seed = broadcast(shape, data), data.draw(st.integers(0, 1 << 20))
    a, b = draw(dtype, shape, seed), draw(dtype, other, seed + 1)
    if dtype == "si32" and name in ("divide", "modulo", "floor_divide"):
        b[(b == 0) | (b == -1)] = 5  # a division by zero ends the runtime's process
    want = runtime.run(binary(name, dtype, a.shape, b.shape, np.broadcast_shapes(shape, other)), {"a": a, "b": b})["y"]
    same(ELEMENTWISE[name](torch.from_numpy(a), torch.from_numpy(b)), want)


@FEW
@given(data=st.data())
def test_matmul(runtime: Runtime, data: st.DataObject) -> None:
    dtype, seed = data.draw(st.sampled_from(FLOATS)), data.draw(st.integers(0, 1 << 20))
    batch = data.draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    rows, inner, columns = (data.draw(st.integers(1, top)) for top in (9, 200, 17))
    left = broadcast(batch, data) if batch else ()
    a, b = draw(dtype, (*left, rows, inner), seed, edges=False), draw(dtype, (*batch, inner, columns), seed + 1)
    text = binary("batch_matmul", dtype, a.shape, b.shape, (*batch, rows, columns))
    want = runtime.run(text, {"a": a, "b": b})["y"]
    same(A.matmul(torch.from_numpy(a), torch.from_numpy(b)), want)
    if b.ndim == 2:
        same(A.linear(torch.from_numpy(a), torch.from_numpy(b).t().contiguous()), want)


REDUCTIONS = {"reduce_sum": A.reduce_sum, "reduce_mean": A.reduce_mean, "reduce_product": A.reduce_product,
              "reduce_max": A.reduce_max, "reduce_min": A.reduce_min}


@pytest.mark.parametrize("name", sorted(REDUCTIONS))
@FEW
@given(data=st.data())
def test_reductions(runtime: Runtime, name: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple))
    axes = sorted(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    dtype = data.draw(st.sampled_from(FLOATS if name == "reduce_mean" else (*FLOATS, "si32")))
    a = draw(dtype, shape, data.draw(st.integers(0, 1 << 20)), edges=data.draw(st.booleans()))
    reduced = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    asked = [axis - len(shape) if data.draw(st.booleans()) else axis for axis in axes]
    want = runtime.run(along(name, dtype, shape, asked, reduced), {"a": a})["y"]
    same(REDUCTIONS[name](torch.from_numpy(a), asked), want)


@FEW
@given(data=st.data())
def test_softmax(runtime: Runtime, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple))
    axis, dtype = data.draw(st.integers(-len(shape), len(shape) - 1)), data.draw(st.sampled_from(FLOATS))
    a = draw(dtype, shape, data.draw(st.integers(0, 1 << 20)), edges=data.draw(st.booleans()))
    want = runtime.run(along("softmax", dtype, shape, axis, shape), {"a": a})["y"]
    same(A.softmax(torch.from_numpy(a), axis), want)


@FEW
@given(data=st.data())
def test_dequantize(runtime: Runtime, data: st.DataObject) -> None:
    kind, wide = data.draw(st.sampled_from(("si8", "ui8"))), data.draw(st.sampled_from(FLOATS))
    blocks = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8)), min_size=1, max_size=3))
    scales, shape = tuple(count for count, _ in blocks), tuple(count * size for count, size in blocks)
    seed = data.draw(st.integers(0, 1 << 20))
    parts = {"a": draw(kind, shape, seed), "b": draw(wide, scales, seed + 1, edges=False), "c": draw(kind, scales, seed + 2),
             "d": draw(wide, scales, seed + 3, edges=False)}
    kinds = {name: tensor(dtype, parts[name].shape) for name, dtype in zip("abcd", (kind, wide, kind, wide))}
    body = f"%y = coreai.blockwise_shift_scale %a, %b, %c, %d : ({', '.join(kinds.values())}) -> {tensor(wide, shape)}"
    want = runtime.run(program(kinds, body, {"%y": tensor(wide, shape)}), parts)["y"]
    same(A.dequantize(*(torch.from_numpy(parts[name]) for name in "abcd")), want)
