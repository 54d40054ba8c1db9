"""Recording in bounded memory: the bytes are those of the whole model, whatever the memory, the draft, and who is killed.

The same tests run under transformers 4.57 and 5.x.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import write_checkpoint
from recorded import CASES, IMAGE, TEXT, checkpoint, model, oracle  # noqa: F401

from harness.checkpoint import Checkpoint
from harness.cli import main, parser
from harness.errors import HarnessError
from harness.oracle import forward, record, recording, stages, wanted_seams
from harness.oracle.hooks import SeamHooks
from harness.oracle.plan import Plan, gib, plan
from harness.store import Oracle, files
from harness.streaming import stages as parts
from harness.streaming.reading import WeightReader

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def two_slots(monkeypatch) -> None:
    """As if memory were short: two buffers for weights, in turn."""
    monkeypatch.setattr(recording, "plan", lambda *_: Plan({"weights": 1}, 1, 2, False))


def drafts_of(oracle: Oracle) -> dict[str, list[int]]:
    return {name: oracle.case(name).rollout.tokens.tolist() for name in oracle.cases}


def passes(oracle: Oracle) -> set[int]:
    return {oracle.case(name).facts["passes"] for name in oracle.cases}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_byte_is_that_of_the_whole_model(oracle: Oracle, model, checkpoint: Checkpoint, case) -> None:
    recorded = oracle.case(case.name)
    seams = wanted_seams(checkpoint.geometry, "all", bool(case.images))
    with SeamHooks(model, checkpoint.geometry, seams) as hooks:
        output = forward(model, recorded.inputs, recorded.rollout.tokens)
    for name, array in hooks.arrays().items():
        assert np.array_equal(array, recorded.trace[name]), name
    for part in ("keys", "values"):
        whole = torch.stack([getattr(layer, part)[0] for layer in output.past_key_values.layers]).numpy()
        assert np.array_equal(whole, recorded.trace[f"kv.{part}"])


@pytest.mark.parametrize("slots", [1, 2])
def test_the_memory_changes_no_byte(oracle: Oracle, checkpoint: Checkpoint, tmp_path: Path, monkeypatch,
                                    slots: int) -> None:
    monkeypatch.setattr(recording, "plan", lambda *_: Plan({"weights": 1}, 1, slots, False))
    found = record(checkpoint, CASES, tmp_path / "o", inside="all")
    assert found.digest == oracle.digest and max(passes(found)) <= CASES[0].decode + 2


def test_the_head_in_blocks_of_rows(oracle: Oracle, checkpoint: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "HEAD_BYTES", 4 * 100 * checkpoint.geometry.hidden)
    found = record(checkpoint, [TEXT], tmp_path / "o")
    assert len(list((found.path / "cases" / "text").glob("logits.*.json"))) == 6
    logits = found.case("text").trace["logits"]
    assert np.allclose(logits, oracle.case("text").trace["logits"], atol=1e-5) and logits.shape[1] == 512


def test_a_right_draft_takes_one_pass_one_wrong_token_two(oracle: Oracle, checkpoint: Checkpoint, tmp_path: Path,
                                                          two_slots) -> None:
    right = drafts_of(oracle)
    found = record(checkpoint, CASES, tmp_path / "right", inside="all", drafts=right)
    assert found.digest == oracle.digest and passes(found) == {1} and found.case("text").facts["draft"] == "given"
    wrong = {name: [*tokens[:2], (tokens[2] + 1) % 400, *tokens[3:]] for name, tokens in right.items()}
    found = record(checkpoint, CASES, tmp_path / "wrong", inside="all", drafts=wrong)
    assert found.digest == oracle.digest and passes(found) == {2}
    found = record(checkpoint, [TEXT], tmp_path / "short", inside="all", drafts={"text": right["text"][:1]})
    assert found.case("text").digest == oracle.case("text").digest


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Checkpoint, Oracle]:
    """One checkpoint and its oracle, for what does not depend on whether the head is tied."""
    found = Checkpoint(write_checkpoint(tmp_path_factory.mktemp("one"), seed=3, dtype="bfloat16"))
    return found, record(found, CASES, tmp_path_factory.mktemp("oracle") / "o", inside="all")


class Killed(Exception):
    pass


def killed_at(steps: int):
    def tell(what: str, done: int, total: int) -> None:
        nonlocal steps
        steps -= what.startswith("pass")
        if steps < 0:
            raise Killed

    return tell


@pytest.mark.parametrize("steps", range(10))
def test_killed_at_each_stage_it_goes_on_there(one, tmp_path: Path, two_slots, steps: int) -> None:
    checkpoint, oracle = one
    right, told = drafts_of(oracle), []
    with pytest.raises(Killed):
        record(checkpoint, CASES, tmp_path / "o", inside="all", drafts=right, progress=killed_at(steps))
    found = record(checkpoint, CASES, tmp_path / "o", inside="all", drafts=right,
                   progress=lambda *step: told.append(step[0]))
    assert found.digest == oracle.digest and passes(found) == {1}
    done = [f"pass 1: {name}" for name in ("vision.00", "vision.01", "vision.02", "vision.03", "decoder.00", "decoder.01",
                                           "decoder.02", "decoder.03")][:steps]
    assert not set(done) & set(told), "what was finished is not done again"
    folder = found.path / "cases" / "image"
    assert {path.stem for path in folder.glob("*.json")} - {"case"} == {path.stem for path in folder.glob("*.safetensors")}
    assert not (folder / "note.json").exists() and not (folder / "chunk.json").exists()


def test_a_killed_process_loses_nothing_that_was_finished(one, tmp_path: Path) -> None:
    checkpoint, oracle = one
    code = ("import os, sys; from recorded import CASES; from harness.checkpoint import Checkpoint; "
            "from harness.oracle import record\n"
            "def tell(what, done, total):\n    if what.endswith('decoder.02'): os._exit(9)\n"
            "record(Checkpoint(sys.argv[1]), CASES, sys.argv[2], inside='all', progress=tell)")
    command = [sys.executable, "-c", code, str(checkpoint.root), str(tmp_path / "o")]
    paths = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH"))))
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True).returncode == 9
    assert (tmp_path / "o" / "cases" / "image" / "decoder.00.json").exists()
    assert record(checkpoint, CASES, tmp_path / "o", inside="all").digest == oracle.digest


def test_a_disk_that_fills_up_keeps_what_was_finished(one, tmp_path: Path, monkeypatch) -> None:
    checkpoint, oracle = one
    written, dump = [], files._dump

    def full(file, arrays):
        written.append(file.name)
        if len(written) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return dump(file, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_dump", full)
        with pytest.raises(HarnessError, match="no space left on the disk: the next file needs"):
            record(checkpoint, CASES, tmp_path / "o", inside="all")
    assert not list((tmp_path / "o").rglob(".tmp-*"))
    assert record(checkpoint, CASES, tmp_path / "o", inside="all").digest == oracle.digest


@pytest.fixture
def copied(one, tmp_path: Path) -> Checkpoint:
    """A checkpoint of one's own, opened and known by its digest."""
    found = Checkpoint(shutil.copytree(one[0].root, tmp_path / "model"))
    assert found.digest
    return found


