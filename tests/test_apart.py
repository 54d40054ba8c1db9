"""A verb in a process of its own: its exit code is handed on, and what ends a process from inside is no verdict."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from harness import apart
from harness.errors import Undecided

COMMAND = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]


def test_the_code_of_a_verb_is_handed_on(capfd):
    assert apart.run(["--version"]) == 0
    assert apart.run(["verify", "/nowhere", "/nowhere"]) == 2
    out, err = capfd.readouterr()
    assert out.startswith("harness ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("code, words", [("import os; os._exit(1)", "with code 1"),
                                         (f"import os; os.kill(os.getpid(), {int(signal.SIGBUS)})", "by signal SIGBUS")])
def test_what_a_library_ends_is_no_verdict(monkeypatch, tmp_path, code, words):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Undecided, match=f"a library ended the process {words}"):
        apart.run(["export"])


def test_an_interrupt_reaches_the_child(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntrap 'echo cleaned > " + str(tmp_path / "said") + "; exit 130' TERM\nsleep 30 & wait\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert apart.run(["export"]) == 130
    assert (tmp_path / "said").read_text() == "cleaned\n"


def test_a_disk_that_fills_up_under_the_converter_is_no_verdict(tmp_path):
    """LLVM ends the process with 1, which is the code of a FAIL."""
    pytest.importorskip("coreai_torch")

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    environment = {name: value for name, value in os.environ.items() if name != apart.INSIDE}
    done = subprocess.run([*COMMAND, "export", "--out", str(tmp_path / "out"), "--tmp", str(tmp_path)], env=environment,
                          capture_output=True, text=True, preexec_fn=small)
    assert done.returncode == 3, done.stderr
    assert "harness export: a library ended the process with code 1" in done.stderr
