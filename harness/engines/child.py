"""A Python module run in a process of its own, which hands its results back as files.

Bad input can abort Apple's runtime and reader (SIGABRT, SIGSEGV, SIGILL), so no process of ours calls them that must
live on. The child's standard output is not read: the runtime prints there.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import HarnessError, Undecided
from harness.trace import Trace

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.02
_LIVE: set[Child] = set()


class Child:
    """`python -m module workdir`: reads `job.json` and `job.safetensors` there, writes results; see `Child.result`."""

    def __init__(self, module: str, folder: Path, job: Mapping[str, Any], arrays: Mapping[str, np.ndarray],
                 timeout_s: float) -> None:
        from safetensors.numpy import save_file

        self.folder, self.timeout_s = folder, timeout_s
        (folder / "tmp").mkdir()
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "job.safetensors")
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        except OSError as error:
            raise Undecided(f"the request cannot be written ({error.strerror})", where=folder,
                            fix="free some disk space or set TMPDIR") from error
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}
        with (folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen([sys.executable, "-m", module, str(folder)], env=environment, cwd=folder,
                                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                                            start_new_session=True)

    def result(self, name: str, doing: str) -> Trace:
        """Wait for `name.json` (facts) and its `name.safetensors` (arrays), read them and remove them from the disk.

        Raises HarnessError where the child says that the input is bad, and Undecided, with `doing` in the sentence,
        where it says that it failed, died, or took more than `timeout_s` seconds since the last result.
        """
        deadline = time.monotonic() + self.timeout_s
        done = self.folder / f"{name}.json"
        while not done.exists():
            ended = self.process.poll() is not None
            if (self.folder / "failure.json").exists():
                self._raise_failure(doing)
            if ended and not done.exists():
                raise Undecided(f"the child process died while {doing}: {self._cause()}")
            if time.monotonic() > deadline:
                raise Undecided(f"no answer within {self.timeout_s:g} s while {doing}", fix="allow more time")
            time.sleep(_POLL_S)
        return self._read(name)

    def close(self) -> None:
        """Kill the child and what it started, and remove its folder; both are gone when this returns."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # already gone; macOS says "not permitted" for a zombie
            pass
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> Trace:
        from safetensors.numpy import load_file

        arrays, facts = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        trace = Trace(load_file(arrays), json.loads(facts.read_text(encoding="utf-8")))
        arrays.unlink()
        facts.unlink()
        return trace

    def _raise_failure(self, doing: str) -> None:
        failure = json.loads((self.folder / "failure.json").read_text(encoding="utf-8"))
        if failure["bad_input"]:
            raise HarnessError(failure["what"], where=failure["where"], fix=failure["fix"])
        raise Undecided(f"{failure['what']} (while {doing})", where=failure["where"], fix=failure["fix"])

    def _cause(self) -> str:
        code = self.process.returncode
        how = f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = (self.folder / "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        telling = [line for line in said if "error" in line.lower() or "what():" in line] or said
        return f"{how}, {telling[-1][:300]}" if telling else how


@contextmanager
def running(module: str, job: Mapping[str, Any], arrays: Mapping[str, np.ndarray], timeout_s: float,
            tmp: Path | None = None) -> Iterator[Child]:
    """A started Child in a private folder under `tmp`; whatever happens, child and folder are gone afterwards."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="harness-", dir=tmp))
    except OSError as error:
        raise Undecided(f"no private folder can be made ({error.strerror})", where=tmp or tempfile.gettempdir(),
                        fix="free some disk space or set TMPDIR") from error
    try:
        child = Child(module, folder, job, arrays, timeout_s)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _LIVE.add(child)
    try:
        yield child
    finally:
        child.close()
        _LIVE.discard(child)


@atexit.register
def _close_all() -> None:
    """A daemon thread that waits for a child is not unwound when the interpreter ends, so its child is closed here."""
    for child in tuple(_LIVE):
        child.close()
