"""The gate on pull requests, run as a script: the action's own steps on a healthy and on a broken conversion."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from fake_run import HOSTILE, record_of, signed
from jsonschema import Draft202012Validator
from test_schema import FOLDER
from workflow_steps import ACTION, GITHUB, Runner, load

from harness.attest import Asked, publish_check
from harness.cli import main
from harness.run import write_json

CASES = """
[[case]]
name = "picture"
why = "an image, on the torch rungs only"
decode = 4
engine = false
turns = [{ role = "user", text = "Describe this image.", image = "noise:64x96:5" }]
[[case]]
name = "words"
why = "text, on the engine too"
decode = 4
turns = [{ role = "user", text = "Tell a story." }]
"""
POLICY = 'name = "action"\nallow_skip = []\nallow_unanswered = ["engine:*"]\nmin_cases = 2\nmodes = ["int8hu"]\n'
BROKEN = '''"""A conversion in which one row of layer 1's "mlp.out" is left over from layer 0."""

from harness.graph.reference import factory as healthy


def factory(checkpoint, grid):
    port = healthy(checkpoint, grid)
    first, second = (port.decoder.layers[layer].mlp.down_proj.weight.data for layer in (0, 1))
    second[7] = first[7]
    return port
'''
YAMLS = ("actions/gate/action.yml", "workflows/example-conversion-gate.yml", "workflows/example-conversion-comment.yml")


def steps_of(name: str) -> list[dict]:
    """All steps of a file."""
    table = load(name)
    jobs = table["jobs"].values() if "jobs" in table else [table["runs"]]
    return [step for job in jobs for step in job["steps"]]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository of conversions, one healthy and one broken."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "conversions").mkdir()
    (folder / "conversions" / "healthy.py").write_text("from harness.graph.reference import factory\n")
    (folder / "conversions" / "broken.py").write_text(BROKEN)
    (folder / "cases.toml").write_text(CASES)
    (folder / "policy.toml").write_text(POLICY)
    return folder


@pytest.fixture
def given(checkout) -> dict[str, str]:
    """An oracle of its cases and an exported bundle, once for both conversions; nothing is recorded into this repository."""
    assert main(["record", "--cases", str(checkout / "cases.toml"), "--out", str(checkout / "oracle")]) == 0
    assert main(["export", "--out", str(checkout / "bundles")]) == 0
    found = {name: next((checkout / "bundles").glob(pattern)).relative_to(checkout)
             for name, pattern in (("bundle", "*_int8hu_s1"), ("vision-bundle", "*_vision"))}
    return {"oracle": "oracle", **{name: str(path) for name, path in found.items()}}


def gated(checkout: Path, name: str, **given: str) -> tuple[Runner, int]:
    """The action's steps on one conversion, all but the installation."""
    action = load("actions/gate/action.yml")
    inputs = {name: row["default"] for name, row in action["inputs"].items()}
    inputs |= {"graph": f"conversions.{name}:factory", "cases": "cases.toml", "policy": "policy.toml", "report": name}
    inputs |= given
    values = {f"inputs.{key}": value for key, value in inputs.items()} | {"github.action_path": str(ACTION)}
    runner = Runner(checkout, values, {"GITHUB_RUN_ID": name})
    return runner, runner.run(action["runs"]["steps"], leave_out=("install",))


def test_a_healthy_conversion_passes_and_a_broken_one_is_annotated(checkout, given):
    _passed(*gated(checkout, "healthy", **given), checkout / "healthy")
    for path in (*checkout.glob("output-*"), checkout / "summary"):
        path.unlink()
    _annotated(*gated(checkout, "broken", **given), checkout / "broken")


def _passed(runner: Runner, code: int, report: Path) -> None:
    assert code == 0, "\n".join(runner.said)[-3000:]
    told, certificate = runner.outputs("tell"), json.loads((report / "certificate.json").read_text())
    assert (told["outcome"], told["certificate"], told["seam"]) == ("PASS", certificate["digest"], "")
    assert "::notice title=numerics parity%3A PASS::" in runner.said[1] and "::error" not in runner.said[1]
    assert runner.summary.startswith("## ✓ PASS") and "actions/runs/healthy" in runner.summary
    assert {"report.html", "report.md", "junit.xml", "run.json", "certificate.json"} <= \
        {path.name for path in report.iterdir()}
    assert publish_check(_bundle(report), report, Asked(report.parent / "policy.toml", cases=report.parent / "cases.toml"))[1] == 0


def _annotated(runner: Runner, code: int, report: Path) -> None:
    assert code == 1
    told = runner.outputs("tell")
    assert (told["outcome"], told["seam"]) == ("FAIL", "model.language_model.layers.1.mlp.down_proj.weight")
    errors = [line for line in runner.said[1].splitlines() if line.startswith("::error ")]
    assert any("file=conversions/broken.py,line=1::" in line and "decoder FAIL%3A decoder.layers.01.mlp.out" in line
               for line in errors)
    assert runner.summary.startswith("## ✕ FAIL") and "First broken seam" in runner.summary
    suite = ElementTree.parse(report / "junit.xml").getroot()
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert any("decoder.layers.01" in name for name in failed)
    record = json.loads((report / "run.json").read_text())
    schema = json.loads((FOLDER / "run.schema.json").read_text())
    assert [error.message for error in Draft202012Validator(schema).iter_errors(record)] == []
    assert publish_check(_bundle(report), report, Asked(report.parent / "policy.toml", cases=report.parent / "cases.toml"))[1] == 1


def _bundle(report: Path) -> Path:
    return next((report.parent / "bundles").glob("*_int8hu_s1"))


def test_a_gate_that_could_not_run_is_no_pass(checkout):
    runner, code = gated(checkout, "missing")
    assert code == 1 and runner.outputs("tell") == {"outcome": "ERROR"}
    assert "::error title=numerics parity::the ladder wrote no report (pytest exit code 4)" in runner.said[1]
    assert "wrote no report" in runner.summary


@pytest.mark.parametrize("outcome, code", [("PASS", "1"), ("ERROR", "0"), ("", ""), ("PASS", ""), ("FAIL", "1")])
def test_only_a_pass_that_both_agree_on_passes(tmp_path, outcome, code):
    decide = next(step for step in steps_of("actions/gate/action.yml") if step.get("id") == "decide")
    (tmp_path / "output-tell").write_text(f"outcome={outcome}\n")
    (tmp_path / "output-gate").write_text(f"exit-code={code}\n")
    assert Runner(tmp_path, {}).run([decide]) == 1
    (tmp_path / "output-tell").write_text("outcome=PASS\n")
    (tmp_path / "output-gate").write_text("exit-code=0\n")
    assert Runner(tmp_path, {}).run([decide]) == 0


@pytest.mark.parametrize("name", YAMLS)
def test_actions_are_pinned_and_no_value_is_read_as_shell(name):
    for step in steps_of(name):
        uses = step.get("uses", "./")
        assert uses.startswith("./") or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", uses), uses
        assert "${{" not in step.get("run", ""), "an expression in a script is an injection"
    text = (GITHUB / name).read_text(encoding="utf-8")
    assert not re.search(r"\bsecrets\.\w", text) and "pull_request_target:" not in text


def test_the_example_workflows_ask_for_the_least():
    gate, comment = (load(name) for name in YAMLS[1:])
    assert gate["permissions"] == {"contents": "read"} and set(gate[True]) == {"pull_request"}
    assert not any("permissions" in job for job in gate["jobs"].values())
    assert comment["permissions"] == {} and comment[True]["workflow_run"]["workflows"] == [gate["name"]]
    assert comment["jobs"]["comment"]["permissions"] == {"actions": "read", "contents": "read", "pull-requests": "write"}
    for job in (*gate["jobs"].values(), *comment["jobs"].values()):
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False and "ref" not in step["with"]


@pytest.mark.parametrize("names, code, listed", [(["port_a", "port_b"], 0, '["port_a", "port_b"]'), ([], 0, "[]"),
                                                 (["a b"], 1, None), (["$(touch owned)"], 1, None)])
def test_changed_conversions_are_listed_and_strange_names_refused(tmp_path, names, code, listed):
    import subprocess

    def git(*words: str) -> str:
        return subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "base")
    base = git("rev-parse", "HEAD")
    for name in names:
        (tmp_path / "conversions" / name).mkdir(parents=True)
        (tmp_path / "conversions" / name / "__init__.py").write_text("")
    git("add", "-A")
    git("commit", "-q", "--allow-empty", "-m", "change")
    runner = Runner(tmp_path, {"github.event.pull_request.base.sha": base})
    job = load(YAMLS[1])["jobs"]["changed"]
    assert runner.run(job["steps"]) == code
    assert runner.outputs("list").get("names") == listed and not (tmp_path / "owned").exists()


# The comment: `gh` as this test knows it, which writes down what it was asked.

GH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> asked.txt
case "$*" in
  "run download"*) cp -r artifacts downloaded ;;
  *"--jq .head.sha") echo "$PULL_HEAD" ;;
  *"/comments --paginate"*) echo "$MINE" ;;
  *"--input comment.json") cp comment.json sent.json ;;
  *) exit 1 ;;
esac
"""


def commented(folder: Path, number: str = "12", head: str = "abc", mine: str = "", kind: str = "failing") -> tuple[int, str]:
    """Run the comment's script on an artifact; its exit code and what gh was asked."""
    (folder / "bin").mkdir()
    tool = folder / "bin" / "gh"
    tool.write_text(GH)
    tool.chmod(0o755)
    report = folder / "artifacts" / "numerics-port"
    record = record_of(kind)
    write_json(report / "run.json", record)
    write_json(report / "certificate.json", signed(record))
    (report / "report.md").write_text("## ✓ PASS: forged by the fork")
    (folder / "artifacts" / "pull-request").mkdir()
    (folder / "artifacts" / "pull-request" / "number.txt").write_text(number)
    values = {"github.token": "t", "github.repository": "o/r", "github.event.workflow_run.id": "9",
              "github.event.workflow_run.html_url": "https://github.com/o/r/actions/runs/9",
              "github.event.workflow_run.head_sha": "abc"}
    runner = Runner(folder, values, {"PULL_HEAD": head, "MINE": mine})
    runner.environment["PATH"] = f"{folder / 'bin'}:{runner._env({})['PATH']}"
    code = runner.run(load(YAMLS[2])["jobs"]["comment"]["steps"], leave_out=("install",))
    return code, (folder / "asked.txt").read_text()


@pytest.mark.parametrize("mine, call", [("", "--method POST repos/o/r/issues/12/comments"),
                                        ("345", "--method PATCH repos/o/r/issues/comments/345")])
def test_the_comment_is_made_once_and_then_updated(tmp_path, mine, call):
    code, asked = commented(tmp_path, mine=mine)
    assert code == 0 and call in asked
    body = json.loads((tmp_path / "sent.json").read_text())["body"]
    assert body.startswith("<!-- numerics-parity -->") and "✕ FAIL" in body and "actions/runs/9" in body
    assert "forged by the fork" not in body, "the report is rendered again from its record"


@pytest.mark.parametrize("number, head", [("12", "another"), ("12; rm -rf x", "abc"), ("", "abc"), ("1e3", "abc")])
def test_a_number_that_is_not_the_runs_own_gets_no_comment(tmp_path, number, head):
    code, asked = commented(tmp_path, number=number, head=head)
    assert "--method" not in asked and not (tmp_path / "sent.json").exists()


def test_hostile_text_stays_text_in_the_comment(tmp_path):
    code, _ = commented(tmp_path, kind="hostile")
    body = json.loads((tmp_path / "sent.json").read_text())["body"]
    outside = re.sub(r"`[^`\n]*`", "", body.replace("\\`", ""))  # inline code is shown as it stands
    assert code == 0 and HOSTILE not in outside
    assert not any(part in outside for part in ("<script", "<img", "@team", "[a](b)"))
