"""One program text for every length: the cache is read up to a fixed count of slots, and the newest is picked by index.

Lengths that grow from call to call keep a GPU from replaying a recorded call (a CUDA graph). In a program of one token a
call, T enters in two ways only: as a prefix (`[:T]`, `arange(0, T)`, shapes), and as the newest row (`[T - 1:T]`). With a
fixed prefix of P >= T slots, what lies behind T is hidden by the program's own mask, whose exponentials are exact zeros;
the newest row is picked by an index that lives on the device. Any other use of T is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.engines.replay.plan import LENGTHS, Plan
from harness.engines.replay.program import Node
from harness.engines.replay.sizes import FAR, Size
from harness.errors import HarnessError

NAME = LENGTHS["position_ids"]
LENGTH = Size(0, ((NAME, 1),))
NEWEST = Size(-1, ((NAME, 1),))


@dataclass(frozen=True)
class Newest:
    """A slice of one row at `axis`, the newest; window: the subscript of the other axes."""

    axis: int
    window: str


def newest(plan: Plan, node: Node) -> Newest | None:
    """Where a slice or an update takes the newest row; None where its bounds do not depend on it."""
    starts, ends, strides = (plan.sizes[value.id].ravel() for value in node.operands[1:4])
    axes = [axis for axis, start in enumerate(starts) if start == NEWEST]
    if not axes:
        return None
    axis, parts = axes[0], []
    open_end = ends[axis] in (LENGTH, Size(FAR))
    for place, (start, end) in enumerate(zip(starts, ends)):
        if place != axis and not (start.fixed and end.fixed):
            raise HarnessError("cuts along two lengths that grow", where=f"operation {node.at}")
        first, last = ("" if start == Size() else str(start)), ("" if end == Size(FAR) else str(end))
        parts.append(":" if place == axis else f"{first}:{last}")
    if len(axes) > 1 or not open_end or any(int(stride) != 1 for stride in strides):
        raise HarnessError("takes another part than the newest row", where=f"operation {node.at}")
    return Newest(axis, ", ".join(parts))


def check_padding(plan: Plan) -> None:
    """Raises HarnessError where T is used in another way than as a prefix or as the newest row."""
    for node in plan.function.nodes:
        if node.at in plan.silent:
            continue
        sizes = [size for value in node.operands if value.id in plan.sizes for size in plan.sizes[value.id].ravel()]
        used = {size for size in sizes if NAME in {name for name, _ in size.terms}}
        picks = node.op in ("slice", "slice_update") and newest(plan, node) is not None
        if used - {LENGTH} - ({NEWEST} if picks else set()):
            raise HarnessError(f"operation {node.at} ({node.op}) uses the length in another way than as a prefix",
                               where=plan.function.name, fix="run it without recording calls")
        starts = plan.sizes[node.operands[1].id].ravel() if node.op in ("slice", "slice_update") and \
            node.operands[1].id in plan.sizes else ()
        if any(NAME in names_of(start) and start != NEWEST for start in starts):
            raise HarnessError(f"operation {node.at} ({node.op}) begins at the length", where=plan.function.name)


def names_of(size: Size) -> set[str]:
    """Names that one size depends on."""
    return {name for name, _ in size.terms}
