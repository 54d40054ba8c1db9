"""Our graph without its weights in memory: the same bits, the same verdicts, each weight read once for all cases."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CASES
from random_models import write_checkpoint
from safetensors.torch import load_file, save_file

from harness.benign import VARIATIONS
from harness.cases import load_cases
from harness.checkpoint import Checkpoint
from harness.cli import main
from harness.engines import Request
from harness.engines.torch_graph import TorchGraph
from harness.errors import HarnessError
from harness.graph import reference
from harness.graph.streamed import StreamedReference, together
from harness.options import Options
from harness.oracle import record
from harness.rungs import CHECKS, answers
from harness.store import Oracle
from harness.streaming import room, sweep
from harness.streaming.reading import WeightReader
from harness.subject import Subject
from harness.verdict import Outcome


GRID = (8, 10)
"""What 96 x 64 pixels are enlarged to, in patches."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def made(request, tmp_path_factory) -> tuple[Checkpoint, Oracle]:
    root = tmp_path_factory.mktemp("made")
    (root / "cases.toml").write_text(CASES)
    checkpoint = Checkpoint(write_checkpoint(root / "m", layers=3, tied=request.param, dtype="bfloat16"))
    return checkpoint, record(checkpoint, load_cases(root / "cases.toml"), root / "o")


def request_of(oracle: Oracle, case: str, seams: frozenset[str] = frozenset(), free: int = 0) -> Request:
    recorded = oracle.case(case)
    return Request(recorded.inputs, forced=tuple(map(int, recorded.rollout.tokens)), seams=seams, free=free, kv=True)


@pytest.mark.parametrize("settings", [{}, {"stepwise": True}, {"chunk": 7}])
def test_the_same_bits_as_in_memory(made, settings: dict) -> None:
    checkpoint, oracle = made
    whole = reference.factory(checkpoint.root, GRID)
    streamed = StreamedReference(checkpoint, GRID)
    assert set(streamed.seams()) == set(whole.seams()) and streamed.slots == whole.slots
    for case in oracle.cases:
        request = request_of(oracle, case, frozenset(whole.seams()), free=2)
        expected, found = (next(TorchGraph(graph, checkpoint.geometry, **settings).run([request]))
                           for graph in (whole, streamed))
        assert set(found) == set(expected) and found.facts["tokens"] == expected.facts["tokens"]
        assert all(np.array_equal(found[seam], expected[seam]) for seam in expected)
    held = streamed.tensors()
    assert set(held) == set(whole.tensors()) and len(held) == len(set(held))
    assert all(torch.equal(held[name], tensor) for name, tensor in whole.tensors().items())


@pytest.mark.parametrize("name", VARIATIONS)
def test_healthy_variations_stream_too(made, name: str) -> None:
    checkpoint, oracle = made
    whole = reference.Reference(checkpoint.geometry, GRID, {name: value.float() for name, value in checkpoint.tensors()})
    VARIATIONS[name](whole)
    streamed = StreamedReference(checkpoint, GRID, vary=VARIATIONS[name])
    request = request_of(oracle, "picture", frozenset(whole.seams()))
    expected, found = (next(TorchGraph(graph, checkpoint.geometry).run([request])) for graph in (whole, streamed))
    assert all(np.array_equal(found[seam], expected[seam]) for seam in expected)


def test_each_weight_is_read_once_for_all(made, monkeypatch) -> None:
    checkpoint, oracle = made
    models = [StreamedReference(checkpoint, grid) for grid in (GRID, (8, 4))]
    read = []
    fill = WeightReader.fill
    monkeypatch.setattr(WeightReader, "fill", lambda self, name, target, first=0: (
        read.append((name, first)), fill(self, name, target, first))[1])
    calls = [lambda case=case: next(TorchGraph(models[0], checkpoint.geometry).run([request_of(oracle, case)]))
             for case in [*oracle.cases, *oracle.cases]]
    traces = together(models, calls)
    layers = [name for name, _ in read if ".layers." in name or ".blocks." in name or "merger" in name]
    assert len(layers) == len(set(layers)) and len(traces) == 4
    for trace, case in zip(traces, [*oracle.cases, *oracle.cases]):
        alone = next(TorchGraph(models[0], checkpoint.geometry).run([request_of(oracle, case)]))
        assert np.array_equal(trace["logits"], alone["logits"]) and np.array_equal(trace["kv.keys"], alone["kv.keys"])


def test_logits_are_filled_a_few_forwards_at_a_time(made, monkeypatch) -> None:
    checkpoint, oracle = made
    model = StreamedReference(checkpoint, GRID)
    calls = [lambda case=case: next(TorchGraph(model, checkpoint.geometry).run([request_of(oracle, case)]))
             for case in oracle.cases]
    expected = together([model], calls)
    monkeypatch.setattr(room, "LOGITS_BYTES", 1)
    assert all(np.array_equal(left["logits"], right["logits"]) for left, right in zip(expected, together([model], calls)))


