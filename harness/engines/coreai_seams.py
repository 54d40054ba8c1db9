"""Where a shipped program holds the value of an FX node: odix operation ids, found in its DEBUG twin.

A RELEASE asset carries no names. A DEBUG asset converted from the same exported program does, and both number their
operations alike, so an id found in the twin reads the value inside the shipped one.

`python -m harness.engines.coreai_seams folder` is the child process that asks the runtime.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.bundle import check_asset
from harness.engines.child import running
from harness.engines.worker import Desk, serve
from harness.errors import Undecided, within


def find_seams(debug_asset: Path, names: Collection[str], timeout_s: float = 600.0) -> dict[str, dict[str, int]]:
    """FX node name -> {"id": odix operation whose output is that node's value}; names without one are left out.

    A node that only changes the shape (view, select) often has no operation of its own: ask for its input as well.
    Raises HarnessError for a missing or damaged asset, Undecided where the runtime is missing or dies.
    """
    debug_asset = Path(debug_asset).resolve()
    check_asset(debug_asset)
    with running("harness.engines.coreai_seams", {"asset": str(debug_asset)}, {}, timeout_s) as child:
        with within(debug_asset.name):
            found = child.result("operations", "the runtime listed its operations").facts
    return {name: {"id": found[name]} for name in sorted(names) if name in found}


def operations(records: list[Mapping[str, Any]]) -> dict[str, int]:
    """FX node name -> odix id, from the debug information that the runtime gives of a compiled DEBUG program.

    An odix operation lists all nodes that were fused into it, each as a run of entries that begins with `sources`; its
    output is the value of the one whose Core AI operation an output map leads to odix. Shape arithmetic of a node comes
    before its value, so the highest id counts.
    """
    found: dict[str, int] = {}
    for record in records:
        if not record["identifier"].startswith("odix"):
            continue
        for operation in record.get("operations", []):
            for name in _own_nodes(operation["metadatas"]):
                found[name] = max(operation["odixId"], found.get(name, -1))
    return found


def _own_nodes(metadatas: list[Mapping[str, Any]]) -> Iterator[str]:
    names: list[str] = []
    for entry in metadatas:
        value = _plain(entry["value"])
        if entry["key"] == "sources":
            names = [name for source in value for name in source["identifiers"]]
        if entry["key"] == "output_maps" and any(
                (row["source"]["level"], row["target"]["level"]) == ("coreai", "odix") and row["source"]["output"] == 0
                for row in value):
            yield from names


def _plain(value: Mapping[str, Any]) -> Any:
    """Unwrap the runtime's spelling of JSON: {"string": {"_0": "mm_4"}} -> "mm_4"."""
    (kind, held), = value.items()
    inner = next(iter(held.values()), None)
    if kind == "array":
        return [_plain(item) for item in inner]
    return {key: _plain(item) for key, item in inner.items()} if kind == "dictionary" else inner


def _work(desk: Desk) -> None:
    desk.put("operations", {}, operations(asyncio.run(_debug_records(Path(desk.job["asset"])))))


async def _debug_records(asset: Path) -> list[Mapping[str, Any]]:
    import tempfile

    try:
        from coreai.authoring.asset import AIModelAsset
        from coreai.runtime import AIModel
    except ImportError as error:
        raise Undecided(f"the Core AI runtime cannot be imported ({error})", fix="pip install coreai-core") from error
    compiled = Path(tempfile.mkdtemp(suffix=".aimodelx"))
    AIModelAsset.load(asset)._write_odix(compiled, enable_debug_info=True)
    model = await AIModel.load(compiled)
    return json.loads(model._debug_infos)


if __name__ == "__main__":
    serve(_work)
