"""Faults: what has really broken conversions of this family, each a small mutation of the thing under test.

A fault never touches the judge. Its module belongs to a class; its docstring says what goes wrong; its record says which rung and
seam a perfect harness names. `harness faults` switches them on one at a time and counts what is caught and what is named.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MODULES: Mapping[str, tuple[str, ...]] = {
    "weights": ("weights", "loading"), "positions": ("positions", "angles"), "attention": ("attention", "keys"),
    "norms": ("norms", "activations"), "vision": ("vision", "patches"), "deepstack": ("deepstack", "fusion"),
    "quantization": ("quantization", "codes"), "overflow": ("overflow", "widths"), "runtime": ("runtime", "requests"),
    "preprocess": ("preprocess", "hosts"), "lowering": ("lowering", "shipping", "rebuilt"),
    "evidence": ("evidence", "forgery")}
"""Modules of this package that hold the faults of each class."""
KINDS = tuple(MODULES)
"""Classes of faults."""
_KIND = {module: kind for kind, modules in MODULES.items() for module in modules}
TARGETS = ("graph", "host", "bundle", "engine", "asset", "model", "evidence")
"""What a fault can mutate; `harness.faults.suspect` says what each is and which rungs look at it."""


@dataclass(frozen=True)
class Fault:
    """One fault. `apply` takes the thing that `target` names and changes it in place.

    rung, seam: what a perfect harness names first (a pattern, or several parted by "|"); op: the operation inside the
    seam's block, where the fault has one. source: row of the collected list, or "derived". equivalent: the
    conversion stays right at the rungs named (all, for "none"), so that blaming it there is a false alarm.
    """

    kind: str
    id: str
    title: str
    target: str
    rung: str
    seam: str
    op: str | None
    source: str
    equivalent: bool
    apply: Callable[[Any], None]


_FAULTS: dict[str, Fault] = {}


def fault(target: str, rung: str, seam: str, op: str | None = None, *, source: str = "derived",
          equivalent: bool = False) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Enter a function as a fault: its name is the id, its docstring's first line the title; its module has the class."""
    def enter(apply: Callable[[Any], None]) -> Callable[[Any], None]:
        kind, name = _KIND[apply.__module__.rsplit(".", 1)[-1]], apply.__name__
        if target not in TARGETS or name in _FAULTS:
            raise ValueError(f"fault {name}: unknown target {target!r}, or a name used twice")
        title = (apply.__doc__ or "").strip().splitlines()[0]
        _FAULTS[name] = Fault(kind, name, title, target, rung, seam, op, source, equivalent, apply)
        return apply
    return enter


def faults(kind: str | None = None) -> Iterator[Fault]:
    """All faults, or those of one class, classes in order."""
    for name in KINDS if kind is None else (kind,):
        for module in MODULES[name]:
            importlib.import_module(f"harness.faults.{module}")
        yield from [one for one in _FAULTS.values() if one.kind == name]
