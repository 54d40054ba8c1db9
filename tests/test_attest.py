"""Before an upload: a certificate for exactly these bytes, under a policy at least as strict, or the reason why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import BUNDLE, bundle, here, made  # noqa: F401  fixtures
from fake_run import record_of, signed

from harness import attest, signing
from harness.bundle import Bundle
from harness.cli import main
from harness.run import write_json

LAX = 'name = "lax"\nallow_skip = []\nallow_unanswered = []\nmin_cases = 1\nmodes = ["fp16", "int8hu", "int8lin"]\n'
CASE = '[[case]]\nname = "{}"\nwhy = "w"\nturns = [{{ role = "", text = "x" }}]\n'
FEW = CASE.format("scene-211") + CASE.format("text-only")
LENIENT = ("--policy", "lax.toml", "--cases", "few.toml")


@pytest.fixture
def certified(here, bundle) -> Path:  # noqa: F811
    """A report beside the bundle, of a run whose record says that it judged exactly this bundle."""
    record = record_of("healthy")
    (bundle / "tokenizer" / "tokenizer.json").write_text("[]")
    record["subject"]["bundle"] = Bundle.open(bundle).record()
    (here / "lax.toml").write_text(LAX)
    (here / "few.toml").write_text(FEW)
    return write(bundle.with_name(bundle.name + ".report"), record)


def write(folder: Path, record: dict[str, Any]) -> Path:
    """A report folder."""
    write_json(folder / "run.json", record)
    write_json(folder / "certificate.json", signed(record))
    return folder


def test_the_certificate_beside_a_bundle_lets_it_be_published(certified, capsys):
    assert main(["publish-check", BUNDLE, *LENIENT]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"publish {BUNDLE}: PASS") and "not signed" in out
    assert signed(json.loads((certified / "run.json").read_text()))["digest"] in out


def test_policy_and_cases_of_this_repository_are_asked_for_by_default(certified, capsys):
    assert main(["publish-check", BUNDLE]) == 1
    out = capsys.readouterr().out
    assert "laxer than 'default'" in out and "case 'wide' of cases.toml was not judged" in out


def test_a_case_that_left_out_the_engine_is_named(certified, capsys):
    record = json.loads((certified / "run.json").read_text())
    record["cases"][0]["engine"] = False
    record["verdicts"] = [row for row in record["verdicts"]
                          if not (row["rung"] in ("engine", "tokens") and row["case"].startswith("scene-211"))]
    write(certified, record)
    assert main(["verify", f"{BUNDLE}.report", BUNDLE]) == 0, "by itself that contradicts nothing"
    assert main(["publish-check", BUNDLE, *LENIENT]) == 1
    assert "case 'scene-211' of few.toml was not run on the engine" in capsys.readouterr().out


@pytest.mark.parametrize("spoil, words", [
    (lambda path: (path / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer/tokenizer.json differs"),
    (lambda path: (path / "NEW").write_text(""), "NEW was not judged"),
    (lambda path: (path / "tokenizer" / "tokenizer.json").unlink(), "tokenizer/tokenizer.json is missing")])
def test_other_bytes_are_named_file_by_file(certified, bundle, capsys, spoil, words):  # noqa: F811
    spoil(bundle)
    assert main(["publish-check", BUNDLE, *LENIENT]) == 1
    assert words in capsys.readouterr().out
    assert main(["verify", f"{BUNDLE}.report", BUNDLE]) == 1
    assert words in capsys.readouterr().out


def test_a_bundle_without_a_certificate_is_undecided(here, bundle, capsys):  # noqa: F811
    assert main(["publish-check", BUNDLE]) == 3
    assert "no certificate speaks for it" in capsys.readouterr().err


def test_a_certificate_above_the_bundle_is_found_and_one_given_comes_first(certified, here, bundle):  # noqa: F811
    inner = here / "reports" / "run" / "bundles" / "ab"
    shutil.copytree(bundle, inner / BUNDLE)
    shutil.copytree(certified, here / "reports" / "run", dirs_exist_ok=True)
    assert attest.beside(inner / BUNDLE) == here.resolve() / "reports" / "run"
    other = write(here / "other", record_of("failing"))
    lax = attest.Asked(policy=here / "lax.toml", cases=here / "few.toml")
    assert attest.publish_check(inner / BUNDLE, None, lax)[1] == 0
    lines, code = attest.publish_check(bundle, other, lax)
    assert code == 1 and "speaks for bundle" in " ".join(lines)


def test_a_run_that_failed_is_not_published(certified, bundle, capsys):  # noqa: F811
    record = record_of("failing")
    record["subject"]["bundle"] = Bundle.open(bundle).record()
    write(certified, record)
    assert main(["publish-check", BUNDLE, *LENIENT]) == 1
    assert "the certificate says FAIL: rung decoder is broken" in capsys.readouterr().out
    assert main(["verify", f"{BUNDLE}.report", BUNDLE]) == 1


@pytest.mark.parametrize("text", ["[]", "{", '{"schema": 2}', "null"])
def test_a_damaged_certificate_is_no_certificate(certified, capsys, text):
    (certified / "certificate.json").write_text(text)
    assert main(["publish-check", BUNDLE, *LENIENT]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_bounds_of_this_repository_are_asked_for_where_its_own_checkpoint_was_judged(certified):
    from harness.checkpoint import open_checkpoint

    record = json.loads((certified / "run.json").read_text())
    assert attest._least_bounds(record, None) is None
    record["subject"]["checkpoint"] |= {"revision": "embedded", "digest": open_checkpoint().digest}
    assert attest._least_bounds(record, None).all
    write(certified, record)
    lines, code = attest.check_report(certified, [], attest.Asked())
    assert code == 1 and any("wider than" in line or "is missing" in line for line in lines)


# Signatures: a stand-in that keeps a digest, so that the calls are tested where minisign is not installed.

STAND_IN = """#!{python}
import hashlib, pathlib, sys
words = sys.argv[1:]
given = {{words[at]: words[at + 1] for at in range(len(words) - 1)}}
path, held = pathlib.Path(given["-m"]), pathlib.Path(given.get("-p", given.get("-s", "none")))
key = held.read_text() if held.is_file() else given["-P"]
right = hashlib.sha256(key.encode() + path.read_bytes()).hexdigest()
place = path.with_name(path.name + ".minisig")
if "-S" in words:
    place.write_text(right)
