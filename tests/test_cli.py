"""The command line on bad input: one clear sentence, the documented exit code, and nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_run import record_of, signed
from random_models import write_checkpoint

from harness.bundle import Bundle, metadata
from harness.cli import main
from harness.errors import ExitCode

ROOT = Path(__file__).resolve().parent.parent
CASES = """
[[case]]
name = "picture"
why = "w"
decode = 4
turns = [{ role = "user", text = "Describe this image.", image = "noise:96x64:5" }]
[[case]]
name = "words"
why = "w"
decode = 4
turns = [{ role = "user", text = "Tell a story." }]
"""
MANY = "".join(f'[[case]]\nname = "case-{at:02d}"\nwhy = "w"\ndecode = 4\nturns = [{{ role = "", text = "Tell a story." }}]\n'
               for at in range(60))
BUNDLE = "toy_decode_int8hu_s1"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a random checkpoint `model`, its `oracle` of two cases, and `cases.toml`."""
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "model", layers=3)
    (root / "cases.toml").write_text(CASES)
    assert main(["record", str(root / "model"), "--cases", str(root / "cases.toml"), "--out", str(root / "oracle")]) == 0
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, as the current directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def bundle(here: Path) -> Path:
    """A bundle whose files are well-formed; its program is none, which nothing here gets far enough to see."""
    root = here / BUNDLE
    asset = root / f"{BUNDLE}.aimodel"
    asset.mkdir(parents=True)
    (root / "tokenizer").mkdir()
    (asset / "main.mlirb").write_bytes(b"program" * 100)
    (asset / "main.hash").write_bytes(hashlib.sha256(b"program" * 100).digest())
    (root / "metadata.json").write_text(json.dumps(metadata(
        BUNDLE, "int8hu", hf_model_id="o/m", model_definition="torch", date="2026-01-01", vocab_size=512,
        max_context_length=256)))
    return root


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """`refused(code, argv, *words)`: one sentence on stderr with these words, that exit code, no file added or changed."""
    def check(code: int, argv: str, *words: str, leaves: tuple[str, ...] = ()) -> str:
        before, verb = _files(), argv.split()[0]
        capfd.readouterr()
        assert main(argv.split()) == code
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith(f"harness {verb}: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert all(word in err for word in words), err
        assert {name for name, content in _files().items() if before.get(name) != content} == set(leaves)
        assert not set(before) - set(_files())
        return err
    return check


def _files() -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path().rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


JUDGE = "ladder model --cases cases.toml --oracle oracle --out out --rung contract"


def test_a_healthy_rung_passes_and_leaves_a_whole_report(here, capfd):
    assert main(JUDGE.split()) == ExitCode.PASS
    out, err = capfd.readouterr()
    assert "contract  PASS" in out and err == ""
    assert sorted(path.name for path in (here / "out").iterdir()) == ["certificate.json", "report.html", "report.md", "run.json"]


def test_json_prints_the_record_and_nothing_else(here, capfd):
    assert main([*JUDGE.split(), "--case", "words", "--json"]) == ExitCode.PASS
    out, err = capfd.readouterr()
    assert {row["case"] for row in json.loads(out)["verdicts"]} == {"words"} and err == ""


# The checkpoint.

@pytest.mark.parametrize("verb", ["gate", "record", "export", "calibrate --out bounds.toml"])
def test_a_missing_checkpoint(here, refused, verb):
    words = verb.split()
    refused(2, " ".join([words[0], "no/such/place", *words[1:]]), "no/such/place", "no such directory")


def test_a_hub_id_that_cannot_be_had(here, refused, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("name or service\nnot known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(2, "record owner/name", "owner/name", "the hub did not give it")


def test_an_empty_directory_is_no_checkpoint(here, refused):
    (here / "empty").mkdir()
    refused(2, "gate empty", "empty", "config.json")


def test_a_truncated_shard(here, refused):
    shard = here / "model" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    for verb in ("record", "gate"):
        refused(2, f"{verb} model --cases cases.toml", "model.safetensors", "truncated")


@pytest.mark.parametrize("kept", [True, False])
def test_a_shard_that_the_index_promises(here, refused, kept):
    (here / "model" / "model.safetensors").unlink()
    if kept:
        (here / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(2, "record model --cases cases.toml", "model-1.safetensors" if kept else "model.safetensors", "download")


@pytest.mark.parametrize("section, key, value, word", [
    ("text_config", "rms_norm_eps", None, "rms_norm_eps"), ("text_config", "rope_scaling", None, "rope_scaling"),
    ("text_config", "rope_theta", None, "rope_theta"), ("vision_config", "deepstack_visual_indexes", None, "deepstack"),
    ("text_config", "hidden_act", "gelu", "'gelu' is not supported"), ("text_config", "head_dim", "32", "head_dim")])
def test_a_missing_or_unknown_config_value(here, refused, section, key, value, word):
    edit(here / "model" / "config.json",
         lambda table: table[section].pop(key) if value is None else table[section].update({key: value}))
    refused(2, "gate model", "config", word)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\x00"])
def test_a_config_that_is_no_object(here, refused, text):
    (here / "model" / "config.json").write_text(text)
    refused(2, "gate model", "model")


def test_ids_outside_the_vocabulary(here, refused):
    write_checkpoint(here / "small", layers=3, vocab_size=300)
    refused(2, "record small --cases cases.toml --out other", "outside the vocabulary", leaves=("other/manifest.json",))


def test_a_prompt_longer_than_the_context(here, refused):
    write_checkpoint(here / "short", layers=3, max_position_embeddings=20)
    refused(2, "record short --cases cases.toml --out other", "20 positions", leaves=("other/manifest.json",))


@pytest.mark.parametrize("inside", ["x", "99", "-1", "0,,1"])
def test_layers_that_are_none(here, refused, inside):
    refused(2, f"record model --cases cases.toml --out other --inside={inside}", "--inside")


# Cases, bounds, policy, graph.

@pytest.mark.parametrize("text, word", [
    ('[[case]]\nname = "a"\nwhy = "w"\nturns = [{ role = "user", text = "x", image = "white:64x64" }, '
     '{ role = "user", text = "y", image = "white:64x64" }]', "2 images"),
    ('case = "x"', "cases.toml"), ('[[case]]\nname = "a"\nwhy = "w"\nturns = [1]', "cases.toml"),
    ('[[case]]\nname = "a"\nwhy = "w"\ndecode = "many"\nturns = [{ role = "", text = "x" }]', "cases.toml"),
    ("[[case", "not valid TOML"), ("", "cases.toml")])
@pytest.mark.parametrize("verb", ["record", "gate"])
def test_bad_cases(here, refused, text, word, verb):
    (here / "cases.toml").write_text(text)
    refused(2, f"{verb} model --cases cases.toml", word)


def test_an_image_that_is_lost(here, refused):
    (here / "cases.toml").write_text(CASES.replace("noise:96x64:5", "lost.png"))
    refused(2, "record model --cases cases.toml --out other", "picture", "lost.png", leaves=("other/manifest.json",))


def test_an_unknown_case(here, refused):
    refused(2, f"{JUDGE} --case nobody", "nobody", "picture, words")


@pytest.mark.parametrize("flag, text, word", [
    ("bounds", "", "bound"), ("bounds", "bound = [1]", "wrong type"), ("bounds", "[[bound]]\nrung = 'vision'", "missing"),
    ("bounds", "[[bound]]\nrung = 'vision'\nmetric = 'm'\nlimit = 'x'\nmeasured = 1\nbecause = 'b'\ndate = 'd'", "wrong type"),
    ("policy", "name = 'p'", "missing"), ("policy", "[", "not valid TOML"),
    ("policy", "name='p'\nallow_skip=[]\nallow_unanswered='engine:*'\nmin_cases=1\nmodes=[]", "not a list of texts"),
    ("policy", "name='p'\nallow_skip=[]\nallow_unanswered=[]\nmin_cases=0\nmodes=[]", "above 0")])
def test_a_bad_bounds_or_policy_file_ends_the_run_before_any_work(here, refused, flag, text, word):
    (here / "bad.toml").write_text(text)
    refused(2, f"{JUDGE} --{flag} bad.toml", "bad.toml", word)


@pytest.mark.parametrize("flag", ["bounds", "policy", "cases", "oracle", "bundle"])
def test_a_file_that_is_not_there(here, refused, flag):
    refused(2, f"{JUDGE} --{flag} nowhere", "nowhere")


@pytest.mark.parametrize("graph, word", [
    ("no_such_module:factory", "No module named"), ("json:factory", "no attribute 'factory'"), ("json", "imported"),
    ("math:pi", "is a float"), ("broken:factory", "SyntaxError"), ("leaves:factory", "SystemExit"), ("", "imported")])
def test_a_graph_that_cannot_be_had(here, refused, monkeypatch, graph, word):
    (here / "broken.py").write_text("def factory(:\n")
    (here / "leaves.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(here)
    refused(2, f"{JUDGE} --graph={graph}", f"--graph {graph}", word)


def test_a_graph_that_exits_while_it_is_judged_is_no_pass(here, refused, monkeypatch):
    (here / "quits.py").write_text("def factory(root, grid):\n    raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(here)
    refused(3, f"{JUDGE} --graph quits:factory", "SystemExit", "quits.py, line 2", "nothing was decided")


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


@pytest.mark.parametrize("part", ["inputs", "rollout", "decoder", "vision"])
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
    first = here / "other" / "cases" / "case-00" / "case.json"
    try:
        deadline = time.monotonic() + 120
        while not first.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == ExitCode.INTERRUPTED, err
    assert out == "" and err == "harness record: interrupted; what was recorded is kept, run the same command to go on\n"
    done = sorted(path.parent.name for path in (here / "other").rglob("case.json"))
    assert "case-00" in done and len(done) < 60
    assert not list((here / "other").rglob(".tmp-*"))
    stamp = first.stat().st_mtime_ns
    assert main(command) == ExitCode.PASS
    assert "60 cases" in capfd.readouterr().out and first.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("verb, words", [("record", "what was recorded is kept"), ("export", "nothing half-written")])
def test_an_interrupt_is_130(here, refused, monkeypatch, verb, words):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)  # a kill counts as an interrupt while a verb runs
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("harness.subject.open_checkpoint", interrupt)
    refused(130, f"{verb} model", "interrupted", words)
    assert signal.getsignal(signal.SIGTERM) is before


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

    monkeypatch.setattr("harness.subject.open_checkpoint", crash)
    refused(3, "gate model", type(error).__name__, "test_cli.py, line", "nothing was decided")


# Usage.

@pytest.mark.parametrize("argv", ["", "fly", "gate --fly", "gate --mode int3", "ladder --rung roof", "record --device tpu",
                                  "gate --timeout nan", "gate --timeout 0", "gate --timeout soon", "gate --grid 28",
                                  "gate --grid 0x4", "gate --grid=-4x4", "export --context many", "verify", "calibrate"])
def test_wrong_usage_is_2(here, capfd, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == ExitCode.BAD_INPUT
    assert "harness" in capfd.readouterr().err.splitlines()[-1] and not (here / "reports").exists()


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
