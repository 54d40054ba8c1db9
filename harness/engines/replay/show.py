"""What a bundle's program is, for a reader: the compiled source, or a summary of what stands in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.bundle import LANGUAGE, VISION, Bundle
from harness.engines.replay.arithmetics import arithmetic as arithmetic_of
from harness.engines.replay.compile import Constants, compiled
from harness.engines.replay.contract import DECODER_INPUTS
from harness.engines.replay.decoder import STEPS
from harness.engines.replay.plan import check_known
from harness.engines.replay.program import Function, Node, Program, read_program
from harness.engines.replay.seams import taps_of
from harness.errors import HarnessError
from harness.trace import layer_of


def shown(arguments: Any) -> str:
    """What `harness replay` prints."""
    asset = find_asset(arguments.bundle)
    return source(asset, arguments.arithmetic, arguments.order, arguments.function) if arguments.print else summary(asset)


def find_asset(path: Path) -> Path:
    """The `.aimodel` of a bundle of either kind, or the asset itself. Raises HarnessError where there is none."""
    if path.suffix == ".aimodel":
        return path
    try:
        return Bundle.open(path, LANGUAGE).asset
    except HarnessError as error:
        if VISION not in str(error):
            raise
    return Bundle.open(path, VISION).asset


def source(asset: Path, arithmetic: str, order: str, name: str | None = None) -> str:
    """The torch source of a function. Raises HarnessError for a function that is not there and an unknown operation."""
    program = read_program(asset)
    function = pick(program, name)
    steps = STEPS if order == "layers" and DECODER_INPUTS[0] in {value.name for value in function.inputs} else None
    return compiled(function, Constants(arithmetic_of(arithmetic)), steps=steps, label=seam_label(asset, function)).source


def pick(program: Program, name: str | None) -> Function:
    """A function by name, by default the main one."""
    if name is None:
        return program.main
    if name not in program.functions:
        raise HarnessError(f"has no function {name!r}", where=program.asset.name,
                           fix=f"its functions are {', '.join(program.functions)}")
    return program.functions[name]


def summary(asset: Path) -> str:
    """A few lines a function: inputs, outputs, states, operations, constants; and whether replay knows all of it."""
    program, lines = read_program(asset), []
    for function in program.functions.values():
        lines.append(f"{function.name}({', '.join(map(_port, function.inputs))})")
        lines += [f"  -> {name} {_type(value)}" for name, value in function.outputs.items()]
        lines += [f"  state {_port(value)}" for value in function.states]
        counts = Counter(node.op for node in function.nodes)
        lines.append(f"  {len(function.nodes)} operations: " + ", ".join(f"{op} {n}" for op, n in counts.most_common()))
        sizes = Counter()
        for value in function.constants():
            sizes[value.dtype] += value.constant.size
        lines.append("  constants: " + ", ".join(f"{dtype} {n:,}" for dtype, n in sizes.most_common()))
        try:
            check_known(function)
            lines.append("  replay knows every operation")
        except HarnessError as error:
            lines.append(f"  {error}")
    return "\n".join(lines)


def seam_label(asset: Path, function: Function) -> Callable[[Node], str]:
    """Says of a node which layer it stands in, and which seam it computes, as far as the index beside the bundle tells."""
    index = asset.parent.with_name(f"{asset.parent.name}.seams.json")
    tower = "decoder" if function.states else "vision"
    found = taps_of(index if index.is_file() else None, {tower: (asset, function)})[tower]
    homes = {value.id: node.at for node in function.nodes for value in node.results}
    seams = {homes[value.id]: name for name, value in found.items()}
    ends = sorted((at, number) for at, name in seams.items()
                  if (number := layer_of(name)) is not None and name.count(".") <= 2 + name.endswith(".deepstack"))

    def label(node: Node) -> str:
        if node.at in seams:
            return f" = {seams[node.at]}"
        layer = next((number for at, number in ends if node.at <= at), None)
        return "" if layer is None else f" | layer {layer}"

    return label


def _port(value) -> str:
    return f"{value.name} {_type(value)}"


def _type(value) -> str:
    return f"{value.dtype}[{', '.join('?' if size is None else str(size) for size in value.shape)}]"
