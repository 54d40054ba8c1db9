"""A verb in a process of its own, for libraries that end the process: LLVM exits with 1 where a disk is full, a file that is
cut short under its mapping is a bus error, and a system without memory kills. None of that may pass for a verdict."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from harness.errors import ExitCode, Undecided

INSIDE = "HARNESS_APART"
"""Set in the environment of a process that somebody watches already."""


def watched() -> bool:
    """Whether somebody watches this process."""
    return bool(os.environ.get(INSIDE))


def run(arguments: Sequence[str]) -> int:
    """`harness ARGUMENTS` in a child; its exit code. Raises Undecided where the child ended otherwise than a verb does.

    An interrupt (Ctrl-C, or being terminated) is handed on once, and the child has the time that it needs to clean up.
    """
    child = subprocess.Popen([sys.executable, "-m", "harness.cli", *arguments], env=os.environ | {INSIDE: "1"},
                             process_group=0)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        code = child.wait()
    if code in set(ExitCode) - {ExitCode.FAIL}:
        return code
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    raise Undecided(f"a library ended the process {how}, as on a full disk, without memory, or when the checkpoint is cut "
                    "short meanwhile", fix="free space here and in --tmp; the next export removes what this one left")
