"""The command line on damaged or foreign files, a full disk, and interruptions: a sentence, a code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_line import BUNDLE, CASES, JUDGE, bundle, edit, here, made, refused  # noqa: F401  fixtures
from fake_run import record_of, signed
from random_models import write_checkpoint

from harness.bundle import Bundle
from harness.cli import main
from harness.errors import ExitCode

ROOT = Path(__file__).resolve().parent.parent
CASE = '[[case]]\nname = "case-{:02d}"\nwhy = "w"\ndecode = 4\nturns = [{{ role = "", text = "Tell a story." }}]\n'
MANY = "".join(CASE.format(at) for at in range(60))


# The bundle.

def test_a_bundle_without_its_asset(here, refused, bundle):
    shutil.rmtree(bundle / f"{BUNDLE}.aimodel")
    refused(2, f"gate model --bundle {BUNDLE}", "no such .aimodel")


@pytest.mark.parametrize("part, word", [("main.mlirb", "main.mlirb"), ("main.hash", "main.hash")])
def test_a_bundle_without_a_part_of_its_asset(here, refused, bundle, part, word):
    (bundle / f"{BUNDLE}.aimodel" / part).unlink()
    refused(2, f"gate model --bundle {BUNDLE}", word, "missing")


def test_a_path_that_leaves_the_bundle(here, refused, bundle):
    edit(bundle / "metadata.json", lambda table: table["assets"].update(main="../other.aimodel"))
    refused(2, f"gate model --bundle {BUNDLE}", "leaves the bundle")


def test_an_unknown_metadata_version(here, refused, bundle):
    edit(bundle / "metadata.json", lambda table: table.update(metadata_version="9.9"))
    refused(2, f"gate model --bundle {BUNDLE}", "metadata_version", "'9.9'")


def test_a_corrupt_program(here, refused, bundle):
    program = bundle / f"{BUNDLE}.aimodel" / "main.mlirb"
    program.write_bytes(program.read_bytes()[:-1] + b"!")
    refused(2, f"gate model --bundle {BUNDLE}", "main.mlirb", "damaged")


def test_a_bundle_of_another_geometry(here, refused, bundle):
    edit(bundle / "metadata.json", lambda table: table["language"].update(vocab_size=151936))
    refused(2, f"gate model --bundle {BUNDLE}", "vocab_size is 151936", "512")


def test_a_vision_bundle_given_as_decoder(here, refused, bundle):
    edit(bundle / "metadata.json", lambda table: table.update(kind="vision"))
    refused(2, f"gate model --bundle {BUNDLE}", "--vision-bundle")


# The oracle.

def test_an_oracle_of_another_revision(here, refused):
    write_checkpoint(here / "model", layers=3, seed=9)
    refused(2, JUDGE, "another checkpoint revision", "record it again")


@pytest.mark.parametrize("part", ["inputs", "rollout", "decoder.01", "vision.03", "logits.000"])
def test_an_oracle_with_a_flipped_byte(here, refused, part):
    path = here / "oracle" / "cases" / "picture" / f"{part}.safetensors"
    held = bytearray(path.read_bytes())
    held[-5] ^= 1
    path.write_bytes(held)
    refused(2, JUDGE, f"{part}.safetensors", "sha256 differs")


def test_an_oracle_that_lacks_a_case(here, refused):
    shutil.rmtree(here / "oracle" / "cases" / "words")
    refused(2, JUDGE, "words", "no such case")


def test_an_oracle_of_a_case_that_has_changed(here, refused):
    (here / "cases.toml").write_text(CASES.replace("Tell a story.", "Tell two."))
    refused(2, JUDGE, "words", "turns changed")


def test_an_oracle_of_another_checkpoint_is_not_recorded_into(here, refused):
    write_checkpoint(here / "model", layers=3, seed=9)
    refused(2, "record model --cases cases.toml --out oracle", "oracle of another kind")


# The disk.

def _full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_space_while_recording(here, refused, monkeypatch):
    monkeypatch.setattr("harness.store.files.os.fsync", _full)
    refused(2, "record model --cases cases.toml --out other", "no space left", "other")


def test_no_space_for_the_report_leaves_the_one_before(here, refused, monkeypatch):
    assert main(JUDGE.split()) == ExitCode.PASS
    whole = Path.write_text

    def write(path: Path, text: str, **settings):
        return _full() if "report.md" in path.name else whole(path, text, **settings)

    monkeypatch.setattr(Path, "write_text", write)
    refused(2, JUDGE, "out", "No space left")
    monkeypatch.undo()
    assert main(["verify", str(here / "out")]) != ExitCode.FAIL


def test_an_out_folder_that_is_a_file(here, refused):
    (here / "out").write_text("x")
    refused(2, JUDGE, "out: is no directory")


# Interruption.

def test_ctrl_c_while_recording_and_on_with_the_next_run(here, capfd):
    (here / "cases.toml").write_text(MANY)
    command = ["record", "model", "--cases", "cases.toml", "--out", "other"]
    child = subprocess.Popen([sys.executable, "-m", "harness.cli", *command], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    first = here / "other" / "cases" / "case-00" / "decoder.00.json"
    try:
        deadline = time.monotonic() + 120
        while not first.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == ExitCode.INTERRUPTED, err
    assert out.startswith("memory: ") and out.count("\n") == 1 and err == "harness record: interrupted; what was recorded is kept, run the same command to go on\n"
    assert first.exists() and not list((here / "other").rglob("logits.*.json"))
    assert not list((here / "other").rglob(".tmp-*"))
    stamp = first.stat().st_mtime_ns
    assert main(command) == ExitCode.PASS
    assert "60 cases" in capfd.readouterr().out and first.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("verb, words", [("record", "what was recorded is kept"), ("export", "nothing half-written")])
def test_an_interrupt_is_130(here, refused, monkeypatch, verb, words):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)  # a kill counts as an interrupt while a verb runs
        time.sleep(30)

    def ours(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, ours)
    monkeypatch.setattr("harness.subject.given.open_checkpoint", interrupt)
    try:
        refused(130, f"{verb} model", "interrupted", words)
        assert signal.getsignal(signal.SIGTERM) is ours, "the handler of a caller in this process is put back"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_verb_runs_in_another_thread(here, refused):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["report", "nowhere"])))
    thread.start()
    thread.join(30)
    assert codes == [2]


@pytest.mark.parametrize("error", [RuntimeError("a\nlong\nstory"), RecursionError(), AssertionError()])
def test_a_defect_of_ours_is_no_verdict(here, refused, monkeypatch, error):
    def crash(*_, **__):
        raise error

    monkeypatch.setattr("harness.subject.given.open_checkpoint", crash)
    refused(3, "gate model", type(error).__name__, "test_cli_files.py, line", "nothing was decided")


# Reports.

@pytest.fixture
def report(here: Path, bundle: Path) -> Path:
    """A report that passes and speaks for `bundle`."""
    record = record_of("healthy")
    record["subject"]["bundle"]["digest"] = Bundle.open(bundle).digest
    folder = here / "report"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "certificate.json").write_text(json.dumps(signed(record)))
    return folder


def test_a_true_report_verifies(report, bundle, capfd):
    assert main(["verify", str(report), str(bundle)]) == ExitCode.PASS
    assert f"speaks for {bundle}" in capfd.readouterr().out
    assert main(["verify", str(report)]) == ExitCode.PASS


@pytest.mark.parametrize("name, old, new", [("run.json", '"bound": 0.0', '"bound": 1.0'), ("run.json", "PASS", "pASS"),
                                            ("certificate.json", "PASS", "FAIL"), ("run.json", "text-only", "text-onlx")])
def test_a_changed_byte_does_not_verify(report, bundle, capfd, name, old, new):
    text = (report / name).read_text()
    (report / name).write_text(text.replace(old, new, 1))
    assert main(["verify", str(report), str(bundle)]) == ExitCode.FAIL
    assert capfd.readouterr().out.startswith("does not match: ")


def test_another_bundle_does_not_verify(report, bundle, capfd):
    (bundle / "tokenizer" / "tokenizer.json").write_text("{}")
    assert main(["verify", str(report), str(bundle)]) == ExitCode.FAIL
    assert "speaks for bundle" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["run.json", "certificate.json"])
@pytest.mark.parametrize("spoil", ["cut", "gone", "list"])
@pytest.mark.parametrize("verb", ["verify", "report"])
def test_half_a_report_is_bad_input(report, refused, name, spoil, verb):
    path = report / name
    if spoil == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text()[:400] if spoil == "cut" else "[]")
    refused(2, f"{verb} report", name)


def test_a_bundle_to_verify_that_is_none(report, refused):
    refused(2, "verify report nowhere", "nowhere")


@pytest.mark.parametrize("argv", ["report nowhere", "report empty", "report", "report a b c", "report --index empty"])
def test_a_folder_without_a_run(here, refused, argv):
    (here / "empty").mkdir()
    refused(2, argv)


def test_a_report_is_rendered_again(report, capfd):
    assert main(["report", str(report)]) == ExitCode.PASS
    assert {"report.html", "report.md"} <= {path.name for path in report.iterdir()}
    assert main(["report", str(report), "--card"]) == ExitCode.PASS
    assert main(["report", "--index", str(report.parent)]) == ExitCode.PASS and (report.parent / "index.html").exists()
