"""Every command in the README is run: the cheap ones as they stand, on files made up for them; the others as far as parsing.

The others are EXPENSIVE, with what runs them in earnest instead.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import BUNDLE, bundle, here, made  # noqa: F401  fixtures
from fake_run import record_of, signed
from test_docs import COMMANDS, ROOT

from harness.bundle import Bundle
from harness.cli import main, parser
from harness.run import write_json

EXPENSIVE = {"gate": "tests/test_action.py and `make demo` run it whole", "calibrate": "tests/test_calibrate.py",
             "faults": "tests/test_faults.py runs `--fast` faults", "record": "tests/test_cli_files.py",
             "export": "tests/test_export.py", "ladder": "tests/test_cli.py", "diff": "tests/test_difference.py",
             "replay": "tests/test_replay.py", "sketch": "tests/test_sketch.py", "synth": "tests/test_synth.py"}
PLACES = {"REPORT": "report", "BUNDLE": BUNDLE, "DIR": "vision", "KEY": "key", "KEY.pub": "key.pub", "BEFORE": "report",
          "AFTER": "after"}
CODES = {"verify": {0, 1}, "publish-check": {1}, "report": {0}, "doctor": {0, 3}}
"""What may come of it here: the made-up run was judged by a lax policy, so it is not to be published."""


def typed() -> list[str]:
    """Command lines of the README without their remarks."""
    lines = [line.partition("#")[0].strip() for line in COMMANDS]
    return [line for line in lines if re.match(r"(harness|pytest|make|python|PYTHONPATH=\S+ harness) ", line)]


def verb(line: str) -> str:
    return shlex.split(line)[1]


@pytest.fixture
def files(here, bundle) -> Path:  # noqa: F811
    """What the placeholders of the README stand for."""
    record = record_of("healthy")
    record["subject"]["bundle"] = Bundle.open(bundle).record()
    shutil.copytree(bundle, here / "vision")
    for name, made_of in (("report", record), ("after", record_of("failing")), ("reports/one", record)):
        write_json(here / name / "run.json", made_of)
        write_json(here / name / "certificate.json", signed(made_of))
    shutil.copytree(here / "report", here / f"{BUNDLE}.report")
    tool = here / "bin" / "minisign"
    tool.parent.mkdir()
    tool.write_text(f"#!{sys.executable}\n")
    tool.chmod(0o755)
    (here / "key").write_text("secret")
    return here


def test_every_command_is_one_we_know_how_to_run():
    harness = [line for line in typed() if line.startswith("harness ")]
    assert len(harness) > 8 and {verb(line) for line in harness} <= set(CODES) | set(EXPENSIVE)


@pytest.mark.parametrize("line", [line for line in typed() if line.startswith("harness ") and verb(line) in CODES])
def test_a_cheap_command_is_run(line, files, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{files / 'bin'}:{subprocess.os.environ['PATH']}")
    words = [PLACES.get(word, word) for word in shlex.split(line)[1:]]
    assert main(words) in CODES[words[0]], capsys.readouterr()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("line", [line for line in typed() if line.startswith("harness ") and verb(line) in EXPENSIVE])
def test_an_expensive_command_is_parsed(line, capsys):
    parser().parse_args(shlex.split(line)[1:])
    with pytest.raises(SystemExit) as done:
        main([verb(line), "--help"])
    assert done.value.code == 0 and verb(line) in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in typed() if line.startswith("make ")])
def test_a_make_target_is_planned(line):
    done = subprocess.run(["make", "-n", shlex.split(line)[1]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "harness" in done.stdout + (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("line", [line for line in typed() if line.startswith("pytest ")])
def test_a_pytest_line_is_collected(line):
    words = [word for word in shlex.split(line)[1:]]
    named = [word for word in words if word.startswith("--")]
    shown = subprocess.run([sys.executable, "-m", "pytest", str(ROOT / "ladders"), "--help"], cwd=ROOT, capture_output=True,
                           text=True, timeout=120).stdout
    assert words[0] == "ladders/" and all(name in shown for name in named)
