"""`harness diff`: the same program is the same, and every kind of change is named where it stands."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from small_bundle import Small, small_bundle
from test_program import change

from harness.cli import main
from harness.engines.mlirb import read_resources
from harness.engines.replay.difference import Difference, differences
from harness.engines.replay.program import Function, Node, Program, read_program
from harness.engines.replay.taps import decoder_taps
from harness.errors import ExitCode

pytest.importorskip("coreai")


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bundle()


@pytest.fixture(scope="module")
def program(small: Small) -> Program:
    return read_program(small.decoder)


def edited(program: Program, edit) -> Program:
    """The program with nodes changed: edit(node) gives the nodes that take its place."""
    function = program.main
    nodes = tuple(made for node in function.nodes for made in edit(node))
    return replace(program, functions={function.name: replace(function, nodes=nodes)})


def compared(program: Program, edit) -> list[Difference]:
    return differences(program, edited(program, edit))


def maker(function: Function, seam: str) -> Node:
    value = decoder_taps(function).values[seam]
    return next(node for node in function.nodes if value in node.results)


def test_the_same_program(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    twin = shutil.copytree(small.decoder, tmp_path / "twin.aimodel")
    assert main(["diff", str(small.decoder), str(twin)]) == ExitCode.PASS
    assert capsys.readouterr().out.startswith("the programs are the same")


def test_bytes_changed_in_the_file(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One code of a weight, and the eps of every norm."""
    data = (small.decoder / "main.mlirb").read_bytes()
    table = max((value.constant for value in read_program(small.decoder).main.constants() if value.dtype == "si8"),
                key=lambda constant: constant.size)
    blob = read_resources(small.decoder / "main.mlirb")[table.resource]
    place = blob.offset + 7 * table.shape[1] + 5
    once = change(small.decoder, tmp_path / "once.aimodel", bytes([data[place] ^ 3]), place)
    eps = b"\x09" + struct.pack("<f", 1e-6)
    assert data.count(eps) == 1
    twice = change(once, tmp_path / "twice.aimodel", b"\x09" + struct.pack("<f", 1e-5), data.index(eps))
    assert main(["diff", str(small.decoder), str(twice)]) == ExitCode.FAIL
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("constant  decoder.layers.00.input_norm: eps 9.99999")
    assert lines[1].startswith("weight    outputs: codes si8[512, 64]: 1 of 32768 values differ in 1 of 512 rows")
    assert "the first at [7, 5]:" in lines[1]


def test_an_attribute_and_an_operation(program: Program) -> None:
    activation = next(node for node in program.main.nodes if node.op == "silu")
    found = compared(program, lambda node: [replace(node, op="sigmoid")] if node is activation else [node])
    assert [one.kind for one in found] == ["structure"]
    assert found[0].where == "decoder.layers.00.mlp.act"
    assert "- silu(f32" in found[0].what and "+ sigmoid(f32" in found[0].what


def test_an_operand_exchanged(program: Program) -> None:
    """The second layer's MLP reads the first one's stream: one line, and nothing of what follows."""
    function = program.main
    target = maker(function, "decoder.layers.01.mlp.gate")
    other = maker(function, "decoder.layers.00.mlp.gate").operands[0]
    found = compared(program, lambda node: [replace(node, operands=(other, *node.operands[1:]))]
                     if node is target else [node])
    assert [one.kind for one in found] == ["structure"]
    assert found[0].where == "decoder.layers.01.mlp.gate"
    assert "takes another operand 0" in found[0].what


def test_an_operation_more(program: Program) -> None:
    """Nothing but the operation itself shows, wherever it stands."""
    function = program.main
    target = maker(function, "decoder.layers.01.mlp.act")
    extra = replace(target, op="abs", operands=target.operands[:1], results=(replace(target.results[0], id=10**6),))
    found = compared(program, lambda node: [extra, node] if node is target else [node])
    assert [(one.kind, one.where) for one in found] == [("structure", "decoder.layers.01.mlp.act")]
    assert found[0].what.startswith("+ abs(")


def test_ports_and_outputs(small: Small, program: Program) -> None:
    function = program.main
    inputs = (replace(function.inputs[0], name="ids"), *function.inputs[1:])
    other = replace(program, functions={function.name: replace(function, inputs=inputs)})
    kinds = [(one.kind, one.what) for one in differences(program, other)]
    assert ("port", "input input_ids: si32[1, 1] -> none") in kinds
    assert ("port", "input ids: none -> si32[1, 1]") in kinds
    norm = decoder_taps(function).values["decoder.norm"]
    other = replace(program, functions={function.name: replace(function, outputs={"logits": norm})})
    assert "output logits is another operation's result" in [one.what for one in differences(program, other)]
    assert differences(program, replace(program, functions={}))[0].what == f"only in {small.decoder.name}"
