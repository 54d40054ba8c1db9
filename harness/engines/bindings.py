"""What the two children that walk programs with Apple's bindings share: loading, names, and small constants.

See `harness.engines.program_worker` (constants and their uses) and `harness.engines.replay.reader` (every operation).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from harness.engines.program import DTYPES
from harness.errors import HarnessError, Undecided


def load(asset: Path) -> Any:
    """The MLIR module of an `.aimodel`. Raises Undecided where the bindings are missing."""
    try:
        from coreai.authoring.asset import AIModelAsset  # before the dialects, which import each other in a circle
    except ImportError as error:
        raise Undecided(f"Core AI's bindings cannot be imported ({error})", fix="pip install coreai-core") from error
    return AIModelAsset.load(asset).program._module._mlir_module


def graphs(module: Any) -> dict[str, Any]:
    """Graphs by their symbol."""
    operations = [operation.operation for operation in module.body.operations]
    return {symbol(graph): graph for graph in operations if "sym_name" in graph.attributes}


def called(operation: Any, among: dict[str, Any], stack: tuple[str, ...]) -> str:
    """Symbol of the graph that an `invoke` calls. Raises HarnessError for one that is under way or not there."""
    found = re.search(r'@("[^"]+"|[\w.$-]+)', text(operation, "callee"))
    callee = found[1].strip('"') if found else ""
    if callee in stack:
        raise HarnessError(f"graph {callee} calls itself", where=" > ".join(stack))
    if callee not in among:
        raise HarnessError(f"graph {callee} is called, but not there", where=" > ".join(stack))
    return callee


def composite(graph: Any) -> str | None:
    """Name of the composite operation that a graph declares to be."""
    found = re.search(r'composite_declaration<"([^"]+)"', text(graph, "composite_decl"))
    return found[1] if found else None


def resource(attribute: Any, what: str) -> str:
    """Name of the resource that a constant's bytes are; `what` says which constant, should it name none."""
    found = re.match(r'dense_resource<"?([^>"]+)"?>', str(attribute))
    if found is None:
        raise HarnessError(f"a constant of type {what} names no resource")
    return found[1]


def dense(ir: Any, attribute: Any, dtype: str, shape: list[int]) -> np.ndarray | None:
    """The values of a constant inside the code, or one element for a splat; None for a dtype that numpy lacks."""
    if dtype not in DTYPES:
        return None
    held = ir.DenseElementsAttr(attribute)
    if 0 in shape:
        return np.zeros(shape, DTYPES[dtype])
    if held.is_splat:
        return np.full([1] * len(shape), held.get_splat_value().value, DTYPES[dtype])
    if dtype == "i1":
        bits = ir.DenseIntElementsAttr(attribute)
        return np.array([bool(bits[place]) for place in range(len(bits))]).reshape(shape)
    return np.array(held).astype(DTYPES[dtype]).reshape(shape)


def symbol(graph: Any) -> str:
    """A graph's name."""
    return text(graph, "sym_name").strip('"')


def text(operation: Any, name: str) -> str:
    """An attribute as the bindings print it, "" where it is missing."""
    return str(operation.attributes[name]) if name in operation.attributes else ""
