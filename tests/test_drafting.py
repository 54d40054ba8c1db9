"""Drafts of our own change how many passes are made and never a byte; whoever is killed goes on behind the last layer.

The same tests run under transformers 4.57 and 5.x.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import write_checkpoint
from recorded import CASES, DECODE, IMAGE, TEXT

from harness import drafts
from harness.cases import Case, Turn
from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.oracle import drafting, record, recording, stages
from harness.oracle.plan import Plan
from harness.store import Oracle
from harness.streaming.reading import WeightReader
from harness.streaming.weights import Streamed

FIRST, LATER = 10, 6
"""Stages of a first pass (4 blocks, 4 layers, norm, head) and of one that begins at the decoder."""


class Killed(Exception):
    pass


def killed_at(kind: str, steps: int, told: list[str] | None = None):
    def tell(what: str, done: int, total: int) -> None:
        nonlocal steps
        steps -= what.startswith(kind)
        if told is not None:
            told.append(what)
        if steps < 0:
            raise Killed

    return tell


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Checkpoint, Oracle]:
    found = Checkpoint(write_checkpoint(tmp_path_factory.mktemp("one"), seed=3, dtype="bfloat16"))
    return found, record(found, CASES, tmp_path_factory.mktemp("oracle") / "o", inside="all")


@pytest.fixture(autouse=True)
def two_slots(monkeypatch) -> None:
    """As if memory were short: two buffers for weights, in turn."""
    monkeypatch.setattr(recording, "plan", lambda *_: Plan({"weights": 1}, 1, 2, False))


@pytest.fixture
def undrafted(monkeypatch) -> None:
    """As on a processor without products of 16 bits."""
    monkeypatch.setattr(drafting, "why_not", lambda *_: "torch has none here")


@pytest.fixture
def drafted(monkeypatch) -> None:
    """As on a processor with fast products of 16 bits; torch computes them everywhere."""
    monkeypatch.setattr(drafting, "why_not", lambda *_: "")


def passes(oracle: Oracle) -> dict[str, int]:
    return {name: oracle.case(name).facts["passes"] for name in oracle.cases}


@pytest.mark.parametrize("dtype, tied", [("bfloat16", False), ("bfloat16", True), ("float16", False)])
def test_its_own_draft_saves_passes_and_changes_no_byte(tmp_path: Path, monkeypatch, dtype: str, tied: bool) -> None:
    checkpoint, said = Checkpoint(write_checkpoint(tmp_path / "m", seed=3, dtype=dtype, tied=tied)), []
    monkeypatch.setattr(drafting, "why_not", lambda *_: "torch has none here")
    slow = record(checkpoint, CASES, tmp_path / "slow", inside="all", say=said.append)
    assert said[1].startswith("no draft: torch has none here") and slow.case("text").facts["draft"] == "none"
    monkeypatch.setattr(drafting, "why_not", lambda *_: "")
    fast = record(checkpoint, CASES, tmp_path / "fast", inside="all")
    assert fast.digest == slow.digest and fast.case("text").facts["draft"] == "own"
    assert max(passes(fast).values()) <= 2 < min(passes(slow).values())


def test_a_wrong_token_is_guessed_again_from_there_on(one, tmp_path: Path, monkeypatch, drafted) -> None:
    checkpoint, oracle = one
    greedy, begun = drafting.greedy, []

    def lying(model, choose, inputs, tokens, count, *rest):
        begun.append(len(tokens))

        def wrong(last: torch.Tensor) -> int:
            found = choose(last)
            return (found + 1) % 400 if len(tokens) == 2 else found

        return greedy(model, wrong, inputs, tokens, count, *rest)

    monkeypatch.setattr(drafting, "greedy", lying)
    found = record(checkpoint, [TEXT], tmp_path / "o", inside="all")
    assert found.case("text").digest == oracle.case("text").digest
    assert begun == [0, 3] and passes(found) == {"text": 2}


@pytest.mark.parametrize("steps", [0, 1, 9, 11, 25])
def test_killed_while_it_drafts(one, tmp_path: Path, drafted, steps: int) -> None:
    checkpoint, oracle = one
    with pytest.raises(Killed):
        record(checkpoint, CASES, tmp_path / "o", inside="all", progress=killed_at("draft", steps))
    told: list[str] = []
    found = record(checkpoint, CASES, tmp_path / "o", inside="all", progress=killed_at("nothing", 0, told))
    assert found.digest == oracle.digest and {oracle.facts["draft"] for oracle in map(found.case, found.cases)} == {"own"}
    heads = sum(what == "draft: logits" for what in told)
    assert heads == DECODE - (0 if steps < FIRST - 1 else 1 if steps < FIRST + 5 else 3), "what was guessed is kept"


@pytest.mark.parametrize("turn, stage", [(0, 1), (0, 4), (1, 0), (1, 2), (1, 4), (2, 3), (2, 5)])
def test_killed_in_a_refining_pass_it_goes_on_behind_the_last_layer(one, tmp_path: Path, undrafted, turn: int,
                                                                    stage: int) -> None:
    checkpoint, oracle = one
    with pytest.raises(Killed):
        record(checkpoint, CASES, tmp_path / "o", inside="all",
               progress=killed_at("pass", FIRST + turn * LATER + stage))
    told: list[str] = []
    found = record(checkpoint, CASES, tmp_path / "o", inside="all", progress=killed_at("nothing", 0, told))
    assert found.digest == oracle.digest
    first = [what for what in told if what.startswith("pass 1")]
    rest = [f"pass 1: decoder.{layer:02d}" for layer in range(min(stage, 4), 4)]
    assert first == [*rest, "pass 1: norm", "pass 1: logits.000"]


def test_eight_cases_read_each_weight_once_a_pass(one, tmp_path: Path, monkeypatch, drafted) -> None:
    checkpoint, read = one[0], []
    into = WeightReader._read_into
    monkeypatch.setattr(WeightReader, "_read_into",
                        lambda reader, entry, offset, view: (read.append(len(view)), into(reader, entry, offset, view))[1])
    eight = [Case(f"c{number}", "w", (Turn("user", f"Number {number}.", f"noise:64x64:{number}"),), 3)
             for number in range(8)]
    first = record(checkpoint, eight, tmp_path / "first")
    guess = {name: first.case(name).rollout.tokens.tolist() for name in first.cases}
    sizes = []
    for cases in (eight[:1], eight):
        read.clear()
        assert set(passes(record(checkpoint, cases, tmp_path / str(len(cases)), drafts=guess)).values()) == {1}
        sizes.append(sum(read))
    rows = 2 * checkpoint.geometry.hidden * 32  # of the text table: those that a prompt asks for
    weights = sum(path.stat().st_size for path in checkpoint.files)
    assert sizes[0] <= sizes[1] <= sizes[0] + 8 * rows and sizes[1] <= weights + 8 * rows


def test_stored_values_without_widening(one) -> None:
    checkpoint = one[0]
    with WeightReader(checkpoint) as reader:
        held = stages.stages_of(stages.skeleton(checkpoint, "sdpa"), checkpoint.geometry, reader.shapes())
        source = Streamed(reader, torch.device("cpu"), 2, max(stage.elements for stage in held), False)
        assert drafting.stored_in(reader, held) == torch.bfloat16
        source.spare = 2 * held[5].elements + (1 << 12)
        narrow, again = source.narrow(torch.bfloat16, held[5:]), []
        for stage, tensors in [*narrow.stages(held), *narrow.stages(held)]:
            again += [tensors] if stage is held[5] else []
            assert len(narrow._kept) <= 2, "no more than there is room for"
        assert again[0] is again[1]
        for stage, tensors in narrow.stages(held):
            for place, tensor in zip(stage.places, tensors):
                stored = checkpoint.tensor(place.tensor)
                assert tensor.dtype == (torch.bfloat16 if stored.ndim > 1 else torch.float32)
                assert torch.equal(tensor, stored[slice(*stage.rows)] if stage.rows else stored.to(tensor.dtype))


def test_why_no_draft_is_made() -> None:
    cpu = torch.device("cpu")
    assert "stored in float32" in drafting.why_not(torch.float32, cpu)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        fast = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if name == 'bfloat16' else 'fp16'}_supported")()
        assert drafting.why_not(dtype, cpu) == ("" if fast else f"torch has no fast {name} products on this cpu")


def test_a_draft_that_is_given_wins(one, tmp_path: Path, drafted) -> None:
    checkpoint, oracle = one
    told: list[str] = []
    given = {"image": oracle.case("image").rollout.tokens.tolist()}
    found = record(checkpoint, [IMAGE], tmp_path / "o", inside="all", drafts=given, progress=killed_at("draft", 0, told))
    assert found.case("image").facts == oracle.case("image").facts | {"draft": "given", "passes": 1}


@pytest.mark.parametrize("text, found", [
    ('{"a": [1, 2]}', {"a": [1, 2]}),
    ('{"tokens": [{"case": "a", "steps": [{"engine": 4, "python": 5}, {"engine": null, "python": 6}, {"python": null}]}]}',
     {"a": [4, 6]})])
def test_drafts_are_read(tmp_path: Path, text: str, found: dict) -> None:
    (tmp_path / "d.json").write_text(text)
    assert drafts.read(tmp_path / "d.json") == found


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', '{"a": ["x"]}', '{"a": [-1]}', '{"a": [true]}', "{"])
def test_what_is_no_draft(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(HarnessError, match="d.json"):
        drafts.read(tmp_path / "d.json")
