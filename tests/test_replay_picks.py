"""Rows picked by a constant list: the short way moves the same numbers, and is taken only where the list surely is one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_bundle import CONTEXT, small_bundle

from harness.engines.replay import plan as planning
from harness.engines.replay.arithmetic import Fp16
from harness.engines.replay.compile import Constants
from harness.engines.replay.decoder import Conversation, Decoder
from harness.engines.replay.program import Constant, Function, Node, Value, read_program

pytest.importorskip("coreai")


@pytest.fixture(scope="module")
def main() -> Function:
    return read_program(small_bundle().decoder).main


def told(main: Function) -> tuple[str, list[torch.Tensor]]:
    decoder = Decoder(main, Constants(Fp16(), dense=True), {})
    talk = Conversation(decoder, {}, CONTEXT)
    logits = [talk.feed(np.arange(5, 21))[0], talk.feed(np.array([3]))[0]]
    return decoder.step().source, [*logits, *talk.kv().values()]


def test_shared_heads_are_picked_row_by_row_with_the_same_bits(main: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    source, short = told(main)
    monkeypatch.setattr(planning, "find_picks", lambda *_: ({}, set()))
    plain, long = told(main)
    gathers = sum(node.op == "gather_along_axis" for node in main.nodes)
    assert gathers and plain.count("gather_along_axis(") == gathers and "gather_along_axis(" not in source
    assert source.count(".index_select(1, ") == gathers
    assert all(torch.equal(one, other) for one, other in zip(short, long, strict=True))


def gather(rows: list[int], heads: int = 2, sizes: tuple[int, ...] = (1, 4, 5, 3)) -> Function:
    """x [1, heads, 5, 3] gathered on axis 1 by a list spread over `sizes`."""
    def held(number: int, values: np.ndarray) -> Value:
        return Value(number, "si32", values.shape, None, Constant("si32", values.shape, None, None, values))

    x, spread, made = (Value(0, "f32", (1, heads, 5, 3), "x"), Value(5, "si32", sizes), Value(6, "f32", sizes))
    index = held(1, np.array(rows, dtype=np.int32).reshape(1, -1, 1, 1))
    shape, dims = held(2, np.array(sizes, dtype=np.int32)), held(3, np.arange(4, dtype=np.int32))
    axis = held(4, np.array(1, dtype=np.int32))
    return Function("main", (x,), {"out": made}, (), (Node("broadcast_in_dims", (index, shape, dims), (spread,), {}, 1),
                                                      Node("gather_along_axis", (x, spread, axis), (made,), {}, 2)))


@pytest.mark.parametrize(("function", "short"), [
    (gather([0, 0, 1, 1]), True),
    (gather([0, 0, 1, -1]), False),
    (gather([0, 0, 1, 2]), False),
    (gather([0, 0, 1, 1], sizes=(1, 4, 4, 3)), False),
], ids=["a list", "counts from the end", "out of range", "not all of x"])
def test_only_a_list_of_rows_that_are_there_is_taken(function: Function, short: bool) -> None:
    made = planning.plan(function)
    assert (set(made.picks) == {2}) is short and (1 in made.silent) is short


def test_a_spread_list_that_is_handed_out_is_still_made() -> None:
    function = gather([0, 1])
    spread = function.nodes[0].results[0]
    made = planning.plan(replace(function, outputs={**function.outputs, "list": spread}))
    assert 1 not in made.silent
