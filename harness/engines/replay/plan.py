"""Which node runs when: at load, once for all steps, stacked over steps as one operation, or step by step.

With `steps` (inputs that differ from step to step) a function of one token becomes a function of many, in layer-major
order: each node runs for all steps before the next. A node whose rule computes every row alone, on shapes that are known
now, runs once on all rows; what touches a state or depends on a length runs in a loop over the steps. Several loops
follow each other where a stacked node needs what a loop made, which is how a decoder falls into its layers.

Order of one step after the other is kept inside each loop. Between loops it is turned round, which changes nothing for
nodes that only compute; for states it is proven that no two loops touch the same part of one (`check_states`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from harness.engines.replay.folding import constant_sizes, fold
from harness.engines.replay.fusing import Norm, find_norms
from harness.engines.replay.ops import KNOWN, STATES, TABLE
from harness.engines.replay.picking import find_picks
from harness.engines.replay.program import Function, Node, Value
from harness.engines.replay.rules import unsigned
from harness.engines.replay.sizes import Size, names
from harness.engines.replay.states import VIEWS, Access, accesses, apart, users, writes_in_place
from harness.errors import HarnessError

PRODUCTS = frozenset({"batch_matmul", "broadcasting_batch_matmul"})
LENGTHS = {"position_ids": "T", "input_ids": "N"}


class Kind(Enum):
    """When a node runs, and what its value is."""

    FIXED = "computed once, when the program is loaded"
    SHARED = "one tensor for all steps"
    STACKED = "one tensor with a row for each step"
    LISTED = "a tensor for each step"


@dataclass(frozen=True)
class Table:
    """A matrix that products take, with the operations between it and them folded into its rows."""

    data: Value
    companions: tuple[Value, ...]
    casts: tuple[str, ...]


@dataclass
class Block:
    """Nodes that run one after the other, once, or all of them for each step where `loop`."""

    loop: bool
    nodes: list[Node] = field(default_factory=list)


@dataclass
class Plan:
    """kinds: by value id. sizes: host values by id. tables: transposed matrices by id. scalars: name -> (value, axis) of
    lengths read from tensors. in_place: see `states`. silent: `at` of nodes that become no line, being folded or part of
    a table. norms: by the `at` of their last operation; picks: lists of rows by the `at` of a gather. fixed: nodes that run
    at load; blocks: the others, in the order they run."""

    function: Function
    kinds: dict[int, Kind] = field(default_factory=dict)
    sizes: dict[int, np.ndarray] = field(default_factory=dict)
    tables: dict[int, Table] = field(default_factory=dict)
    norms: dict[int, Norm] = field(default_factory=dict)
    picks: dict[int, Value] = field(default_factory=dict)
    scalars: dict[str, tuple[Value, int]] = field(default_factory=dict)
    in_place: dict[int, Value] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    aliases: set[int] = field(default_factory=set)
    """Values that may share memory with a state."""
    fixed: list[Node] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def taken(self, node: Node) -> tuple[Value, ...]:
        """Operands; of a fused norm, what all of it takes; of a gather by a list, the list."""
        norm, rows = self.norms.get(node.at), self.picks.get(node.at)
        if rows is not None:
            return node.operands[0], rows, node.operands[2]
        return (norm.x, norm.weight) if norm else node.operands

    def needs(self, node: Node) -> list[Value]:
        """Tensors that a node takes, the lengths among its sizes included, constants and tables not."""
        given = node.operands[1:] if node.at in self.in_place else self.taken(node)  # it writes to the state itself
        found = [value for value in given if value.constant is None and value.id not in self.tables]
        tensors = [value for value in found if value.id not in self.sizes]
        lengths = {name for value in found if value.id in self.sizes for name in names(self.sizes[value.id])}
        return tensors + [self.scalars[name][0] for name in sorted(lengths)]

    def kind(self, node: Node) -> Kind:
        """Of what a node computes; a write has the kind of what it writes with."""
        if node.op == "write_handle":
            return self.kinds[node.operands[0].id]
        return self.kinds[node.results[0].id]


def plan(function: Function, steps: Mapping[str, Kind] | None = None, kept: Iterable[int] = (), *,
         fuse: bool = False) -> Plan:
    """fuse: see `fusing`. Raises HarnessError for an operation that is not known, naming it and its place, and, with `steps`, for a structure
    that does not allow layer-major order."""
    check_known(function)
    made, kept = Plan(function, in_place=writes_in_place(function, kept)), frozenset(kept)
    steps = steps or {}
    for value in (*function.inputs, *function.states):
        made.kinds[value.id] = steps.get(value.name, Kind.SHARED)
    for value in function.states:
        made.kinds[value.id] = Kind.LISTED if steps else Kind.SHARED
    _fold_sizes(made)
    _find_tables(made, kept)
    made.picks, idle = find_picks(made, kept)
    made.silent |= idle
    if fuse:
        made.norms = find_norms(function, kept)
        made.silent |= {at for norm in made.norms.values() for at in norm.nodes}
    for node in function.nodes:
        if node.at not in made.silent:
            _classify(made, node)
    _arrange(made)
    if steps:
        check_states(made)
    return made


def check_known(function: Function) -> None:
    """Raises HarnessError for the first operation that no rule covers, and says where it stands."""
    for node in function.nodes:
        if node.op not in KNOWN or node.regions:
            what = f"operation {node.op!r} is not known" if node.op not in KNOWN else f"operation {node.op!r} has regions"
            within = "".join(f" in {scope.composite or scope.callee}" for scope in node.scope)
            strange = sorted({other.op for other in function.nodes if other.op not in KNOWN})
            more = f"; unknown in all: {', '.join(strange)}" if len(strange) > 1 else ""
            raise HarnessError(f"{what}, it is number {node.at} of {len(function.nodes)}{within}{more}",
                               where=function.name, fix="add a rule for it to harness/engines/replay/ops")
        strange = node.op in TABLE and TABLE[node.op].checked and unsigned(node)
        if strange and not all(value.constant is not None or value.dtype == strange for value in node.operands):
            raise HarnessError(f"operation {node.op!r} (number {node.at}) computes in {strange}", where=function.name)


def _fold_sizes(made: Plan) -> None:
    inputs = {value.id: value for value in made.function.inputs}

    def host(value: Value) -> np.ndarray | None:
        if value.id not in made.sizes and (found := constant_sizes(value)) is not None:
            made.sizes[value.id] = found
        return made.sizes.get(value.id)

    def size(value: Value, axis: int) -> Size:
        if value.shape[axis] is not None:
            return Size(value.shape[axis])
        named = value.id in inputs and value.name in LENGTHS and value.shape.count(None) == 1
        name = LENGTHS[value.name] if named else f"n{value.id}_{axis}"
        made.scalars.setdefault(name, (value, axis))
        return Size(0, ((name, 1),))

    for node in made.function.nodes:
        for value in node.operands:
            host(value)
        found = fold(node, host, size)
        if found is not None:
            made.sizes[node.results[0].id] = found
            made.silent.add(node.at)


def _find_tables(made: Plan, kept: frozenset[int]) -> None:
    """product(x, transpose(cast(dequantize(constants)))) and its shorter forms read a table row by row."""
    makers = {value.id: node for node in made.function.nodes for value in node.results}
    uses = users(made.function.nodes)
    for node in made.function.nodes:
        if node.op not in PRODUCTS or node.operands[0].constant is not None:
            continue
        turned = makers.get(node.operands[1].id)
        if turned is None or turned.op != "transpose" or len(turned.operands[0].shape) != 2 or \
                [size.constant for size in made.sizes.get(turned.operands[1].id, ())] != [1, 0]:
            continue
        chain, source, casts = [turned], turned.operands[0], []
        while (maker := makers.get(source.id)) is not None and maker.op == "cast":
            chain.append(maker)
            casts.insert(0, maker.results[0].dtype)
            source = maker.operands[0]
        companions: tuple[Value, ...] = ()
        if maker is not None and maker.op == "blockwise_shift_scale":
            chain.append(maker)
            source, *rest = maker.operands
            companions = tuple(rest)
        if any(value.constant is None for value in (source, *companions)):
            continue
        made.tables[node.operands[1].id] = Table(source, companions, tuple(casts))
        made.kinds[node.operands[1].id] = Kind.FIXED
        _silence(made, chain, uses, kept)


def _silence(made: Plan, chain: list[Node], uses: Mapping[int, list[Node]], kept: frozenset[int]) -> None:
    """Nodes of a table's chain that nothing else needs become no line."""
    handed = kept | {value.id for value in made.function.outputs.values()}
    for place, node in enumerate(chain):
        result = node.results[0]
        takers = uses.get(result.id, [])
        plain = all(user.op in PRODUCTS and user.operands[0].id != result.id for user in takers) if place == 0 else \
            all(user.at in made.silent for user in takers)
        if not plain or result.id in handed:
            return
        made.silent.add(node.at)


