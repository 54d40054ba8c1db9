"""Tokens that a reference is likely to choose, read from a file: what a graph, an engine or a twin has chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint import read_json
from harness.errors import HarnessError, within


def read(path: Path) -> dict[str, list[int]]:
    """{case: [ids]}, or a report's run.json, of which the engine's tokens are taken, or python's where it has none.

    Raises HarnessError where the file is neither. That a token is wrong is no error: it only costs a pass.
    """
    with within(path):
        record = read_json(path)
        if isinstance(record, Mapping) and isinstance(record.get("tokens"), list):
            record = {row["case"]: _steps(row["steps"]) for row in record["tokens"]
                      if isinstance(row, Mapping) and {"case", "steps"} <= set(row)}
        if not isinstance(record, Mapping) or not all(map(_tokens, record.values())):
            raise HarnessError("holds no tokens by case", fix='write {"case": [1, 2, ...]}, or give a run.json')
        return {str(case): list(tokens) for case, tokens in record.items()}


def _steps(steps: Any) -> list[int]:
    """The tokens up to the first step that lacks one."""
    found = []
    for step in steps:
        token = step.get("engine") if step.get("engine") is not None else step.get("python")
        if token is None:
            break
        found.append(token)
    return found


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
