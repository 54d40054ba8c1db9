"""A few of the mutated files of `fuzz_reader.py`, and programs that are well-formed and mean trouble."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz_reader import ABORTED, BLIND, OPENED, SENTENCE, fuzz, prepare
from runtime_child import Refused, Runtime, tensor
from small_bundle import small_bundle

from harness.engines.replay.compile import Constants, compiled
from harness.engines.replay.coreai_cpu import CoreAICpu
from harness.errors import HarnessError

pytest.importorskip("coreai")
F = tensor("f32", (4,))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    child = Runtime()
    yield child
    child.close()


def test_mutated_files_never_escape() -> None:
    small = small_bundle()
    prepare()
    found = fuzz([small.decoder, small.dynamic, small.vision], 60, seed=1)
    assert {outcome.kind for *_, outcome in found} <= set(BLIND)
    assert {OPENED, SENTENCE, ABORTED} <= {outcome.kind for *_, outcome in found}, "all three are seen"
    assert all(outcome.said for *_, outcome in found if outcome.kind != OPENED)


def graph(name: str, body: str, *, private: bool = True) -> str:
    visibility = "private noinline " if private else ""
    return (f'coreai.graph {visibility}@{name}(%a: {F} {{coreai.name = "a"}}) -> ({F} {{coreai.name = "y"}}) {{\n{body}\n'
            f"coreai.output %y : {F}\n}}")


def call(name: str) -> str:
    return f"%y = coreai.invoke @{name}(%a) : ({F}) -> {F}"


def test_graphs_that_call_each_other(runtime: Runtime) -> None:
    text = "\n".join([graph("main", call("one"), private=False), graph("one", call("two")), graph("two", call("one"))])
    with pytest.raises(Refused, match="calls itself"):
        runtime.read(text)


def test_calls_that_unfold_without_end(runtime: Runtime) -> None:
    """Twenty graphs that each call the next one four times: 4^20 operations, refused after a million."""
    def four(name: str) -> str:
        calls = "\n".join(f"%v{place + 1} = coreai.invoke @{name}(%v{place}) : ({F}) -> {F}" for place in range(3))
        return f"%v0 = coreai.invoke @{name}(%a) : ({F}) -> {F}\n{calls}\n%y = coreai.abs %v3 : {F} -> {F}"

    graphs = [graph(f"g{depth}", four(f"g{depth + 1}")) for depth in range(20)]
    text = "\n".join([graph("main", call("g0"), private=False), *graphs, graph("g20", f"%y = coreai.abs %a : {F} -> {F}")])
    with pytest.raises(Refused, match="unfold to more than"):
        runtime.read(text)


def test_an_operation_that_no_rule_covers(runtime: Runtime) -> None:
    text = graph("main", f"%x = coreai.abs %a : {F} -> {F}\n%y = coreai.round %x : {F} -> {F}", private=False)
    function = runtime.read(text.replace("coreai.round", "coreai.tan"))
    node = function.nodes[-1]
    assert node.op == "tan"
    object.__setattr__(node, "op", "fold_in_half")
    with pytest.raises(HarnessError, match="'fold_in_half' is not known, it is number 2 of 2"):
        compiled(function, Constants(CoreAICpu()))
