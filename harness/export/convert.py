"""From an exported program to an `.aimodel` on disk, one weight at a time."""

from __future__ import annotations

import contextlib
import io
import mmap
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from coreai._compiler.ir import DenseElementsAttr, FloatAttr, IntegerAttr
from coreai_torch import TorchConverter
from coreai_torch.converter import coreai, get_tensor_type
from torch import Tensor

from harness.errors import HarnessError, Undecided
from harness.export.hollow import Pending
from harness.export.program import Program
from harness.streaming.room import give_back


MOST = {torch.int8: 255, torch.float16: 2048, torch.float32: 1 << 24}
"""Whole numbers from 2 on that a dtype holds exactly (int8: shifted)."""


LARGE = 1 << 22
"""Bytes of a weight whose making leaves enough freed memory behind to hand it back to the system."""


class _Filling(TorchConverter):
    """Makes the value of each hollow weight when its constant is made, and keeps none of them."""

    def __init__(self, pending: Pending, **settings: Any) -> None:
        super().__init__(**settings)
        self._pending = pending

    def _constant_from_tensor(self, tensor: Tensor) -> Any:
        made = super()._constant_from_tensor(self._pending.value(tensor))
        if tensor.nbytes >= LARGE:
            give_back()
        return made


class _Naming(TorchConverter):
    """Gives each hollow weight one number, repeated, and another one than every weight of its type: nothing is made.

    The runtime numbers the operations of such a program as those of the real one (tests/test_export_stream.py): it
    looks at types, and for equal constants.
    """

    def __init__(self, pending: Pending, **settings: Any) -> None:
        super().__init__(**settings)
        self._pending, self._used = pending, Counter[str]()

    def _constant_from_tensor(self, tensor: Tensor) -> Any:
        if not self._pending.is_weight(tensor):
            return super()._constant_from_tensor(self._pending.value(tensor))
        kind = get_tensor_type(tensor, self._location, dtype=tensor.dtype)
        self._used[str(kind)] += 1
        number = 1 + self._used[str(kind)]
        if number > MOST[tensor.dtype]:
            raise Undecided(f"more than {MOST[tensor.dtype] - 1} weights of one type {kind}", where="seam index")
        element = IntegerAttr.get(kind.element_type, number - 128) if not tensor.dtype.is_floating_point else \
            FloatAttr.get(kind.element_type, number, self._location)
        return coreai.ConstantOp(value=DenseElementsAttr.get_splat(kind, element)).result


def save_asset(program: Program, path: Path, *, debug: bool = False) -> None:
    """Convert and write an asset at `path` (`*.aimodel`).

    RELEASE mode is what ships; `debug` embeds the FX names (and this machine's source paths) to find seams by, and
    holds no weights.
    Raises HarnessError where an operation cannot be converted, a weight cannot be made or is lost, or the asset cannot
    be written.
    """
    converter = _Naming(program.pending, mode=TorchConverter.Mode.DEBUG) if debug else \
        _Filling(program.pending, mode=TorchConverter.Mode.RELEASE)
    converter.add_exported_program(program.exported, input_names=program.inputs, state_names=program.states,
                                   output_names=program.outputs)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bar would mix with ours
            converted = converter.to_coreai()
        if not debug:
            program.pending.check_all_made()
        with _mapped_reads():
            converted.save_asset(path)
    except RuntimeError as error:
        cause = error.__cause__ or error
        if isinstance(cause, HarnessError):
            raise cause from error
        raise HarnessError(f"the asset could not be converted or written ({type(cause).__name__}: {cause})",
                           where=path.name, fix="check the free disk space, here and in --tmp") from error


@contextlib.contextmanager
def _mapped_reads() -> Iterator[None]:
    """`save_asset` hashes its file by `Path.read_bytes`, a copy of the whole in memory; a mapped file hashes the same."""
    def mapped(path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    with mock.patch.object(Path, "read_bytes", mapped):
        yield