def test_the_verdicts_are_those_of_the_graph_in_memory(made, monkeypatch, tmp_path: Path) -> None:
    checkpoint, oracle = made
    (tmp_path / "cases.toml").write_text(CASES)

    def climbed(large: int) -> list:
        monkeypatch.setattr(reference, "LARGE", large)
        subject = Subject(Options(checkpoint=str(checkpoint.root), oracle=oracle.path, cases=tmp_path / "cases.toml"))
        return [verdict for rung in ("contract", "vision", "decoder", "decode") for case in CHECKS[rung].plan(subject)
                for verdict in answers(CHECKS[rung], subject, case)]

    kept, streamed = climbed(1 << 60), climbed(0)
    assert kept == streamed and {verdict.rung for verdict in kept} == {"contract", "vision", "decoder", "decode"}
    assert sum(verdict.outcome is Outcome.PASS for verdict in kept) > 0.8 * len(kept)


def test_fewer_calls_go_together_where_memory_is_short(made, tmp_path: Path, monkeypatch) -> None:
    checkpoint, _ = made
    stages, loads = StreamedReference(checkpoint, GRID).stages, [room.Load(100 << 20, 50 << 20, 10 << 20)] * 5
    monkeypatch.setattr(room, "resident", lambda: 1 << 30)
    plenty, short = (room.plan_sweeps(stages, loads, memory) for memory in (4 << 30, (1 << 30) + (570 << 20)))
    assert plenty.groups == ((0, 1, 2, 3, 4),) and plenty.slots == 2 and plenty.total <= 4 << 30
    assert short.groups == ((0, 1, 2), (3, 4)) and short.total <= short.memory
    assert "2 sweeps over the weights" in short.describe("decoding")
    with pytest.raises(HarnessError, match="too little for one call") as refused:
        room.plan_sweeps(stages, loads, 1 << 30)
    least = int(float(re.search(r"least that works is ([\d.]+) GiB", str(refused.value))[1]) * 2**30)
    assert room.plan_sweeps(stages, loads, least).groups == ((0,), (1,), (2,), (3,), (4,))


def test_a_call_that_fails_ends_the_others(made) -> None:
    checkpoint, oracle = made
    model = StreamedReference(checkpoint, GRID)
    engine = TorchGraph(model, checkpoint.geometry)

    def broken():
        next(engine.run([request_of(oracle, "words")]))
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        together([model], [broken, lambda: next(engine.run([request_of(oracle, "picture")]))])
    assert next(engine.run([request_of(oracle, "words")]))["logits"].any(), "the model is fit for use again"


@pytest.mark.parametrize("change, sentence", [
    (lambda weights: weights.pop("model.language_model.layers.1.mlp.up_proj.weight"), "missing from the checkpoint"),
    (lambda weights: weights.update({"model.language_model.extra.weight": torch.ones(2)}), "no place in the graph"),
    (lambda weights: weights.update({"model.language_model.norm.weight": torch.ones(3)}), "has shape")])
def test_it_is_as_strict_as_the_graph_in_memory(tmp_path: Path, change, sentence: str) -> None:
    root = write_checkpoint(tmp_path / "m", layers=3)
    weights = load_file(root / "model.safetensors")
    change(weights)
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HarnessError, match=sentence):
        StreamedReference(Checkpoint(root), GRID)


def test_steps_of_all_cases_are_taken_together(made, monkeypatch, tmp_path: Path) -> None:
    checkpoint, oracle = made
    (tmp_path / "cases.toml").write_text(CASES)
    monkeypatch.setattr(reference, "LARGE", 0)
    subject = Subject(Options(checkpoint=str(checkpoint.root), oracle=oracle.path, cases=tmp_path / "cases.toml"))
    passes = []
    run = sweep.sweep
    monkeypatch.setattr("harness.graph.streamed.sweep", lambda *given: passes.append(run(*given)) or passes[-1])
    for rung in ("vision", "decoder", "decode"):
        for case in CHECKS[rung].plan(subject):
            answers(CHECKS[rung], subject, case)
    assert passes == [1, 1], "both towers in one pass, and in one the prompt and four tokens, one a call"


def test_what_is_planned_and_what_was_held_is_told(made, monkeypatch, tmp_path: Path, capfd) -> None:
    checkpoint, oracle = made
    (tmp_path / "cases.toml").write_text(CASES)
    monkeypatch.setattr(reference, "LARGE", 0)
    given = ["ladder", str(checkpoint.root), "--cases", str(tmp_path / "cases.toml"), "--oracle", str(oracle.path),
             "--rung", "decoder", "--memory", "3GiB", "--out", str(tmp_path / "out")]
    main(given)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("memory: ")]
    assert len(told) == 2 and "planned of 3.00 GiB allowed, 1 sweep over the weights" in told[0]
    assert "held at most of 3.00 GiB allowed" in told[1]
    assert main([*given[:-4], "--memory", "100MiB", *given[-2:]]) == 3
    assert "100 MiB are too little for one call of this model" in " ".join(capfd.readouterr().out.split())
