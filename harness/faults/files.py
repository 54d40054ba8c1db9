"""A copy of an exported bundle pair whose bytes a fault may change, and seal again as a careless tool would."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from harness.bundle import PROGRAM, PROGRAM_HASH
from harness.engines.mlirb import read_resources
from harness.errors import HarnessError
from harness.subject import Subject


def index_path(bundle: Path) -> Path:
    """The seam index beside a decoder's bundle."""
    return bundle.with_name(f"{bundle.name}.seams.json")


class Files:
    """decoder and vision are bundle directories of ours to change; `healthy` are the programs read from them before."""

    def __init__(self, decoder: Path, vision: Path, folder: Path, healthy: tuple[Any, Any], subject: Subject) -> None:
        self.decoder, self.vision = (Path(shutil.copytree(path, folder / path.name)) for path in (decoder, vision))
        self.healthy, self.subject, self.folder = dict(zip((self.decoder, self.vision), healthy)), subject, folder
        if index_path(decoder).exists():
            shutil.copy(index_path(decoder), folder)

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
            old, new = self.asset(bundle) / PROGRAM_HASH, hashlib.sha256(data).digest()
            index, before = index_path(self.decoder), old.read_bytes()
            old.write_bytes(new)
            if index.exists():  # operations keep their numbers: only bytes of constants change
                index.write_text(index.read_text(encoding="utf-8").replace(before.hex(), new.hex()), encoding="utf-8")

    def rebuild(self, bend: Callable[[Any], None]) -> None:
        """Export both bundles again, as ours are, from towers that `bend` has changed; it is given vision, decoder,
        geometry, grid."""
        from harness.export.bundles import Exporter

        class Bent(Exporter):
            """Towers are made when their turn comes; `bend` sees both, and only the one in turn is exported."""

            def _hollow_vision(self) -> Any:
                made, other = super()._hollow_vision(), super()._hollow_decoder()
                bend(SimpleNamespace(vision=made[0], decoder=other[0], geometry=self.geometry, grid=self.grid))
                return made

            def _hollow_decoder(self) -> Any:
                made, other = super()._hollow_decoder(), super()._hollow_vision()
                bend(SimpleNamespace(vision=other[0], decoder=made[0], geometry=self.geometry, grid=self.grid))
                return made

        options, subject, scratch = self.subject.options, self.subject, self.folder / "scratch"
        scratch.mkdir()
        made = Bent(subject.checkpoint, self.folder / "rebuilt", subject.mode, options.grid, options.context, "fp16", None,
                    False, scratch, lambda step: None).run(dynamic=False, vision=True)
        self.decoder, self.vision = made.decoder, made.vision

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
        if constant.resource is None:  # small ones stand in the program itself
            held = np.array(constant.array)
            old = held.tobytes()
            change(held)
            self.swap(bundle, old, held.tobytes())
            return
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
