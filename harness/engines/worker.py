"""The child's side of `harness.engines.child`: job in, results out, and every failure as a sentence in a file."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import HarnessError, Undecided


class Desk:
    """The folder through which a child talks with its parent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the job, by name."""
        from safetensors.numpy import load_file

        return load_file(self.folder / "job.safetensors")

    def put(self, name: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Hand a result over; the parent sees it whole or not at all."""
        from safetensors.numpy import save_file

        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        save_file(contiguous, self.folder / "part")
        os.replace(self.folder / "part", self.folder / f"{name}.safetensors")
        self._put_json(f"{name}.json", facts)

    def fail(self, error: Exception) -> None:
        """Say what went wrong."""
        bad_input = isinstance(error, HarnessError) and not isinstance(error, Undecided)
        known = isinstance(error, HarnessError)
        self._put_json("failure.json", {
            "bad_input": bad_input, "what": error.what if known else f"{type(error).__name__}: {_first_line(error)}",
            "where": ": ".join(error.path) if known and error.path else None, "fix": error.fix if known else None})

    def _put_json(self, name: str, value: Mapping[str, Any]) -> None:
        (self.folder / "part").write_text(json.dumps(value), encoding="utf-8")
        os.replace(self.folder / "part", self.folder / name)


def serve(work: Callable[[Desk], None]) -> None:
    """The main function of a child module: `python -m module folder`."""
    desk = Desk(Path(sys.argv[1]))
    _die_with_parent(desk.folder)
    try:
        work(desk)
    except Exception as error:  # whatever the runtime raises becomes a sentence for the parent, who decides
        desk.fail(error)
        raise SystemExit(1) from error


def _die_with_parent(folder: Path) -> None:
    """A parent that was killed cannot clean up: its child looks for it every second, and clears away for both."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
