"""Element by element: arithmetic, comparisons, choices and casts.

Semantics: docstrings of `coreai.add` ... `coreai.xor`, `coreai.decomposable.broadcasting_*` (NumPy's broadcasting),
`coreai.cast` and `coreai.where` in the dialect. What only moves or compares is torch's own; what rounds is the
arithmetic's.
"""

from __future__ import annotations

from harness.engines.replay.rules import EVERY, Emit, Rule

_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "divide": "div", "floor_divide": "floor_div", "modulo": "mod",
           "pow": "pow", "maximum": "maximum", "minimum": "minimum"}
_COMPARE = {"greater": "torch.gt", "equal": "torch.eq", "not_equal": "torch.ne"}
_LOGIC = {"and": "torch.logical_and", "or": "torch.logical_or", "xor": "torch.logical_xor",
          "bitwise_and": "torch.bitwise_and", "bitwise_or": "torch.bitwise_or", "bitwise_xor": "torch.bitwise_xor"}
UNARY = ("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "exp", "log", "round", "rsqrt",
         "sin", "sinh", "sqrt", "tan", "tanh")


def _binary(method: str) -> Rule:
    return Rule(lambda emit: f"A.{method}({emit.number(0)}, {emit.number(1)})", EVERY, checked=True)


def _plain(function: str) -> Rule:
    return Rule(lambda emit: f"{function}({emit.spread(0)}, {emit.spread(1)})", EVERY)


def _compare(function: str) -> Rule:
    """A number stands second in torch, so one that stands first turns the comparison round."""
    turned = {"torch.gt": "torch.lt"}.get(function, function)

    def write(emit: Emit) -> str:
        first, second = emit.number(0), emit.number(1)
        if _is_number(first) and not _is_number(second):
            return f"{turned}({second}, {first})"
        return f"{function}({first}, {second})"

    return Rule(write, EVERY)


def _is_number(text: str) -> bool:
    return text.lstrip("-")[:1].isdigit() or text in ("inf", "-inf", "nan")


def _cast(emit: Emit) -> str:
    return f'A.cast({emit.text(0)}, "{emit.node.results[0].dtype}")'


def _where(emit: Emit) -> str:
    return f"torch.where({emit.spread(0)}, {emit.spread(1)}, {emit.spread(2)})"


RULES = {
    **{name: _binary(method) for name, method in _BINARY.items()},
    **{name: _compare(function) for name, function in _COMPARE.items()},
    **{name: _plain(function) for name, function in _LOGIC.items()},
    **{name: Rule(lambda emit, name=name: f'A.unary("{name}", {emit.text(0)})', (0,), checked=True) for name in UNARY},
    "not": Rule(lambda emit: f"torch.logical_not({emit.text(0)})", (0,)),
    "cast": Rule(_cast, (0,)),
    "where": Rule(_where, EVERY),
}
RULES |= {f"broadcasting_{name}": rule for name, rule in RULES.items()
          if name in (*_BINARY, *_COMPARE, *_LOGIC, "where")}
