"""Products, reductions, activations.

Semantics: docstrings of `coreai.batch_matmul`, `coreai.decomposable.broadcasting_batch_matmul`, `reduce_*`, `softmax`,
`silu`, `gelu`, `sigmoid`, `relu`, `all`, `any`, `argmax`, `blockwise_shift_scale` in the dialect. Reduced axes stay.
"""

from __future__ import annotations

from harness.engines.replay.rules import EVERY, Emit, Rule

_REDUCTIONS = ("reduce_mean", "reduce_sum", "reduce_product", "reduce_max", "reduce_min")


def _matmul(emit: Emit) -> str:
    return f"A.matmul({emit.spread(0)}, {emit.spread(1)})"


def _reduction(name: str) -> Rule:
    return Rule(lambda emit: f"A.{name}({emit.text(0)}, {_axes(emit)})", (0,), checked=True)


def _axes(emit: Emit) -> str:
    return f"({', '.join(map(str, emit.axes(1)))},)"


def _logical(function: str) -> Rule:
    def write(emit: Emit) -> str:
        text = emit.text(0)
        for axis in emit.axes(1):
            text = f"{text}.{function}({axis}, True)"
        return text

    return Rule(write, (0,))


def _gelu(emit: Emit) -> str:
    stated = emit.node.attributes.get("approximate", "none")
    kind = next((kind for kind in ("tanh", "sigmoid") if kind in stated), "none")
    return f'A.gelu({emit.text(0)}, "{kind}")'


def _argmax(emit: Emit) -> str:
    """torch.argmax may return any of several largest; the dialect asks for the first, as `max` with indices gives it."""
    axis = emit.axis(1)
    return f"first_largest({emit.text(0)}, {axis})"


def _dequantize(emit: Emit) -> str:
    offsets = ["None" if _zeros(emit, number) else emit.text(number) for number in (2, 3)]
    return f"A.dequantize({emit.text(0)}, {emit.text(1)}, {', '.join(offsets)})"


def _zeros(emit: Emit, number: int) -> bool:
    constant = emit.node.operands[number].constant
    return constant is not None and constant.fill == 0


RULES = {
    "batch_matmul": Rule(_matmul, EVERY, checked=True),
    "broadcasting_batch_matmul": Rule(_matmul, EVERY, checked=True),
    **{name: _reduction(name) for name in _REDUCTIONS},
    "softmax": Rule(lambda emit: f"A.softmax({emit.text(0)}, {emit.axis(1)})", (0,)),
    "silu": Rule(lambda emit: f"A.silu({emit.text(0)})", (0,)),
    "sigmoid": Rule(lambda emit: f"A.sigmoid({emit.text(0)})", (0,)),
    "relu": Rule(lambda emit: f"A.relu({emit.text(0)})", (0,)),
    "gelu": Rule(_gelu, (0,)),
    "all": _logical("all"),
    "any": _logical("any"),
    "argmax": Rule(_argmax, (0,)),
    "blockwise_shift_scale": Rule(_dequantize),
}
