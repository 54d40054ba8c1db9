"""The command line on bad input: one clear sentence, the documented exit code, and nothing half-written."""

from __future__ import annotations

import json

import pytest
from command_line import CASES, JUDGE, edit, here, made, refused  # noqa: F401  fixtures
from random_models import write_checkpoint

from harness.cli import main
from harness.errors import ExitCode


def test_a_healthy_rung_passes_and_leaves_a_whole_report(here, capfd):
    assert main(JUDGE.split()) == ExitCode.PASS
    out, err = capfd.readouterr()
    assert "contract  PASS" in out and err == ""
    names = sorted(path.name for path in (here / "out").iterdir())
    assert names == ["certificate.json", "report.html", "report.md", "run.json"]


def test_json_prints_the_record_and_nothing_else(here, capfd):
    assert main([*JUDGE.split(), "--case", "words", "--json"]) == ExitCode.PASS
    out, err = capfd.readouterr()
    assert {row["case"] for row in json.loads(out)["verdicts"]} == {"words", "probes"} and err == ""


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
    refused(2, "record small --cases cases.toml --out other", "outside the vocabulary", leaves=("other/pending.json",))


def test_a_prompt_longer_than_the_context(here, refused):
    write_checkpoint(here / "short", layers=3, max_position_embeddings=20)
    refused(2, "record short --cases cases.toml --out other", "20 positions", leaves=("other/pending.json",))


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
    refused(2, "record model --cases cases.toml --out other", "picture", "lost.png", leaves=("other/pending.json",))


def test_an_unknown_case(here, refused):
    refused(2, f"{JUDGE} --case nobody", "nobody", "picture, words")


@pytest.mark.parametrize("flag, text, word", [
    ("bounds", "", "bound"), ("bounds", "bound = [1]", "wrong type"), ("bounds", "[[bound]]\nrung = 'vision'", "missing"),
    ("bounds", "[[bound]]\nrung = 'vision'\nmetric = 'm'\nlimit = 'x'\nmeasured = 1\nbecause = 'b'\ndate = 'd'",
     "wrong type"),
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


# Usage.

@pytest.mark.parametrize("argv", ["", "fly", "gate --fly", "gate --mode int3", "ladder --rung roof", "record --device tpu",
                                  "gate --timeout nan", "gate --timeout 0", "gate --timeout soon", "gate --grid 28",
                                  "gate --grid 0x4", "gate --grid=-4x4", "export --context many", "verify", "calibrate"])
def test_wrong_usage_is_2(here, capfd, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == ExitCode.BAD_INPUT
    assert "harness" in capfd.readouterr().err.splitlines()[-1] and not (here / "reports").exists()
