"""Values picked by computed indices.

Semantics: docstrings of `coreai.gather_nd` (index vectors on the last axis) and `coreai.gather_along_axis` in the dialect;
a negative index wraps once, one that is out of range is out of contract and refused.
"""

from __future__ import annotations

from harness.engines.replay.rules import Emit, Rule


def _gather_nd(emit: Emit) -> str:
    """Rows of a stored table are widened after they are picked, so that the table itself stays as it is stored."""
    table = emit.node.operands[0]
    if table.constant is None:
        return f"gather_nd({emit.text(0)}, {emit.text(1)})"
    return f"A.widen(gather_nd({emit.scene.stored(table)}, {emit.text(1)}))"


def _gather_along_axis(emit: Emit) -> str:
    return f"gather_along_axis({emit.text(0)}, {emit.text(1)}, {emit.axis(2)})"


RULES = {
    "gather_nd": Rule(_gather_nd, (1,)),
    "gather_along_axis": Rule(_gather_along_axis),
}
