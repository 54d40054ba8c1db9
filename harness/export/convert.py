"""From an exported program to an `.aimodel` on disk."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from coreai_torch import TorchConverter

from harness.errors import HarnessError
from harness.export.program import Program


def save_asset(program: Program, path: Path, *, debug: bool = False) -> None:
    """Convert and write an asset at `path` (`*.aimodel`).

    RELEASE mode is what ships; `debug` embeds the FX names (and this machine's source paths) to find seams by.
    Raises HarnessError where an operation cannot be converted or the asset cannot be written.
    """
    mode = TorchConverter.Mode.DEBUG if debug else TorchConverter.Mode.RELEASE
    converter = TorchConverter(mode=mode)
    converter.add_exported_program(program.exported, input_names=program.inputs, state_names=program.states,
                                   output_names=program.outputs)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bar would mix with ours
            converted = converter.to_coreai()
        converted.save_asset(path)
    except RuntimeError as error:
        cause = error.__cause__ or error
        raise HarnessError(f"the asset could not be converted or written ({type(cause).__name__}: {cause})",
                           where=path.name, fix="check the free disk space, here and in TMPDIR") from error
