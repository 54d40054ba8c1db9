"""A copy of an exported bundle pair whose bytes a fault may change, and seal again as a careless tool would."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.bundle import PROGRAM, PROGRAM_HASH
from harness.engines.mlirb import read_resources
from harness.errors import HarnessError


class Files:
    """decoder and vision are bundle directories of ours to change; `healthy` are the programs read from them before."""

    def __init__(self, decoder: Path, vision: Path, folder: Path, healthy: tuple[Any, Any]) -> None:
        self.decoder, self.vision = (Path(shutil.copytree(path, folder / path.name)) for path in (decoder, vision))
        self.healthy = dict(zip((self.decoder, self.vision), healthy))

    def asset(self, bundle: Path) -> Path:
        """The `.aimodel` directory."""
        return bundle / f"{bundle.name}.aimodel"

    def edit(self, bundle: Path, change: Callable[[bytearray], None], seal: bool = True) -> None:
        """Change the program's bytes, and bring its hash file up to date."""
        program = self.asset(bundle) / PROGRAM
        data = bytearray(program.read_bytes())
        change(data)
        program.write_bytes(data)
        if seal:
            (self.asset(bundle) / PROGRAM_HASH).write_bytes(hashlib.sha256(data).digest())

    def swap(self, bundle: Path, old: bytes, new: bytes) -> None:
        """Replace every occurrence of some bytes. Raises HarnessError where there is none."""
        def change(data: bytearray) -> None:
            if old not in data:
                raise HarnessError(f"the program holds no {old.hex()}", where=bundle.name)
            data[:] = data.replace(old, new)

        self.edit(bundle, change)

    def table(self, bundle: Path, shape: tuple[int, ...], number: int, change: Callable[[np.ndarray], None],
              part: str = "data") -> None:
        """Change the `number`-th table of a shape, in order of use: its codes, or its `scale`."""
        tables = [table for table in self.healthy[bundle].weights if table.shape == shape]
        constant = getattr(tables[number], part)
        blob = read_resources(self.asset(bundle) / PROGRAM)[constant.resource]

        def edit(data: bytearray) -> None:
            held = np.frombuffer(data, dtype=constant.array.dtype, count=constant.array.size, offset=blob.offset)
            change(held.reshape(constant.shape))

        self.edit(bundle, edit)

    def describe(self, bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Change metadata.json."""
        path = bundle / "metadata.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        change(record)
        path.write_text(json.dumps(record), encoding="utf-8")
