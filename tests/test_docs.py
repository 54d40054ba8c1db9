"""The documents say what the code does: verbs, flags, targets, rungs, layers and exit codes are read from both."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_layers import ORDER

from harness.cli import VERBS, parser
from harness.errors import ExitCode
from harness.ladder import NAMES
from harness.pytest_plugin import OPTIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SPOKEN = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M))


def flags(verb: str) -> set[str]:
    """Every flag of one verb."""
    sub = next(action for action in parser()._actions if action.dest == "verb").choices[verb]
    return {flag for action in sub._actions for flag in action.option_strings}


ALL_FLAGS = {flag for verb in VERBS for flag in flags(verb)} | {f"--{name}" for name in OPTIONS}


def mentions() -> list[str]:
    """Every command in README that begins with `harness`, be it typed, spoken of, or in a remark beside another."""
    found = [line.strip() for line in COMMANDS if line.strip().startswith("harness ")]
    found += [text for text in SPOKEN if text.startswith("harness ")]
    found += [part for line in COMMANDS for part in re.findall(r"(?<![\w-])harness [a-z].*", line.partition("#")[2])]
    found += [part for line in COMMANDS for part in re.findall(r"reproduce: (harness .*)", line)]
    return found


def test_the_readme_holds_commands_at_all():
    assert len(mentions()) > 8


@pytest.mark.parametrize("command", mentions())
def test_a_command_in_the_readme_exists(command):
    words = shlex.split(command, comments=True)
    assert words[1] in VERBS
    assert {word for word in words if word.startswith("--")} <= flags(words[1])


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("harness ")])
def test_a_command_to_type_can_be_typed(command):
    parser().parse_args(shlex.split(command, comments=True)[1:])


def test_pictures_are_small_and_made_by_the_script():
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    script = (ROOT / "reports" / "screenshots" / "make.py").read_text(encoding="utf-8")
    assert len(named) >= 4 and all(path.startswith("reports/screenshots/") for path in named)
    assert all(f'"{Path(path).name}"' in script and (ROOT / path).stat().st_size <= 200_000 for path in named)
    assert {path.name for path in (ROOT / "reports" / "screenshots").glob("*.png")} == {Path(path).name for path in named}


def test_every_verb_is_in_the_readme():
    assert set(VERBS) <= {command.split()[1] for command in mentions()}


def test_pytest_flags_exist():
    lines = [line for line in COMMANDS if line.startswith("pytest ")]
    assert lines and all(set(re.findall(r"--[a-z-]+", line.partition("#")[0])) <= {f"--{name}" for name in OPTIONS}
                         for line in lines)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join([*COMMANDS, *SPOKEN])))
    assert {"demo", "test"} <= named <= set(re.findall(r"^([a-z]+):", makefile, re.M))


def test_the_rung_table_is_the_ladder():
    table = re.search(r"^\| rung .*?(?=\n\n)", README, re.S | re.M)[0]
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == list(NAMES)


@pytest.mark.parametrize("rung", NAMES)
def test_every_rung_is_a_pytest_file(rung):
    assert f'RUNG = "{rung}"' in (ROOT / "ladders" / f"test_{rung}.py").read_text(encoding="utf-8")


def test_the_layer_line_is_the_order():
    line = next(block for block in BLOCKS if block.startswith("errors"))
    assert [level.split() for level in line.replace("ladders/", "").split("<") if level.strip()] == \
        [level.split() for level in ORDER]


def test_exit_codes():
    words = {ExitCode.PASS: "pass", ExitCode.FAIL: "fail", ExitCode.BAD_INPUT: "usage or bad input",
             ExitCode.UNDECIDED: "could not decide", ExitCode.INTERRUPTED: "interrupted"}
    assert set(words) == set(ExitCode)
    sentence = ", ".join(f"{int(code)} {word}" for code, word in words.items())
    assert f"Exit codes: {sentence}." in README
    assert f"exit codes: {sentence}" in " ".join(parser().format_help().split())


def test_what_an_error_tells_you_to_give_exists():
    """Flags in the `fix` of an error are flags of a verb."""
    wrong = []
    for path in sorted((ROOT / "harness").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("fix", "where"):
                text = " ".join(part.value for part in ast.walk(node) if isinstance(part, ast.Constant)
                                and isinstance(part.value, str))
                wrong += [f"{path.name}: {flag}" for flag in re.findall(r"--[a-z][a-z-]*", text) if flag not in ALL_FLAGS]
    assert not wrong


def test_files_that_the_readme_names_exist():
    paths = [text for text in SPOKEN if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", text) and not text.startswith("reports/")]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.split("\0")
    foreign = re.compile(rb"(?<![\w.{}/-])/" + rb"(work|root|home|Users|tmp/bash_jobs)" + rb"[/.]")
    wrong = [name for name in filter(None, listed) if (ROOT / name).is_file() and foreign.search((ROOT / name).read_bytes())]
    assert not wrong
