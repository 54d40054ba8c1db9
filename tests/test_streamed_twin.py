"""The twin without its weights in memory: the same bits, the same tokens, and the same verdicts at every rung."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CASES
from random_models import write_checkpoint

from harness.cases import Case, load_cases
from harness.checkpoint import Checkpoint
from harness.engines import Request
from harness.engines.torch_graph import TorchGraph
from harness.errors import HarnessError
from harness.exhibits import heat_rows
from harness.graph import reference
from harness.graph.quantize import RECIPES
from harness.graph.streamed import StreamedReference
from harness.graph.twin import TwinReader, twin
from harness.ladder import NAMES
from harness.options import Options
from harness.oracle import freeze, record
from harness.rungs import CHECKS, climb
from harness.streaming import sweep
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

GRID, CONTEXT = (8, 10), 96


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def made(request, tmp_path_factory) -> tuple[Checkpoint, list[Case]]:
    """A checkpoint and its cases."""
    root = tmp_path_factory.mktemp("made")
    (root / "cases.toml").write_text(CASES)
    checkpoint = Checkpoint(write_checkpoint(root / "m", layers=3, tied=request.param, dtype="bfloat16"))
    return checkpoint, load_cases(root / "cases.toml")


def both(checkpoint: Checkpoint, mode: str, monkeypatch) -> tuple[reference.Reference, StreamedReference]:
    whole = twin(checkpoint, RECIPES[mode], GRID)
    monkeypatch.setattr(reference, "LARGE", 0)
    streamed = twin(checkpoint, RECIPES[mode], GRID)
    assert not whole.streams and streamed.streams
    return whole, streamed


@pytest.mark.parametrize("mode", RECIPES)
def test_the_same_bits_as_in_memory(made, mode: str, monkeypatch) -> None:
    checkpoint, cases = made
    whole, streamed = both(checkpoint, mode, monkeypatch)
    assert streamed.geometry.tied == (checkpoint.geometry.tied and mode != "int8hu")
    held = streamed.tensors()
    assert set(held) == set(whole.tensors())
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in whole.tensors().items())
    for case in cases:
        request = Request(freeze(case, checkpoint), forced=(3, 4, 5, 6), seams=frozenset(whole.seams()), kv=True)
        expected, found = (TorchGraph(graph, checkpoint.geometry).verified(request) for graph in (whole, streamed))
        assert set(found) == set(expected) and found.facts["tokens"] == expected.facts["tokens"]
        assert all(np.array_equal(found[seam], expected[seam]) for seam in expected)


def test_rows_are_quantized_as_the_whole_tensor_is(made) -> None:
    checkpoint, _ = made
    recipe, head = RECIPES["int8hu"], "lm_head.weight"
    reader, whole = TwinReader(checkpoint, recipe), twin(checkpoint, recipe, GRID).tensors()[head].float()
    for first, count in ((0, 1), (100, 37), (500, 12)):
        rows = torch.empty(count, whole.shape[1])
        reader.fill(head, rows, first)
        assert torch.equal(rows, whole[first:first + count])


def test_a_width_that_no_block_divides_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reference, "LARGE", 0)
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "m", layers=3, intermediate_size=90))
    with pytest.raises(HarnessError, match="90 input features are no multiple of the block 32"):
        twin(checkpoint, RECIPES["int8hu"], GRID)


@pytest.mark.parametrize("right", [0, 2, 4])
def test_a_draft_gives_the_tokens_of_single_steps(made, right: int) -> None:
    """However many tokens of the draft are right; behind the first wrong one, what the rows choose is the next draft."""
    checkpoint, cases = made
    engine = TorchGraph(twin(checkpoint, RECIPES["int8hu"], GRID), checkpoint.geometry)
    for case in cases:
        inputs = freeze(case, checkpoint)
        stepped = next(engine.run([Request(inputs, free=4)])).facts["tokens"]
        draft = [*stepped[:right], *((token + 7) % 400 for token in stepped[right:])]
        trace = engine.verified(Request(inputs, forced=tuple(draft)))
        assert trace.facts["tokens"] == stepped
        assert np.array_equal(trace["logits"], next(engine.run([Request(inputs, forced=tuple(draft))]))["logits"])


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Options:
    """A bundle of a tied checkpoint, whose quantized head is a tensor of its own, on replay."""
    pytest.importorskip("coreai_torch")
    from harness.export import export

    root = tmp_path_factory.mktemp("shipped")
    (root / "cases.toml").write_text(CASES)
    checkpoint = Checkpoint(write_checkpoint(root / "m", layers=3, tied=True, dtype="bfloat16"))
    oracle = record(checkpoint, load_cases(root / "cases.toml"), root / "o")
    bundles = export(checkpoint, root / "out", "int8hu", grid=GRID, context=CONTEXT)
    return Options(checkpoint=str(checkpoint.root), oracle=oracle.path, cases=root / "cases.toml", bundle=bundles.decoder,
                   vision_bundle=bundles.vision, grid=GRID, context=CONTEXT, engine="replay:fp16", work=root / "work")


def climbed(options: Options) -> tuple[Subject, list[Verdict], list]:
    subject = Subject(options)
    try:
        subject.start_engine()
        verdicts = [verdict for *_, found in climb(subject, NAMES) for verdict in found]
        return subject, verdicts, [row for case in subject.cases for row in heat_rows(subject, case)]
    finally:
        subject.close()


def test_all_rungs_say_the_same(shipped: Options, monkeypatch) -> None:
    _, kept, heat = climbed(shipped)
    monkeypatch.setattr(reference, "LARGE", 0)
    subject, streamed, streamed_heat = climbed(shipped)
    assert {verdict.rung for verdict in kept} == set(NAMES) and subject.twin_streams()
    differ = [(left, right) for left, right in zip(kept, streamed, strict=True) if left != right]
    assert not differ, differ[:3]
    counted = [verdict for verdict in kept if verdict.outcome is Outcome.PASS]
    assert len(counted) > 0.5 * len(kept) and {verdict.rung for verdict in counted} >= {"engine", "tokens", "headroom"}
    for way in ("accumulated", "engine"):
        assert [row for row in streamed_heat if row["way"] == way] == \
            [row for row in heat if row["way"] == way and row["part"] == "decoder"]


def test_the_rungs_of_the_twin_read_the_weights_as_often_as_they_must(shipped: Options, monkeypatch) -> None:
    """Once on the oracle's tokens, once more for each wrong token that follows, and once on the twin's own."""
    monkeypatch.setattr(reference, "LARGE", 0)
    passes, run = [], sweep.sweep
    monkeypatch.setattr("harness.graph.streamed.sweep", lambda *given: passes.append(run(*given)) or passes[-1])
    subject = Subject(shipped)
    try:
        for rung in ("quantized", "engine", "tokens", "headroom"):
            for case in CHECKS[rung].plan(subject):
                CHECKS[rung].measure(subject, case)
        tokens = max(len(subject.oracle_tokens(case)) for case in subject.cases)
        same = all(subject.twin_tokens(case) == subject.oracle_tokens(case) for case in subject.cases)
        assert len(passes) == 2 and passes[1] == 1 and (passes[0] == 1 if same else 1 < passes[0] <= tokens)
    finally:
        subject.close()
