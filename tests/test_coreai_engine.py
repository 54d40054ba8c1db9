"""The Core AI engine: it computes what the exported graph computes, and survives what kills the runtime."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from small_bundle import CONTEXT, Small, small_bundle

from harness.cases import FrozenInputs
from harness.engines import Request
from harness.engines.coreai import CoreAIEngine, write_index
from harness.engines.coreai_locate import NEAR, locate_for
from harness.errors import HarnessError, Undecided
from harness.trace import decoder_seams, vision_seams

pytest.importorskip("coreai")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="written for the Linux runtime")


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bundle()


def damaged(asset: Path, target: Path, *, rehash: bool) -> Path:
    shutil.copytree(asset, target)
    program = target / "main.mlirb"
    program.write_bytes(program.read_bytes()[:5000])
    if rehash:
        (target / "main.hash").write_bytes(hashlib.sha256(program.read_bytes()).digest())
    return target


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))


def test_equals_the_twin_at_every_seam(small: Small) -> None:
    request = Request(small.image_case(), forced=(3, 4), free=3, kv=True, seams=small.twin.seams())
    engine = small.engine()
    got, want = next(engine.run([request])), next(small.twin.run([request]))
    geometry = small.checkpoint.geometry
    assert {*vision_seams(geometry), *decoder_seams(geometry), "kv.keys", "kv.values"} <= set(got)
    assert got["logits"].shape == (12 + 2 + 3, geometry.vocab)
    assert got["kv.keys"].shape == (3, 2, 17, 32)
    assert got["decoder.layers.01"].shape == (14, 64)
    assert got["decoder.layers.01.attn.q_rope"].shape == (14, 4, 32)
    for seam in got:
        assert got[seam].shape == want[seam].shape, seam
        assert got[seam].dtype == np.float32, seam
        assert relative(got[seam], want[seam]) < 1e-5, seam
    assert got.facts["tokens"] == want.facts["tokens"]
    assert got.facts["unread"] == {}
    assert engine.seams() >= set(got) - {"kv.keys", "kv.values"}


def test_facts_for_the_speed_row(small: Small) -> None:
    engine = small.engine()
    facts = next(engine.run([Request(small.image_case(), free=2)])).facts
    assert facts["engine"] == engine.name == "coreai-cpu-linux"
    for name in ("import_s", "cold_load_s", "warm_load_s", "vision_s", "prefill_tok_s", "decode_tok_s",
                 "peak_rss_bytes", "asset_bytes", "vision_asset_bytes"):
        assert facts[name] > 0, name
    assert (facts["runtime"].startswith("coreai-core"), facts["platform"], facts["compute_unit"]) == (
        True, "Linux x86_64", "cpu")
    assert facts["inner_seams"] == 0
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("reuse_state", [False, True])
def test_nothing_of_one_request_is_left_for_the_next(small: Small, reuse_state: bool) -> None:
    text, image = Request(small.text_case(), free=3, kv=True), Request(small.image_case(), free=2)
    alone = next(small.engine().run([text]))
    *_, after = small.engine(reuse_state=reuse_state).run([image, text])
    assert all(np.array_equal(alone[seam], after[seam]) for seam in alone)
    assert alone.facts["tokens"] == after.facts["tokens"]


def test_equal_images_are_encoded_once(small: Small) -> None:
    first, second, other = (Request(small.image_case(seed), seams=frozenset({"vision.merger"})) for seed in (0, 0, 1))
    traces = list(small.engine().run([first, second, other]))
    assert [trace.facts["vision_s"] > 0 for trace in traces] == [True, False, True]
    assert np.array_equal(traces[0]["vision.merger"], traces[1]["vision.merger"])
    assert not np.array_equal(traces[0]["vision.merger"], traces[2]["vision.merger"])


def test_embeds_given_instead_of_a_vision_asset(small: Small) -> None:
    request = Request(small.image_case(), seams=small.twin.seams())
    want = next(small.twin.run([request]))
    embeds = want["vision.merger"], np.concatenate([want[f"vision.deepstack.{tap}"] for tap in range(3)])
    engine = CoreAIEngine(small.decoder, geometry=small.checkpoint.geometry, grid=(4, 6), embeds=lambda inputs: embeds)
    got = next(engine.run([request]))
    assert set(got) == {"logits"} == engine.seams()
    assert relative(got["logits"], want["logits"]) < 1e-5


def test_dynamic_asset_prefills_in_one_call(small: Small) -> None:
    request = Request(small.image_case(), forced=(3,), free=2, kv=True)
    want = next(small.twin.run([request]))
    for chunk, calls in ((None, 1), (5, 3)):
        got = next(small.engine(small.dynamic, chunk=chunk).run([request]))
        assert got.facts["calls"] == calls + 1 + 2
        assert all(relative(got[seam], want[seam]) < 1e-5 for seam in ("logits", "kv.keys", "kv.values"))


@pytest.mark.parametrize("kind", ["decoder", "dynamic"])
def test_seams_are_found_by_value_alone(small: Small, kind: str, tmp_path: Path) -> None:
    asset = getattr(small, kind)
    request = Request(small.image_case(), forced=(3, 4), seams=small.twin.seams())
    want = next(small.twin.run([request]))
    blind = small.engine(asset)
    write_index(tmp_path / "index.json", locate_for(blind, request, want))
    seeing = small.engine(asset, seam_index=tmp_path / "index.json")
    lacking = small.twin.seams() - seeing.seams() - {"decoder.positions"}
    assert not lacking
    got = next(seeing.run([request]))
    assert all(relative(got[seam], want[seam]) < 1e-5 < NEAR for seam in got)


def test_an_index_of_another_program_offers_nothing(small: Small, tmp_path: Path) -> None:
    table = json.loads(small.seams.read_text())
    table["decoder"]["program"] = "0" * 64
    (tmp_path / "index.json").write_text(json.dumps(table))
    seams = small.engine(seam_index=tmp_path / "index.json").seams()
    assert "logits" in seams and not any(seam.startswith("decoder.layers") for seam in seams)


def test_a_wrong_index_loses_its_seam_and_nothing_else(small: Small, tmp_path: Path) -> None:
    entries = {"decoder.layers.00": {"id": 10**6, "row": [64]}, "decoder.layers.01": {"id": 3, "row": [64]}}
    write_index(tmp_path / "index.json", {"decoder": (small.decoder, entries)})
    request = Request(small.text_case(), seams=frozenset(entries))
    got = next(small.engine(seam_index=tmp_path / "index.json").run([request]))
    assert set(got) == {"logits"}
    assert set(got.facts["unread"]) == set(entries)


def bad_requests(small: Small) -> dict[str, Request]:
    image = small.image_case()
    vocab = small.checkpoint.geometry.vocab
    cut = FrozenInputs("cut", image.ids, image.positions, image.patches[:-1], image.grid)
    grid = FrozenInputs("grid", image.ids, image.positions, image.patches, (1, 6, 4))
    high = FrozenInputs("high", np.array([1, vocab], np.int32), np.zeros((3, 2), np.int32))
    long = Request(small.text_case(40), forced=(1,) * 4, free=5)
    return {"context is 48": long, "empty": Request(small.text_case(0)), "patches have shape": Request(cut),
            "made for": Request(grid), "outside the vocabulary": Request(high)}


@pytest.mark.parametrize("sentence", ["context is 48", "empty", "patches have shape", "made for",
                                      "outside the vocabulary"])
def test_bad_requests_are_refused_before_anything_starts(small: Small, sentence: str, tmp_path: Path) -> None:
    request = bad_requests(small)[sentence]
    with pytest.raises(HarnessError, match=sentence) as caught:
        list(small.engine(tmp=tmp_path / "never made").run([request]))
    assert not isinstance(caught.value, Undecided)


def test_context_is_read_from_the_asset_too(small: Small) -> None:
    with pytest.raises(HarnessError, match=f"needs 49 tokens, its cache has {CONTEXT} slots"):
        list(small.engine(context=None).run([Request(small.text_case(40), free=9)]))


def test_image_without_vision_asset(small: Small) -> None:
    engine = CoreAIEngine(small.decoder, geometry=small.checkpoint.geometry, grid=(4, 6))
    with pytest.raises(HarnessError, match="no vision asset"):
        engine.check(Request(small.image_case()))


def test_missing_and_damaged_assets(small: Small, tmp_path: Path) -> None:
    for asset in (tmp_path / "none.aimodel", damaged(small.decoder, tmp_path / "a.aimodel", rehash=False)):
        engine = CoreAIEngine(asset, geometry=small.checkpoint.geometry)
        with pytest.raises(HarnessError) as caught:
            next(engine.run([Request(small.text_case())]))
        assert not isinstance(caught.value, Undecided)


def test_a_program_that_aborts_the_runtime(small: Small, tmp_path: Path) -> None:
    asset = damaged(small.decoder, tmp_path / "b.aimodel", rehash=True)
    private = tmp_path / "private"
    private.mkdir()
    engine = CoreAIEngine(asset, geometry=small.checkpoint.geometry, tmp=private)
    with pytest.raises(Undecided, match="SIGABRT") as caught:
        next(engine.run([Request(small.text_case())]))
    assert "\n" not in str(caught.value) and "b.aimodel" in str(caught.value)
    assert not list(private.iterdir())


def test_an_asset_of_another_contract_is_named(small: Small) -> None:
    engine = CoreAIEngine(small.vision, geometry=small.checkpoint.geometry)
    with pytest.raises(HarnessError, match=r"inputs are patches float32\[24, 1536\]; the contract asks for input_ids"):
        next(engine.run([Request(small.text_case())]))


def test_timeout_leaves_no_child_and_no_folder(small: Small, tmp_path: Path) -> None:
    with pytest.raises(Undecided, match="no answer within 0.01 s"):
        next(small.engine(timeout_s=0.01, tmp=tmp_path).run([Request(small.text_case())]))
    assert not list(tmp_path.iterdir())
    assert not children()


def test_results_before_a_crash_are_kept(small: Small, tmp_path: Path) -> None:
    from harness.engines.child import _LIVE

    running = small.engine(tmp=tmp_path).run([Request(small.text_case())] * 20)
    got = [next(running)]
    (child,) = _LIVE
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.raises(Undecided, match="died while .* ran the request: SIGKILL"):
        got.extend(running)
    assert got[0]["logits"].shape[0] == 10
    assert not list(tmp_path.iterdir())


def test_giving_up_early_ends_the_child(small: Small, tmp_path: Path) -> None:
    running = small.engine(tmp=tmp_path).run([Request(small.text_case())] * 20)
    next(running)
    assert children()
    running.close()
    assert not children() and not list(tmp_path.iterdir())


def test_missing_runtime(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "coreai").mkdir()
    (tmp_path / "coreai" / "__init__.py").write_text("raise ImportError('no wheel for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Undecided, match="cannot be imported .no wheel"):
        next(small.engine().run([Request(small.text_case())]))


def test_checkpoint_of_another_geometry(small: Small) -> None:
    from dataclasses import replace

    engine = CoreAIEngine(small.decoder, geometry=replace(small.checkpoint.geometry, layers=4), context=CONTEXT)
    with pytest.raises(HarnessError, match="has 3 layers"):
        next(engine.run([Request(small.text_case())]))


def test_compute_units(small: Small) -> None:
    with pytest.raises(HarnessError, match="not known"):
        small.engine(compute_unit="tpu")
    with pytest.raises(Undecided, match="cannot be chosen here"):
        next(small.engine(compute_unit="gpu").run([Request(small.text_case())]))


def children() -> list[int]:
    """Live child processes of this one that are ours."""
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in listed if b"harness.engines" in Path(f"/proc/{pid}/cmdline").read_bytes()]
