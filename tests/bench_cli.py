"""How long the command line takes to say what it can do: a process each time, as a user starts it.

    pytest tests/bench_cli.py --benchmark-columns=min,median

Not collected by default. The bar is 0.5 s; a busy machine must not fail a test, so none is asserted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", ["--help", "gate --help", "--version"])
def test_help(benchmark, words: str) -> None:
    benchmark(lambda: subprocess.run([sys.executable, "-m", "harness.cli", *words.split()], check=True, cwd=ROOT,
                                     stdout=subprocess.DEVNULL))
