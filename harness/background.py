"""Long work beside the main one: the export in a process of its own, the engine's runs in a thread that waits for it.

The export needs nothing of the oracle, and the engine has its own process: on two cores they run while the torch rungs do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.apart import INSIDE
from harness.engines import Engine, Request
from harness.engines.shelf import laid_down
from harness.errors import ExitCode, HarnessError, Undecided
from harness.trace import Trace


ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 20.0
"""Seconds that a terminated export has to remove its drafts, before it is killed."""


class ExportJob:
    """`harness export --json` in a child process; started at once, ended by the object's `stop`."""

    def __init__(self, arguments: Sequence[str], out: Path) -> None:
        command = [sys.executable, "-m", "harness.cli", "export", "--json", "--overwrite", "--out", str(out), *arguments]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                       text=True, errors="replace", env=os.environ | {"PYTHONPATH": path, INSIDE: "1"})
        self._lock, self._done = threading.Lock(), None

    def result(self) -> dict[str, Any]:
        """What it printed: paths and sizes. Raises HarnessError for its bad input, Undecided for anything else."""
        with self._lock:
            if self._done is None:
                self._done = (*self._child.communicate(), self._child.returncode)
        out, err, code = self._done
        if code == ExitCode.PASS:
            try:
                return json.loads(out.strip().rpartition("\n")[2])
            except ValueError as error:
                raise Undecided("the export ended well and did not say what it made") from error
        last = next((line for line in reversed(err.splitlines()) if line.strip()), "no message")
        kind = HarnessError if code == ExitCode.BAD_INPUT else Undecided
        raise kind(f"the export ended with code {code}: {last.removeprefix('harness export: ')}")

    def stop(self) -> None:
        """End the child if it still runs."""
        if self._child.poll() is not None:
            return
        self._child.terminate()
        try:
            self._child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class EngineJob:
    """Runs an engine over requests in a thread; each case's Trace is handed out as soon as it is there."""

    def __init__(self, make: Callable[[], Engine], requests: Mapping[str, Request]) -> None:
        self._make, self._requests = make, requests
        self.engine: Engine | None = None
        self._traces: dict[str, Trace] = {}
        self._refused: dict[str, HarnessError] = {}
        self._error: HarnessError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def cases(self) -> tuple[str, ...]:
        """Cases in the order they run."""
        return tuple(self._requests)

    def trace(self, case: str) -> Trace:
        """Wait for a case. Raises HarnessError where the engine did not get that far, with its reason."""
        with self._changed:
            self._changed.wait_for(lambda: case in self._traces or case in self._refused or self._error
                                   or not self._thread.is_alive())
            if case in self._traces:
                return self._traces[case]
        raise self._refused.get(case) or self._error or Undecided("the engine gave no trace", where=case)

    def _run(self) -> None:
        try:
            self.engine = self._make()
            fit = {case: request for case, request in self._requests.items() if self._fits(case, request)}
            for case, trace in zip(fit, self.engine.run(list(fit.values()))):
                kept = laid_down(trace)
                with self._changed:
                    self._traces[case] = kept
                    self._changed.notify_all()
            self._stop(Undecided("the engine ended before this case"))
        except HarnessError as error:
            self._stop(error)
        except BaseException as error:  # whatever broke (an exit too), the run goes on and says so: nobody waits forever
            self._stop(Undecided(f"the engine could not be driven ({type(error).__name__}: {error})"))

    def _fits(self, case: str, request: Request) -> bool:
        """Whether the bundle can run a request at all; one that it cannot must not take the others with it."""
        try:
            self.engine.check(request)
            return True
        except HarnessError as error:
            self._refused[case] = error
            return False

    def _stop(self, error: HarnessError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