def _classify(made: Plan, node: Node) -> None:
    if node.op == "read_handle" or node.op in VIEWS and node.operands[0].id in made.aliases:
        made.aliases |= {value.id for value in node.results}
    if node.op in STATES:
        for value in node.results:
            made.kinds[value.id] = made.kinds[node.operands[0].id]
        return
    given = [value for value in made.taken(node) if value.constant is None and value.id not in made.sizes]
    kinds = {made.kinds[value.id] for value in given}
    lengths = {name for value in made.taken(node) if value.id in made.sizes for name in names(made.sizes[value.id])}
    for value in node.results:
        made.kinds[value.id] = _kind(made, node, kinds, lengths)


def _kind(made: Plan, node: Node, kinds: set[Kind], lengths: set[str]) -> Kind:
    if not kinds & {Kind.STACKED, Kind.LISTED}:
        if any(made.kinds[made.scalars[name][0].id] in (Kind.STACKED, Kind.LISTED) for name in lengths):
            return Kind.LISTED
        return Kind.SHARED if Kind.SHARED in kinds or lengths else Kind.FIXED
    known = not lengths and all(None not in value.shape for value in (*made.taken(node), *node.results))
    varying = {number for number, value in enumerate(made.taken(node))
               if made.kinds.get(value.id) in (Kind.STACKED, Kind.LISTED)}
    # What loops made stays in loops until a row of a matrix product comes of it: only then is stacking worth a copy.
    worth = Kind.STACKED in kinds or _is_product(made, node)
    # What shares memory with a state is looked at in its own step, before the next one writes there.
    fresh = not any(value.id in made.aliases for value in node.operands)
    return Kind.STACKED if known and worth and fresh and varying <= set(TABLE[node.op].stack) else Kind.LISTED


