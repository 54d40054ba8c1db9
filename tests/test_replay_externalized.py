"""Bundles of the published flow, norms as private graphs: read in place, bit-equal, and their layers found all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_bundle import CONTEXT, GRID, Small, small_bundle

from harness.engines import Request
from harness.engines.replay.engine import ReplayEngine
from harness.engines.replay.program import read_program
from harness.engines.replay.taps import decoder_taps
from harness.trace import decoder_seams

pytest.importorskip("coreai")


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bundle()


@pytest.fixture(scope="module")
def asset(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from externalized import save_externalized

    return save_externalized(small.checkpoint, tmp_path_factory.mktemp("published") / "decoder.aimodel", "int8hu", grid=GRID,
                             context=CONTEXT)


def test_composites_are_read_in_place(small: Small, asset: Path) -> None:
    main = read_program(asset).main
    scopes = [node.scope[0] for node in main.nodes if node.scope]
    assert {scope.composite for scope in scopes} == {"rms_norm"}
    assert len({scope.at for scope in scopes}) == 4 * 3 + 1, "each call of a shared graph is one of its own"
    assert all("eps" in scope.attributes for scope in scopes)
    found = decoder_taps(main)
    assert not found.unnamed
    assert set(decoder_seams(small.checkpoint.geometry, inside=True)) - {"logits"} <= set(found.values)


@pytest.mark.parametrize("order", ["steps", "layers"])
def test_replay_equals_the_runtime(small: Small, asset: Path, order: str) -> None:
    request = Request(small.image_case(), forced=(3, 4), free=3, kv=True)
    apple = next(small.engine(asset).run([request]))
    replay = ReplayEngine(asset, small.vision, geometry=small.checkpoint.geometry, grid=GRID, context=CONTEXT, order=order,
                          arithmetic="coreai-cpu")
    got = next(replay.run([request]))
    for seam in ("logits", "kv.keys", "kv.values"):
        assert np.array_equal(got[seam], apple[seam]), seam
    assert got.facts["tokens"] == apple.facts["tokens"]
