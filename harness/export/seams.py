"""The seam index: which operation of the shipped program holds the value of which seam."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from harness.engines.coreai import write_index
from harness.engines.coreai_seams import find_seams
from harness.engines.replay.program import read_program
from harness.engines.replay.seams import find_places
from harness.errors import HarnessError
from harness.export.convert import save_asset
from harness.export.program import Program


def find_entries(program: Program, near: Path) -> dict[str, dict[str, Any]]:
    """Entry (operation id, node and result in program order, shape of a token's row) of every seam that the runtime's own
    numbering resolves.

    The shipped asset carries no names; a DEBUG twin of the same exported program does, and its operation ids are equal.
    The twin lives in a temporary folder inside `near`. Raises Undecided where the runtime cannot be asked.
    """
    with tempfile.TemporaryDirectory(prefix=".debug-", dir=near) as folder:
        twin = Path(folder) / "debug.aimodel"
        save_asset(program, twin, debug=True)
        found = find_seams(twin, {name for node in program.nodes.values() for name in node.names})
        places = find_places(read_program(twin).main)
    entries = {}
    for seam, node in program.nodes.items():
        name = next((name for name in node.names if name in found), None)
        if name and seam not in program.outputs:
            entries[seam] = {**found[name], "row": list(node.row)}
            place = next((place for place in node.names if place in places), None)
            entries[seam] |= places[place] if place else {}
    return entries


def index_path(bundle: Path) -> Path:
    """`<bundle>.seams.json`, beside the bundle."""
    return bundle.with_name(f"{bundle.name}.seams.json")


def write_seams(bundle: Path, parts: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """Write the index of a decoder bundle: its own asset and the vision asset exported with it; whole or not at all.

    parts: {"decoder": (asset, entries), "vision": (asset, entries)}.
    """
    target = index_path(bundle)
    draft = bundle.with_name(f".{bundle.name}-{os.getpid()}.seams.json")  # a name that `clear_away` looks for
    try:
        write_index(draft, parts)
        os.replace(draft, target)
    except OSError as error:
        raise HarnessError(f"cannot be written ({error.strerror or error}); the bundles beside it are whole", where=target,
                           fix="free some disk space and export again with --overwrite") from error
    finally:
        draft.unlink(missing_ok=True)