def _is_product(made: Plan, node: Node) -> bool:
    return node.op in PRODUCTS and node.operands[1].id in made.tables


def _arrange(made: Plan) -> None:
    """A listed node joins the loop at the end; any other runs before that loop, or after it where it needs what it makes."""
    blocks, inside = [Block(loop=False)], set()
    for node in made.function.nodes:
        if node.at in made.silent:
            continue
        kind = made.kind(node)
        if kind is Kind.FIXED:
            made.fixed.append(node)
        elif kind is Kind.LISTED:
            if not blocks[-1].loop:
                blocks.append(Block(loop=True))
                inside = set()
            blocks[-1].nodes.append(node)
            inside |= {value.id for value in node.results}
        else:
            if blocks[-1].loop and any(value.id in inside for value in made.needs(node)):
                blocks.append(Block(loop=False))
            blocks[-2 if blocks[-1].loop else -1].nodes.append(node)
    made.blocks = blocks


def check_states(made: Plan) -> None:
    """Raises HarnessError where two loops may touch the same part of a state, at least one of them writing, or where a
    value that shares memory with a state is needed after its loop, when later steps have written there."""
    seen: dict[int, list[Access]] = {}
    block = {node.at: number for number, block in enumerate(made.blocks) for node in block.nodes}
    for access in accesses(made.function, made.sizes, made.in_place):
        for before in seen.setdefault(access.state.id, []):
            turned = block[before.node.at] != block[access.node.at]
            if turned and (before.writes or access.writes) and not apart(before, access):
                raise HarnessError(f"operations {before.node.at} and {access.node.at} may touch the same part of state "
                                   f"{access.state.name}, so its layers cannot run one after the other",
                                   where=made.function.name, fix="run it step by step")
        seen[access.state.id].append(access)
    home = {value.id: number for number, part in enumerate(made.blocks) for node in part.nodes for value in node.results}
    for number, part in enumerate(made.blocks):
        for node in part.nodes:
            if any(value.id in made.aliases and home[value.id] != number for value in made.needs(node)):
                raise HarnessError(f"operation {node.at} looks at a state as an earlier layer read it, so its layers cannot "
                                   "run one after the other", where=made.function.name, fix="run it step by step")
