"""In which type a program takes its norms and softmaxes: ours are float32, and a narrow norm is judged by what it makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_bundle import Small, small_bundle

from harness.engines.replay.precision import NORM, SOFTMAX, Taken, taken
from harness.engines.replay.program import Constant, Function, Node, Value, read_program
from harness.plan import CONSTANTS
from harness.rungs.precision import SEAMS, precision
from harness.verdict import Outcome

pytest.importorskip("coreai")
WIDTH = 64


class Written:
    """A function written down, operation by operation."""

    def __init__(self, width: int | None = WIDTH) -> None:
        self.nodes: list[Node] = []
        self.x = Value(0, "f16", (1, 1, width), "x")
        self._next = 1

    def value(self, dtype: str, shape: tuple[int | None, ...], constant: Constant | None = None) -> Value:
        self._next += 1
        return Value(self._next, dtype, shape, None, constant)

    def number(self, number: float, dtype: str) -> Value:
        held = np.array(number, {"f16": np.float16, "f32": np.float32, "si32": np.int32}[dtype])
        return self.value(dtype, (), Constant(dtype, (), _held=held))

    def axis(self) -> Value:
        return self.value("si32", (1,), Constant("si32", (1,), _held=np.array([2], np.int32)))

    def op(self, name: str, *operands: Value, dtype: str | None = None, lanes: bool = True) -> Value:
        shape = self.x.shape if lanes else (1, 1, 1)
        made = self.value(dtype or operands[0].dtype, shape)
        attributes = {}
        self.nodes.append(Node(name, operands, (made,), attributes, len(self.nodes) + 1))
        return made

    def norm(self, x: Value, *, less_mean: bool = False) -> Value:
        if less_mean:
            x = self.op("broadcasting_sub", x, self.op("reduce_mean", x, self.axis(), lanes=False))
        mean = self.op("reduce_mean", self.op("broadcasting_mul", x, x), self.axis(), lanes=False)
        root = self.op("rsqrt", self.op("broadcasting_add", mean, self.number(1e-6, x.dtype), lanes=False), lanes=False)
        return self.op("broadcasting_mul", x, root)

    def scaled(self) -> Value:
        largest = self.op("reduce_max", self.op("abs", self.x), self.axis(), lanes=False)
        return self.op("broadcasting_divide", self.x, largest)

    def function(self, made: Value) -> dict[str, Function]:
        return {"decoder": Function("main", (self.x,), {"y": made}, (), tuple(self.nodes))}


def judged(functions: dict[str, Function]):
    return precision(SimpleNamespace(taken=lambda: taken(functions)), "constants")


def whole(small: Small, decoder: Path) -> dict[str, Function]:
    return {tower: read_program(asset).main for tower, asset in (("decoder", decoder), ("vision", small.vision))}


@pytest.mark.parametrize("kind", ["decoder", "dynamic"])
def test_ours_are_float32_and_named(kind: str) -> None:
    small = small_bundle()
    functions = whole(small, getattr(small, kind))
    found, geometry = taken(functions), small.checkpoint.geometry
    norms = [one for one in found if one.kind == NORM]
    blocks = 2 * geometry.vision_layers + 1 + len(geometry.deepstack_taps)
    assert len(norms) == 4 * geometry.layers + 1 + blocks
    assert sum(one.kind == SOFTMAX for one in found) == geometry.layers + geometry.vision_layers
    assert not any(one.narrow for one in found)
    assert sum(one.composite == "layer_norm" for one in norms) == blocks
    seams = {one.seam for one in found}
    assert {"decoder.layers.01.input_norm", "decoder.layers.02.attn.q_norm", "decoder.norm", "vision.layers.00.norm1",
            "decoder.layers.00.attn.softmax", "vision.merger.norm"} <= seams
    verdicts = judged(functions)
    assert [one.outcome for one in verdicts] == [Outcome.PASS] * 2
    assert [one.seam for one in verdicts] == list(SEAMS) == list(CONSTANTS[-2:])
    assert "composite layer_norm, where a runtime may have a kernel of its own" in verdicts[0].reason


@pytest.mark.parametrize(("less_mean", "wide"), [(False, False), (True, False), (False, True), (True, True)])
def test_squares_in_half_lose_large_rows(less_mean: bool, wide: bool) -> None:
    program = Written()
    x = program.op("cast", program.x, dtype="f32") if wide else program.x
    verdict, _ = judged(program.function(program.norm(x, less_mean=less_mean)))
    if wide:
        assert verdict.outcome is Outcome.PASS
        assert verdict.reason == "1 norms take their mean of squares in f32"
    else:
        assert (verdict.outcome, verdict.value) == (Outcome.FAIL, 1)
        assert verdict.reason.startswith("decoder, operation 5 " if not less_mean else "decoder, operation 7 ")
        assert "mean of squares in f16: of a large row" in verdict.reason


def test_a_row_scaled_before_its_squares_is_no_fault() -> None:
    program = Written()
    verdict, _ = judged(program.function(program.norm(program.scaled())))
    assert verdict.outcome is Outcome.PASS
    assert verdict.reason.endswith("rows of up to 500 come out right in the 1 narrow ones")
    assert verdict.figures["narrow"] == ["decoder, operation 8"]


def test_squares_in_half_under_a_wide_mean() -> None:
    """The cast stands one operation too late."""
    program = Written()
    squares = program.op("cast", program.op("broadcasting_mul", program.x, program.x), dtype="f32")
    mean = program.op("reduce_mean", squares, program.axis(), lanes=False)
    root = program.op("rsqrt", program.op("broadcasting_add", mean, program.number(1e-6, "f32"), lanes=False), lanes=False)
    wide = program.op("cast", program.x, dtype="f32")
    verdict, _ = judged(program.function(program.op("broadcasting_mul", wide, root)))
    assert (verdict.outcome, verdict.value) == (Outcome.FAIL, 1)


def test_a_narrow_norm_that_cannot_be_run_alone_is_no_pass() -> None:
    program = Written(None)
    verdict, _ = judged(program.function(program.norm(program.x)))
    assert verdict.outcome is Outcome.ERROR
    assert "the length of its rows is left open" in verdict.reason


def test_a_program_without_norms_or_softmaxes_is_no_pass() -> None:
    program = Written()
    assert [one.outcome for one in judged(program.function(program.op("abs", program.x)))] == [Outcome.SKIP] * 2


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_a_softmax_in_half_is_said_and_not_blamed(dtype: str) -> None:
    _, verdict = precision(SimpleNamespace(taken=lambda: [Taken(SOFTMAX, "decoder.layers.00.attn.softmax", dtype)]), "")
    assert verdict.outcome is Outcome.PASS
    assert ("decoder.layers.00.attn.softmax is the first in f16" in verdict.reason) is (dtype == "f16")
    assert verdict.figures["narrow"] == (["decoder.layers.00.attn.softmax"] if dtype == "f16" else [])
