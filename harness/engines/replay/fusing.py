"""RMS norms as one kernel each: for speed on a GPU, where a decoder is bound by the count of its kernels.

The program spells a norm out in eight operations: cast, square, mean, + eps, rsqrt, product, cast, times the weight. Fused,
it rounds once instead of twice, which moves fp16 results in their last bit; a run that must round as the program says
does not fuse. The pattern is looked for in the operations themselves; what a composite declares is not trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.engines.replay.program import Function, Node, Value
from harness.engines.replay.states import users


@dataclass(frozen=True)
class Norm:
    """x times rsqrt(mean(x^2) + eps) over the last axis, times weight; nodes: `at` of all its operations but the last."""

    x: Value
    weight: Value
    eps: float
    nodes: frozenset[int]


def find_norms(function: Function, kept: frozenset[int]) -> dict[int, Norm]:
    """`at` of the last operation of each norm -> the norm; kept: ids of values that are handed out."""
    makers = {value.id: node for node in function.nodes for value in node.results}
    uses = users(function.nodes)
    handed = kept | {value.id for value in function.outputs.values()}
    found = {}
    for node in function.nodes:
        if node.op == "broadcasting_mul" and node.operands[1].constant is not None:
            norm = _norm(node, makers)
            if norm and all(not _seen(makers_node, uses, norm, node, handed) for makers_node in function.nodes
                            if makers_node.at in norm.nodes):
                found[node.at] = norm
    return found


def _seen(inner: Node, uses: dict[int, list[Node]], norm: Norm, last: Node, handed: frozenset[int]) -> bool:
    """Whether anything outside the norm needs an inner value."""
    return any(value.id in handed or any(user.at not in norm.nodes and user.at != last.at for user in uses[value.id])
               for value in inner.results)


def _norm(last: Node, makers: dict[int, Node]) -> Norm | None:
    chain: list[Node] = []

    def made_by(value: Value, op: str) -> Node | None:
        node = makers.get(value.id)
        if node is None or node.op != op:
            return None
        chain.append(node)
        return node

    def through_cast(value: Value) -> Value:
        node = made_by(value, "cast")
        return node.operands[0] if node else value

    scaled = made_by(through_cast(last.operands[0]), "broadcasting_mul")
    root = scaled and made_by(scaled.operands[1], "rsqrt")
    added = root and made_by(root.operands[0], "broadcasting_add")
    mean = added and made_by(added.operands[0], "reduce_mean")
    square = mean and made_by(mean.operands[0], "broadcasting_pow")
    if not square or square.operands[0].id != scaled.operands[0].id:
        return None
    two, eps, axes = square.operands[1].constant, added.operands[1].constant, mean.operands[1].constant
    rank, weight = len(square.operands[0].shape), last.operands[1]
    over_last = axes is not None and axes.size == 1 and int(axes.array.ravel()[0]) % rank == rank - 1
    if two is None or two.fill != 2 or eps is None or eps.fill is None or not over_last or \
            weight.shape != square.operands[0].shape[-1:]:
        return None
    x = through_cast(square.operands[0])
    if x.dtype != last.results[0].dtype:
        return None
    return Norm(x, weight, float(eps.fill), frozenset(node.at for node in chain))
