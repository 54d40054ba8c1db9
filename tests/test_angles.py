"""The shipped program's position arithmetic, evaluated at every place: ours is right, every wrong integer is counted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small_bundle import GRID, Small, small_bundle

from harness.engines.replay.angles import Angles
from harness.engines.replay.program import Constant, Function, Program, read_program
from harness.errors import HarnessError
from harness.rungs.angles import angles
from harness.verdict import Outcome

pytest.importorskip("coreai")


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bundle()


@pytest.fixture(scope="module")
def program(small: Small) -> Program:
    return read_program(small.decoder)


def judged(small: Small, program: Program):
    """The verdict on a program."""
    subject = SimpleNamespace(geometry=small.checkpoint.geometry, options=SimpleNamespace(grid=GRID),
                              bundle=SimpleNamespace(max_context_length=None), rotations=lambda: Angles(program.main))
    return angles(subject, "constants")


def changed(program: Program, name: str, number: int, value: int | None = None, **settings) -> Program:
    """The program with the constant operand, or something else, of its `number`-th node of one operation changed."""
    function = program.main
    node = [node for node in function.nodes if node.op == name][number]
    if value is not None:
        operands = tuple(
            replace(one, id=10**6, constant=Constant(one.dtype, one.shape, _held=np.full(one.shape, value, np.int32)))
            if one.constant is not None else one for one in node.operands)
        settings = {"operands": operands}
    nodes = tuple(replace(one, **settings) if one is node else one for one in function.nodes)
    return replace(program, functions={function.name: replace(function, nodes=nodes)})


@pytest.mark.parametrize("kind", ["decoder", "dynamic"])
def test_ours_are_right_at_every_place(small: Small, kind: str) -> None:
    verdict = judged(small, read_program(getattr(small, kind)))
    assert (verdict.outcome, verdict.value) == (Outcome.PASS, 0)
    assert verdict.reason == f"{4 * 48 * 32} angles as the contract says"


@pytest.mark.parametrize(("op", "number", "value", "conversation"), [
    ("broadcasting_floor_divide", 0, 2, "an image first"), ("broadcasting_maximum", 0, 1, "an image first"),
    ("broadcasting_sub", 2, 511, "an image first")])
def test_a_wrong_integer_is_counted_and_placed(small: Small, program: Program, op: str,
                                               number: int, value: int, conversation: str) -> None:
    """Another width of the grid, another first slot, another vocabulary."""
    verdict = judged(small, changed(program, op, number, value))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.value > 0
    assert f"the first with {conversation} at place" in verdict.reason


def test_a_shift_that_begins_one_token_late(small: Small, program: Program) -> None:
    """start > place negated is place >= start; without the negation it is another comparison."""
    function = program.main
    compare = next(node for node in function.nodes if node.op == "broadcasting_greater")
    turned = changed(program, "broadcasting_greater", 0, operands=compare.operands[::-1])
    verdict = judged(small, turned)
    assert verdict.outcome is Outcome.FAIL
    assert "where" in verdict.reason


def test_what_shows_no_angles_is_said(small: Small, program: Program) -> None:
    verdict = judged(small, changed(program, "cos", 0, op="tan"))
    assert (verdict.outcome, verdict.reason) == (Outcome.SKIP, "the program shows no single cosine and sine")


def test_angles_that_rest_on_values(program: Program) -> None:
    function: Function = program.main
    embeds = next(value for value in function.inputs if value.name == "image_embeds")
    cosine = next(node for node in function.nodes if node.op == "cos")
    sine = next(node for node in function.nodes if node.op == "sin")
    nodes = tuple(replace(node, operands=(embeds,)) if node in (cosine, sine) else node for node in function.nodes)
    with pytest.raises(HarnessError, match="rest on no position"):
        Angles(replace(function, nodes=nodes))