elif place.read_text() != right:
    sys.exit("Signature verification failed")
"""


@pytest.fixture
def stand_in(here, monkeypatch) -> None:  # noqa: F811
    """minisign as this test knows it, first on PATH."""
    import sys

    tool = here / "bin" / "minisign"
    tool.parent.mkdir()
    tool.write_text(STAND_IN.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    (here / "key").write_text("k")
    (here / "other").write_text("o")


def test_a_signed_certificate_is_checked(certified, stand_in, capsys):
    asked = ["publish-check", BUNDLE, *LENIENT, "--signed-by"]
    assert main([*asked, "key"]) == 1
    assert "nobody has signed" in capsys.readouterr().out
    assert main(["report", f"{BUNDLE}.report", "--sign", "key"]) == 0
    assert main([*asked, "key"]) == 0 and main([*asked, "k"]) == 0
    assert "signed by key" in capsys.readouterr().out
    assert main([*asked, "other"]) == 1
    assert "Signature verification failed" in capsys.readouterr().out


def test_a_changed_certificate_loses_its_signature(certified, stand_in):
    main(["report", f"{BUNDLE}.report", "--sign", "key"])
    path = certified / "certificate.json"
    path.write_text(path.read_text() + " ")
    assert main(["verify", f"{BUNDLE}.report", BUNDLE]) == 0
    assert main(["verify", f"{BUNDLE}.report", BUNDLE, "--signed-by", "key"]) == 1


def test_without_the_tool_a_signature_is_undecided(certified, monkeypatch, here, capsys):  # noqa: F811
    (certified / "certificate.json.minisig").write_text("x")
    monkeypatch.setattr(signing, "TOOL", "no-such-tool")
    assert main(["verify", f"{BUNDLE}.report", "--signed-by", "key"]) == 3
    assert "no-such-tool is not installed" in capsys.readouterr().err
    assert main(["report", f"{BUNDLE}.report", "--sign", "missing-key"]) == 2


def test_the_calls_are_those_of_the_real_tool(tmp_path):
    """Where minisign is installed it is asked; where not, its manual's synopsis is what our calls are held against."""
    if shutil.which("minisign") is None:
        assert signing.SUFFIX == ".minisig"
        return
    subprocess.run(["minisign", "-G", "-W", "-p", "a.pub", "-s", "a.key"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["minisign", "-G", "-W", "-p", "b.pub", "-s", "b.key"], cwd=tmp_path, check=True, capture_output=True)
    path = tmp_path / "certificate.json"
    path.write_text("{}")
    signing.sign(path, tmp_path / "a.key", "PASS 0")
    text = (tmp_path / "a.pub").read_text().splitlines()[1]
    assert signing.unsigned(path, str(tmp_path / "a.pub")) is None and signing.unsigned(path, text) is None
    assert "not signed by that key" in signing.unsigned(path, str(tmp_path / "b.pub"))
    path.write_text("{ }")
    assert "not signed by that key" in signing.unsigned(path, str(tmp_path / "a.pub"))
