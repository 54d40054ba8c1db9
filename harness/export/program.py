"""Tracing a tower into an exported program whose nodes are known by seam."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import coreai_torch
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind

from harness.export.hollow import Pending
from harness.geometry import Geometry
from harness.graph.decoder import Decoder
from harness.graph.protocol import untapped
from harness.graph.vision import Vision

DECODER_INPUTS = ("input_ids", "position_ids", "image_embeds", "deepstack_embeds", "rope_shift_start",
                  "rope_shift_amount")
DECODER_STATES = ("keyCache", "valueCache")

RESHAPING = (torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dims,
             torch.ops.aten.clone.default)


@dataclass(frozen=True)
class Node:
    """Where a seam's value stands in a program, and the shape of one token's row of it.

    names: FX nodes that hold the same numbers in the same order, the seam's own first: a node that only changes the
    shape often has no operation in the compiled program.
    """

    names: tuple[str, ...]
    row: tuple[int, ...]


@dataclass
class Program:
    """An exported program after decompositions, the node of each seam in it, and how its hollow weights are made."""

    exported: ExportedProgram
    inputs: tuple[str, ...]
    states: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: dict[str, Node]
    pending: Pending = field(default_factory=Pending)

    @property
    def operations(self) -> int:
        """Number of FX operations."""
        return sum(node.op == "call_function" for node in self.exported.graph.nodes)


def trace_decoder(decoder: Decoder, geometry: Geometry, context: int, dtype: torch.dtype, *,
                  dynamic: bool = False) -> Program:
    """The decoder on S = 1 tokens, or with `dynamic` on any S, and on T = 1 .. context cached positions.

    T's bound is declared as context - 1: a slice of the whole cache has other strides, on which torch would specialise.
    The runtime does not enforce the bound, and T = context computes the same (tested).
    """
    tokens, total = (3, 8) if dynamic else (1, 8)
    cache = (geometry.layers, 1, geometry.kv_heads, context, geometry.head_dim)
    rows = decoder.slots, decoder.deepstack * decoder.slots
    shapes: list[Any] = [None] * 8
    shapes[1] = {1: Dim("T", min=2, max=context - 1)}
    if dynamic:
        shapes[0] = {1: Dim("S", min=1, max=context - 1)}
    example = (torch.zeros(1, tokens, dtype=torch.int32), torch.arange(total, dtype=torch.int32)[None],
               *(torch.zeros(count, geometry.hidden, dtype=dtype) for count in rows),
               torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32),
               torch.zeros(cache, dtype=dtype), torch.zeros(cache, dtype=dtype))
    return _trace(decoder, example, (tuple(shapes),), DECODER_INPUTS, DECODER_STATES, ("logits",))


def trace_vision(vision: Vision, geometry: Geometry, dtype: torch.dtype) -> Program:
    """The vision tower on its one grid."""
    patches = torch.zeros(vision.grid[0] * vision.grid[1], geometry.patch_features, dtype=dtype)
    return _trace(vision, (patches,), None, ("patches",), (), ("image_embeds", "deepstack_embeds"))


class _Collecting(nn.Module):
    """A tower that also returns the value at every seam, each as it came to the tap.

    Their names and the shapes of their rows go into `rows`.
    """

    def __init__(self, tower: Decoder | Vision, rows: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.tower, self.rows = tower, rows

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        seams: dict[str, Tensor] = {}
        self.tower.tap = lambda name, value: seams.setdefault(name, value)
        result = self.tower(*inputs)
        self.tower.tap = untapped
        self.rows.update((name, tuple(map(int, value.shape[1:]))) for name, value in seams.items())
        return *((result,) if isinstance(result, Tensor) else result), *seams.values()


def _trace(tower: Decoder | Vision, example: tuple[Tensor, ...], shapes: Any, inputs: tuple[str, ...],
           states: tuple[str, ...], outputs: tuple[str, ...]) -> Program:
    """One trace with all seams as outputs; then the extra outputs are cut off again, and only names are kept."""
    rows: dict[str, tuple[int, ...]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(_Collecting(tower.requires_grad_(False), rows), example, dynamic_shapes=shapes)
        exported = exported.run_decompositions(coreai_torch.get_decomp_table())
    return Program(exported, inputs, states, outputs, _cut(exported, len(outputs), rows))


def _same_numbers(node: fx.Node) -> Iterator[str]:
    """The node, and upwards those that it only reshapes."""
    yield node.name
    while _reshapes(node):
        node = node.args[0]
        yield node.name


def _reshapes(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.permute.default:
        shape = node.args[0].meta["val"].shape
        moved = [axis for axis in node.args[1] if shape[axis] != 1]
        return moved == sorted(moved)
    return node.target in RESHAPING or (node.target is operator.getitem and node.args[1] == 0)


def _cut(exported: ExportedProgram, kept: int, rows: dict[str, tuple[int, ...]]) -> dict[str, Node]:
    """Drop all user outputs but the first `kept` from the program, and return the node of each seam.

    A decoder's tap is offered a view of the value: a node that nothing but its output used, which goes with it.
    """
    signature, output = exported.graph_signature, exported.graph.output_node()
    first = sum(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs) + kept
    values = output.args[0][first:]
    output.args = (tuple(output.args[0][:first]),)
    del signature.output_specs[first:]
    nodes = {}
    for (seam, row), value in zip(rows.items(), values, strict=True):
        nodes[seam] = Node(tuple(_same_numbers(value if value.users else value.args[0])), row)
    exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return nodes