def harm_at(stage: str, harm):
    def tell(what: str, done: int, total: int) -> None:
        if what.endswith(stage):
            harm()

    return tell


def rewritten(path: Path) -> None:
    """The same bytes once more, in place: a file that is emptied first is truncated to whoever reads it just then."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("harm, sentence", [
    (lambda path: os.truncate(path, path.stat().st_size // 2), "(truncated|changed) while it was read"),
    (lambda path: rewritten(path), "changed while it was read"),
    (lambda path: path.unlink(), "changed while it was read")])
def test_a_checkpoint_that_changes_while_it_is_read(copied: Checkpoint, one, tmp_path: Path, two_slots, harm,
                                                    sentence: str) -> None:
    oracle, weights = one[1], copied.files[0]
    kept = weights.read_bytes()
    with pytest.raises(HarnessError, match=sentence):
        record(copied, [TEXT], tmp_path / "o", inside="all", progress=harm_at("decoder.01", lambda: harm(weights)))
    with pytest.raises(HarnessError, match="no whole case"):
        Oracle.open(tmp_path / "o")
    weights.write_bytes(kept)
    again = record(Checkpoint(copied.root), [TEXT], tmp_path / "o", inside="all")
    assert again.case("text").digest == oracle.case("text").digest


def test_nothing_is_kept_of_bytes_that_were_there_for_a_while(copied: Checkpoint, one, tmp_path: Path, two_slots) -> None:
    """The oracle has its identity already, so after the old bytes are back the parts that are there are taken over (those of the vision
    tower whatever the tokens were)."""
    record(copied, [TEXT], tmp_path / "o", inside="all")
    weights = copied.files[0]
    kept = weights.read_bytes()

    def harm() -> None:
        first = 8 + int.from_bytes(kept[:8], "little")  # behind the header
        with weights.open("r+b") as file:
            file.seek(first)
            file.write(bytes(len(kept) - first))

    with pytest.raises(HarnessError, match="changed while it was read"):
        record(copied, [IMAGE], tmp_path / "o", inside="all", drafts=drafts_of(one[1]), progress=harm_at("vision.00", harm))
    weights.write_bytes(kept)
    again = record(Checkpoint(copied.root), [IMAGE], tmp_path / "o", inside="all", drafts=drafts_of(one[1]))
    assert again.case("image").digest == one[1].case("image").digest


def test_a_call_that_is_refused_leaves_whole_cases_whole(one, tmp_path: Path) -> None:
    record(one[0], [TEXT], tmp_path / "o")
    with pytest.raises(HarnessError, match="too little"):
        record(one[0], [TEXT], tmp_path / "o", inside="all", memory=1 << 20)
    assert "text" in Oracle.open(tmp_path / "o").cases


def test_the_digest_is_computed_beside_the_first_pass(one, tmp_path: Path) -> None:
    checkpoint, waits, told = Checkpoint(one[0].root), threading.Event(), []
    compute = checkpoint._compute_digest

    def late(promise) -> None:
        waits.wait()
        compute(promise)

    def tell(what: str, done: int, total: int) -> None:
        told.append(what)
        if what == "pass 1: logits.000":
            assert not (tmp_path / "o" / "manifest.json").exists()
            waits.set()

    checkpoint._compute_digest = late
    assert record(checkpoint, CASES, tmp_path / "o", inside="all", progress=tell).digest == one[1].digest
    assert told[-1] == "done"


def test_reader_gives_the_tensors_and_their_rows(checkpoint: Checkpoint) -> None:
    with WeightReader(checkpoint) as reader:
        for name, tensor in checkpoint.tensors():
            target = torch.empty(tensor.shape)
            reader.fill(name, target)
            assert torch.equal(target, tensor.float())
        table = checkpoint.tensor(stages.EMBEDDING).float()
        assert torch.equal(reader.rows(stages.EMBEDDING, [5, 0, 511]), table[[5, 0, 511]])
        part = torch.empty(7, table.shape[1])
        reader.fill(stages.EMBEDDING, part, 9)
        assert torch.equal(part, table[9:16])
        with pytest.raises(HarnessError, match="no such tensor"):
            reader.fill("nothing", part)


def test_too_little_memory_names_the_least_that_works(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"--memory: 10 MiB are too little .* the least that works is \d") as refused:
        record(checkpoint, [IMAGE], tmp_path / "o", memory=10 << 20)
    least = parser().parse_args(["record", "--memory", refused.value.fix.split(" is ")[1].split(";")[0]]).memory
    said = []
    record(checkpoint, [IMAGE], tmp_path / "o", memory=least, say=said.append)
    assert len(said) == 1 and "the process and its libraries" in said[0] and f"of {gib(least)} allowed" in said[0]


def test_the_plan_takes_the_fastest_way_that_fits(checkpoint: Checkpoint, oracle: Oracle) -> None:
    held = stages.stages_of(stages.skeleton(checkpoint, "sdpa"), checkpoint.geometry, WeightReader(checkpoint).shapes())
    cases = [(oracle.case(name).inputs, 5) for name in oracle.cases]
    most = plan(checkpoint.geometry, held, cases, 1 << 40, True)
    assert most.keep and not plan(checkpoint.geometry, held, cases, most.total - 1, True).keep
    assert sum(4 * stage.elements for stage in held) == most.parts["all weights in float32"]


def test_a_draft_of_another_vocabulary_is_only_a_wrong_one(oracle: Oracle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = record(checkpoint, [TEXT], tmp_path / "o", inside="all", drafts={"text": [10**9] * 5, "other": [1]})
    assert found.case("text").digest == oracle.case("text").digest


def test_the_command_line_says_what_it_plans_and_how_often_it_read(checkpoint: Checkpoint, tmp_path: Path,
                                                                   capsys) -> None:
    (tmp_path / "cases.toml").write_text(
        '[[case]]\nname = "a"\nwhy = "w"\ndecode = 3\nturns = [{ role = "", text = "Hello" }]')
    (tmp_path / "d.json").write_text('{"a": [1, 2, 3]}')
    words = ["record", str(checkpoint.root), "--cases", str(tmp_path / "cases.toml"), "--draft", str(tmp_path / "d.json")]
    assert main([*words, "--out", str(tmp_path / "o"), "--memory", "2GiB"]) == 0
    out, err = capsys.readouterr()
    assert "passes over the weights" in out and "planned of 2.00 GiB allowed" in " ".join((out + err).split())
    assert main([*words, "--out", str(tmp_path / "p"), "--memory", "20MiB"]) == 2
    assert "the least that works is" in capsys.readouterr().err
