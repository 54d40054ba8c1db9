"""Rows picked by a constant list, however the program spells it: heads that queries share, above all.

The dialect has no `index_select`: a program spreads the list over the shape of what it picks from and gathers element by
element, with an index of eight bytes for every two that move. Nothing is rounded, so any arithmetic takes the short way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.engines.replay.program import Node, Value
from harness.engines.replay.sizes import Size
from harness.engines.replay.states import users

if TYPE_CHECKING:
    from harness.engines.replay.plan import Plan


def find_picks(made: Plan, kept: frozenset[int]) -> tuple[dict[int, Value], set[int]]:
    """`at` of each `gather_along_axis` by a constant list -> the list; and `at` of what then need not run.

    made: its sizes must be known. kept: ids of values that are handed out.
    """
    makers = {value.id: node for node in made.function.nodes for value in node.results}
    lists = {node.at: spread for node in made.function.nodes if node.op == "gather_along_axis"
             and (spread := _list(made, node, makers)) is not None}
    uses, handed = users(made.function.nodes), kept | {value.id for value in made.function.outputs.values()}
    spreads = {node.operands[1].id: makers[node.operands[1].id] for node in made.function.nodes if node.at in lists}
    idle = {maker.at for number, maker in spreads.items()
            if number not in handed and all(user.at in lists for user in uses[number])}
    return lists, idle


def _list(made: Plan, node: Node, makers: Mapping[int, Node]) -> Value | None:
    x, spread, axes = node.operands
    maker, axis = makers.get(spread.id), made.sizes.get(axes.id)
    if maker is None or maker.op != "broadcast_in_dims" or axis is None or not all(size.fixed for size in axis.ravel()):
        return None
    place, rows = int(axis.ravel()[0]) % len(x.shape), maker.operands[0]
    count = x.shape[place]
    one_axis = all(size == 1 for number, size in enumerate(rows.shape) if number != place)
    if rows.constant is None or not one_axis or count is None or len(rows.shape) != len(x.shape) or \
            rows.shape[place] != spread.shape[place] or not _covers(made, maker, x, place):
        return None
    values = rows.constant.array
    return rows if values.size and values.min() >= 0 and values.max() < count else None


def _covers(made: Plan, maker: Node, x: Value, place: int) -> bool:
    """Whether the list is spread over all of x besides the axis it picks on."""
    if not all(value.id in made.sizes for value in maker.operands[1:3]):
        return False
    sizes, dims = (made.sizes[value.id].ravel() for value in maker.operands[1:3])
    spread = {int(dim) % len(x.shape): size for dim, size in zip(dims, sizes)}
    for number, size in enumerate(x.shape):
        asked = spread.get(number, Size(1))
        whole = asked == Size(size) if size is not None else any(
            asked == Size(0, ((name, 1),)) and of[0].id == x.id and of[1] == number for name, of in made.scalars.items())
        if number != place and not whole:
            return False
    return True
