"""Other people's conversions: a port and a bundle written without our modules are judged, passed and blamed rightly."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from random_models import write_checkpoint

from harness.bundle import VISION, Bundle
from harness.cases import load_cases
from harness.checkpoint import open_checkpoint
from harness.engines import Request
from harness.errors import HarnessError
from harness.gate import fold
from harness.localize import broken
from harness.options import Options
from harness.oracle import record
from harness.policy import load_policy
from harness.probes import planned
from harness.rungs import CHECKS, answers
from harness.subject import Subject
from harness.verdict import Outcome
from harness.zoom import localize

HERE = Path(__file__).resolve().parent / "third_party"
GRID = (8, 12)
LENIENT, STRICT = load_policy(HERE / "policy.toml"), load_policy()
TORCH_RUNGS = {"contract": None, "weights": ["graph"], "vision": None, "decoder": None, "decode": None}
PROBED = {seam for seam in planned(SimpleNamespace(layers=4, vision_layers=4, deepstack_taps=(0, 1, 2)))
          if not seam.startswith("calls.")}
LACKING = {"contract": {"graph.positions", *PROBED}, "weights": set(), "vision": {"vision.embed"},
           "decoder": {"decoder.embed", "decoder.norm"}, "decode": set()}


@pytest.fixture(scope="session")
def options(tmp_path_factory) -> Options:
    """A random checkpoint and its oracle; the tests change what is under test."""
    folder = tmp_path_factory.mktemp("third-party")
    root = write_checkpoint(folder / "checkpoint", seed=3)
    record(open_checkpoint(root), list(load_cases(HERE / "cases.toml")), folder / "oracle")
    return Options(checkpoint=str(root), graph="third_party.port:factory", oracle=folder / "oracle", grid=GRID,
                   cases=HERE / "cases.toml", bounds=HERE / "bounds.toml", policy=HERE / "policy.toml")


def climbed(subject, rungs=TORCH_RUNGS):
    """All verdicts of the rungs, in order."""
    return [verdict for rung, cases in rungs.items() for case in cases or CHECKS[rung].plan(subject)
            for verdict in answers(CHECKS[rung], subject, case)]


@pytest.fixture(scope="session")
def healthy(options):
    return climbed(Subject(options))


def seams(verdicts, outcome, rung=None):
    return {verdict.seam for verdict in verdicts if verdict.outcome is outcome and rung in (None, verdict.rung)}


def folded(verdicts, policy, rung):
    return next(row.outcome for row in fold(verdicts, policy).rungs if row.rung == rung)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_port_and_bundle_know_nothing_of_us():
    assert set(imports(HERE / "port.py")) == {"__future__", "json", "math", "pathlib", "torch", "safetensors"}
    assert not {"harness", "random_models"} & {*imports(HERE / "bundle.py"), *imports(HERE / "faulty.py")}


@pytest.mark.parametrize("rung", TORCH_RUNGS)
def test_a_healthy_port_passes(healthy, rung):
    mine = [verdict for verdict in healthy if verdict.rung == rung]
    wrong = [f"{verdict.id}: {verdict.reason}" for verdict in mine
             if verdict.outcome not in (Outcome.PASS, Outcome.SKIP)]
    assert not wrong and seams(mine, Outcome.PASS)
    assert folded(healthy, LENIENT, rung) is Outcome.PASS


@pytest.mark.parametrize("rung", TORCH_RUNGS)
def test_lacking_seams_are_named_and_only_a_policy_excuses_them(healthy, rung):
    assert seams(healthy, Outcome.SKIP, rung) == LACKING[rung]
    assert all("not offer" in verdict.reason for verdict in healthy if verdict.outcome is Outcome.SKIP)
    assert folded(healthy, STRICT, rung) is (Outcome.SKIP if LACKING[rung] else Outcome.PASS)


def test_both_ways_are_measured_where_a_port_takes_what_a_tap_returns(healthy):
    assert {tuple(verdict.figures) for verdict in healthy
            if verdict.rung in ("vision", "decoder") and verdict.outcome is Outcome.PASS} == {("local", "accumulated")}


def test_a_port_that_only_listens_is_judged_by_accumulated_error(options):
    subject = Subject(replace(options, graph="third_party.port:deaf"))
    verdicts = climbed(subject)
    assert not seams(verdicts, Outcome.FAIL) | seams(verdicts, Outcome.ERROR)
    assert {tuple(verdict.figures) for verdict in verdicts
            if verdict.rung in ("vision", "decoder") and verdict.outcome is Outcome.PASS} == {("accumulated",)}
    with pytest.raises(HarnessError, match="no local error"):
        subject.graph_trace("words", "local")


def test_a_promised_seam_that_never_comes_is_an_error_that_no_policy_excuses(options):
    verdicts = climbed(Subject(replace(options, graph="third_party.faulty:silent")), {"decoder": None})
    assert seams(verdicts, Outcome.ERROR) == {"decoder.norm"}
    assert folded(verdicts, LENIENT, "decoder") is Outcome.ERROR


FAULTS = {
    "swapped": {("decoder", "decoder.layers.00"), ("decode", "kv.keys.00")},
    "late": {("contract", "deepstack.0"), ("decoder", "decoder.layers.00.deepstack"), ("decode", "kv.keys.01")},
    "stale": {("weights", "model.language_model.layers.2.self_attn.k_proj.weight"),
              ("decoder", "decoder.layers.02"), ("decode", "kv.keys.02")}}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_blamed_on_the_first_seam_it_touches(options, fault):
    verdicts = climbed(Subject(replace(options, graph=f"third_party.faulty:{fault}")))
    assert {(verdict.rung, verdict.seam) for verdict in broken(verdicts)} == FAULTS[fault]
    assert not seams(verdicts, Outcome.ERROR)
    assert folded(verdicts, LENIENT, "decoder") is Outcome.FAIL and folded(verdicts, LENIENT, "vision") is Outcome.PASS


def test_image_faults_leave_text_alone_and_a_stale_row_is_named(options):
    for fault in ("swapped", "late"):
        verdicts = climbed(Subject(replace(options, graph=f"third_party.faulty:{fault}")))
        assert {verdict.case for verdict in verdicts if verdict.outcome is Outcome.FAIL} == {"picture"}
    verdicts = climbed(Subject(replace(options, graph="third_party.faulty:stale")), {"weights": ["graph"]})
    assert [verdict.reason for verdict in verdicts if verdict.outcome is Outcome.FAIL] == [
        "64 of 4096 values differ, the first at [5, 0]; rows [5]"]


def test_a_port_without_inner_seams_is_localized_to_the_layer(options):
    subject = Subject(replace(options, graph="third_party.faulty:stale"))
    row = next(row for row in localize(subject, climbed(subject, {"decoder": None})))
    assert (row["seam"], row["block"], row["op"]) == ("decoder.layers.02", "decoder layer 2", None)
    assert not row["inherited"] and "--graph third_party.faulty:stale" in row["reproduce"]


# The foreign bundle, on the real runtime.

BUNDLE_RUNGS = {"engine": None, "tokens": None}
PUTS_OUT = {"logits", "vision.merger", *(f"vision.deepstack.{tap}" for tap in range(3)),
            *(f"kv.{part}.{layer:02d}" for part in ("keys", "values") for layer in range(4))}


@pytest.fixture(scope="session")
def shipped(options, tmp_path_factory):
    """A healthy int8 bundle, its vision bundle, and an fp16 bundle of the port with the stale row."""
    for package in ("coreai_torch", "coreai_opt", "coreai.runtime"):
        pytest.importorskip(package)
    from third_party.bundle import ship_decoder, ship_vision
    from third_party.faulty import stale
    from third_party.port import factory

    folder, root = tmp_path_factory.mktemp("shipped"), Path(options.checkpoint)
    port = factory(root, GRID)
    return {"vision": ship_vision(port, folder / "acme_vl_vision"),
            "healthy": ship_decoder(port, root, folder / "acme_vl_decode", "int8hu"),
            "stale": ship_decoder(stale(root, GRID), root, folder / "acme_vl_stale", "fp16")}


def judged(options, shipped, name):
    return Subject(replace(options, bundle=shipped[name], vision_bundle=shipped["vision"]))


@pytest.fixture(scope="session")
def on_engine(options, shipped):
    return judged(options, shipped, "healthy")


@pytest.fixture(scope="session")
def engine_verdicts(on_engine):
    return climbed(on_engine, BUNDLE_RUNGS)


def test_its_metadata_is_read_and_validated(shipped):
    bundle = Bundle.open(shipped["healthy"])
    assert (bundle.kind, bundle.mode, bundle.vocab_size, bundle.max_context_length) == ("llm", "int8hu", 512, 64)
    assert bundle.unknown_keys == ("x_acme_build",) and bundle.tokenizer.is_dir()
    assert Bundle.open(shipped["vision"], VISION).asset.name == "acme_vl_vision.aimodel"
    assert not list(shipped["healthy"].parent.glob("*.seams.json"))
    with pytest.raises(HarnessError, match="kind is 'vision'"):
        Bundle.open(shipped["vision"])


def test_its_shapes_are_read_from_the_asset(on_engine, engine_verdicts):
    facts = on_engine.shipped.engine.facts
    assert {key: facts[key] for key in ("vocab", "context", "layers", "slots", "dtype", "dynamic")} == {
        "vocab": 512, "context": 64, "layers": 4, "slots": 24, "dtype": "float16", "dynamic": False}


def test_logits_cache_and_tokens_are_the_twins(engine_verdicts):
    wrong = [f"{verdict.id}: {verdict.reason}" for verdict in engine_verdicts
             if verdict.outcome not in (Outcome.PASS, Outcome.SKIP)]
    assert not wrong
    assert seams(engine_verdicts, Outcome.PASS, "engine") == PUTS_OUT
    assert [verdict.seam for verdict in engine_verdicts if verdict.rung == "tokens"] == ["tokens", "tokens"]
    assert all(folded(engine_verdicts, LENIENT, rung) is Outcome.PASS for rung in BUNDLE_RUNGS)


def test_inner_seams_are_skipped_by_name(engine_verdicts):
    skipped = seams(engine_verdicts, Outcome.SKIP)
    assert {"vision.layers.03", "decoder.embed", "decoder.layers.00", "decoder.layers.02.deepstack",
            "decoder.norm"} < skipped
    assert not skipped & PUTS_OUT
    assert all("no seam index" in verdict.reason for verdict in engine_verdicts if verdict.outcome is Outcome.SKIP)
    assert folded(engine_verdicts, STRICT, "engine") is Outcome.SKIP


def test_a_stale_row_inside_a_foreign_bundle_goes_red(options, shipped):
    verdicts = climbed(judged(options, shipped, "stale"), {"engine": None})
    assert [(verdict.case, verdict.seam) for verdict in broken(verdicts)] == [("picture", "kv.keys.02"),
                                                                              ("words", "kv.keys.02")]
    assert not {"kv.keys.01", "kv.values.01"} & seams(verdicts, Outcome.FAIL)
    assert folded(verdicts, LENIENT, "engine") is Outcome.FAIL


def test_replay_of_a_foreign_bundle_is_the_runtime_bit_for_bit(on_engine, options, shipped):
    """Its program is written otherwise than ours: fused matrices, other views, tables instead of formulas."""
    replayed = Subject(replace(options, bundle=shipped["healthy"], vision_bundle=shipped["vision"],
                               engine="replay:coreai-cpu"))
    for case in on_engine.engine_cases():
        apple, ours = on_engine.engine_trace(case), replayed.engine_trace(case)
        assert {"logits", "kv.keys", "kv.values"} <= set(apple) <= set(ours)
        assert [seam for seam in apple if not np.array_equal(apple[seam], ours[seam])] == []
    # It writes all layers of its cache at once, behind the last: an order that cannot be turned is not turned.
    assert replayed.shipped.engine.facts["order"].startswith("steps: main: operations")
    assert replayed.shipped.engine.name == "replay-coreai-cpu"


def test_weights_fused_inside_a_foreign_bundle_are_found_and_a_stale_row_is_named(options, shipped):
    def decoder_rows(name):
        return [verdict for verdict in climbed(judged(options, shipped, name), {"weights": ["bundle"]})
                if verdict.seam.startswith(("model.language_model.", "lm_head."))]

    healthy, wrong = decoder_rows("healthy"), decoder_rows("stale")
    assert len(healthy) == 2 + 1 + 11 * 4 and {verdict.outcome for verdict in healthy} == {Outcome.PASS}
    red = [verdict for verdict in wrong if verdict.outcome is not Outcome.PASS]
    assert [verdict.seam for verdict in red] == ["model.language_model.layers.2.self_attn.k_proj.weight"]
    assert red[0].outcome is Outcome.FAIL and list(red[0].figures["rows"]) == [5]


def test_a_bundle_of_another_geometry_or_contract_is_refused(on_engine, shipped):
    from harness.engines.coreai import CoreAIEngine

    request = Request(on_engine.recorded("words").inputs)
    assets = {name: Bundle.open(path, VISION if name == "vision" else "llm").asset for name, path in shipped.items()}
    deeper = replace(on_engine.geometry, layers=5)
    with pytest.raises(HarnessError, match="has 4 layers and vocabulary 512, the checkpoint 5 and 512"):
        list(CoreAIEngine(assets["healthy"], geometry=deeper, grid=GRID).run([request]))
    with pytest.raises(HarnessError, match=r"its inputs are patches float16\[96, 1536\]; the contract asks for input"):
        list(CoreAIEngine(assets["vision"], geometry=on_engine.geometry, grid=GRID).run([request]))
