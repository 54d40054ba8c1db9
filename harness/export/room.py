"""What an export needs of disk and memory, from the geometry alone: said before it starts, and checked."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.errors import HarnessError
from harness.export.folder import hold, remove_stale
from harness.geometry import Geometry
from harness.graph.decoder import Decoder
from harness.graph.quantize import Recipe
from harness.graph.reference import TEXT, checkpoint_name
from harness.graph.vision import Vision

ON_DISK = 1 << 25
"""Bytes from which on the converter keeps a constant in a file in TMPDIR instead of in memory (measured: exactly this)."""
BASE = 7 << 27
"""Bytes of Python, torch and the traced graphs of an export (0.9 GiB measured at 36 layers)."""
TWIN = 1 << 28
"""Bytes, generously, of the twin without weights that seams are found by, and of what the runtime compiles it to."""
PREFIX = "harness-export-"


@dataclass(frozen=True)
class Room:
    """Bytes. assets: of all bundles. temporary: on disk at once, besides. memory: anonymous, at most."""

    assets: int
    temporary: int
    memory: int

    @classmethod
    def of(cls, geometry: Geometry, recipe: Recipe, grid: tuple[int, int], dtype: torch.dtype, *, decoders: int,
           vision: bool) -> Room:
        """Of an export of so many decoder programs, and a vision tower or none."""
        programs = [_constants_of_decoder(geometry, recipe, dtype)] * decoders
        programs += [_constants_of_vision(geometry, grid, dtype)] if vision else []
        sizes = [sum(program) for program in programs]
        filed = [sum(size for size in program if size >= ON_DISK) for program in programs]
        held = [total - on_disk + max(program) for total, on_disk, program in zip(sizes, filed, programs)]
        return cls(sum(sizes), max(filed) + TWIN, BASE + max(held))

    def describe(self, out: Path, scratch: Path) -> str:
        """One sentence."""
        return (f"needs {self.assets / 2**30:.1f} GiB for the bundles in {out}, {self.temporary / 2**30:.1f} GiB for "
                f"temporary files in {scratch.parent}, and about {self.memory / 2**30:.1f} GiB of memory")


def _constants_of_decoder(geometry: Geometry, recipe: Recipe, dtype: torch.dtype) -> list[int]:
    with torch.device("meta"):
        tower = Decoder(recipe.geometry(geometry), (2, 2))
    found = []
    for name, parameter in tower.named_parameters():
        scheme, count = recipe.scheme(checkpoint_name(TEXT, name)), parameter.numel()
        found += [count, 2 * count // scheme.block] if scheme else [count * dtype.itemsize]
    return found


def _constants_of_vision(geometry: Geometry, grid: tuple[int, int], dtype: torch.dtype) -> list[int]:
    with torch.device("meta"):
        tower = Vision(geometry, grid)
    return [math.prod(parameter.shape) * dtype.itemsize for parameter in tower.parameters()]


def check_room(room: Room, out: Path, scratch: Path) -> None:
    """Raises HarnessError where the disk of the bundles or that of the temporary files has less than they need."""
    shared = os.stat(out).st_dev == os.stat(scratch).st_dev
    wanted = {out: room.assets + room.temporary} if shared else {out: room.assets, scratch.parent: room.temporary}
    for folder, needed in wanted.items():
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise HarnessError(f"the export needs about {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free",
                               where=folder, fix="free some space, or give another --out and --tmp")


@contextmanager
def scratch(tmp: Path | None) -> Iterator[Path]:
    """A folder in `tmp` for every temporary file of this process and its children, the converter's included.

    It is removed when the block ends, however it does, and by the next export where this process was killed.
    """
    root = Path(tmp or tempfile.gettempdir())
    try:
        for old in root.glob(f"{PREFIX}*"):
            remove_stale(old)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    except OSError as error:
        raise HarnessError(f"no temporary folder can be made ({error.strerror})", where=root,
                           fix="give another --tmp") from error
    held, before, default = hold(folder), os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = default
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
