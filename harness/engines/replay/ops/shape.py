"""Operations that move numbers and compute none: views, joins, parts, repetitions.

Semantics: docstrings of `coreai.reshape`, `slice`, `slice_update`, `transpose`, `concat`, `split`, `expand_dims`,
`shrink_dims`, `broadcast_to`, `broadcast_in_dims`, `tile`, `reverse`, `range`, `pad` in the dialect. Slices wrap once and
clamp as Python's do.
"""

from __future__ import annotations

from harness.engines.replay.rules import EVERY, Emit, Rule
from harness.engines.replay.sizes import Size
from harness.errors import HarnessError


def _reshape(emit: Emit) -> str:
    return f"{emit.text(0)}.reshape({emit.shape(emit.sizes(1))})"


def _transpose(emit: Emit) -> str:
    order = [*range(emit.lead), *emit.axes(1)]
    if sorted(order) != list(range(len(emit.node.operands[0].shape) + emit.lead)):
        raise HarnessError(f"{order} is no order of its axes")
    return f"{emit.text(0)}.permute({', '.join(map(str, order))})"


def _expand_dims(emit: Emit) -> str:
    rank = len(emit.node.operands[0].shape) + len(emit.sizes(1))
    parts, text = sorted(emit.axes(1, rank)), emit.text(0)
    if len(set(parts)) != len(parts):
        raise HarnessError("its axes repeat")
    return text + "".join(f".unsqueeze({axis})" for axis in parts)


def _shrink_dims(emit: Emit) -> str:
    value, axes = emit.node.operands[0], emit.axes(1)
    if any(value.shape[axis - emit.lead] not in (1, None) for axis in axes):
        raise HarnessError("drops a dimension that is not 1")
    return f"{emit.text(0)}.squeeze(({', '.join(map(str, axes))},))"


def _broadcast_to(emit: Emit) -> str:
    sizes, value = emit.sizes(1), emit.node.operands[0]
    missing = len(sizes) - len(value.shape)
    text = f"{emit.text(0)}[:{', None' * missing}]" if emit.lead and missing > 0 else emit.text(0)
    return f"{text}.expand{emit.shape(sizes)}"


def _broadcast_in_dims(emit: Emit) -> str:
    sizes = [Size(-1)] * len(emit.node.operands[0].shape)
    for axis, size in zip(emit.axes(2), emit.sizes(1), strict=True):
        sizes[axis - emit.lead] = size
    return f"{emit.text(0)}.expand{emit.shape(sizes)}"


def _slice(emit: Emit) -> str:
    return f"{emit.text(0)}[{emit.window(1, 2, 3)}]"


def _slice_update(emit: Emit) -> str:
    return f"updated({emit.text(0)}, {emit.text(4)}, np.s_[{emit.window(1, 2, 3)}])"


def _concat(emit: Emit) -> str:
    values = emit.node.operands[1:]
    rank = len(values[0].shape)
    axis = emit.axes(0, rank)[0]
    return f"torch.cat(({', '.join(emit.row(number + 1) for number in range(len(values)))},), {axis})"


def _split(emit: Emit) -> str:
    sizes, axis = emit.integers(1), emit.axis(2)
    parts = str(sizes[0]) if not emit.node.operands[1].shape else str(sizes)
    return f"{emit.text(0)}.split({parts}, {axis})"


def _range(emit: Emit) -> str:
    start, stop, step = (emit.sizes(number)[0] for number in range(3))
    dtype = emit.node.results[0].dtype
    return f'torch.arange({start}, {stop}, {step}, dtype=A.held("{dtype}"), device=device)'


def _tile(emit: Emit) -> str:
    times, rank = emit.sizes(1), len(emit.node.operands[0].shape)
    return f"{emit.text(0)}.repeat{emit.shape([Size(1)] * (rank - len(times)) + times)}"


def _reverse(emit: Emit) -> str:
    return f"{emit.text(0)}.flip(({', '.join(map(str, emit.axes(1)))},))"


RULES = {
    "reshape": Rule(_reshape, (0,)),
    "transpose": Rule(_transpose, (0,)),
    "expand_dims": Rule(_expand_dims, (0,)),
    "shrink_dims": Rule(_shrink_dims, (0,)),
    "broadcast_to": Rule(_broadcast_to, (0,)),
    "broadcast_in_dims": Rule(_broadcast_in_dims, (0,)),
    "slice": Rule(_slice, (0,)),
    "slice_update": Rule(_slice_update),
    "concat": Rule(_concat, (1, *EVERY[1:])),
    "split": Rule(_split, (0,)),
    "range": Rule(_range),
    "tile": Rule(_tile),
    "reverse": Rule(_reverse, (0,)),
}
