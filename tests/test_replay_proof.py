"""The executor proven: `coreai-cpu` replay is Apple's runtime on this machine, bit for bit, at every seam and in the cache.

So what replay says with another arithmetic differs from the runtime by arithmetic alone.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from random_models import write_checkpoint
from small_bundle import CONTEXT, GRID, small_bundle

from harness.checkpoint import open_checkpoint
from harness.engines import Request
from harness.engines.coreai import CoreAIEngine
from harness.engines.replay.engine import ReplayEngine

pytest.importorskip("coreai")


@functools.cache
def half(folder: Path) -> tuple[Path, Path, Path]:
    """Decoder, vision and index of an int8hu bundle with fp16 activations: what ships."""
    from harness.export import export
    from harness.export.seams import index_path

    checkpoint = open_checkpoint(write_checkpoint(folder / "small", layers=3))
    made = export(checkpoint, folder / "out", "int8hu", grid=GRID, context=CONTEXT)
    decoder, vision = (path / f"{path.name}.aimodel" for path in (made.decoder, made.vision))
    return decoder, vision, index_path(made.decoder), checkpoint.geometry


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return half(tmp_path_factory.mktemp("half"))


def compare(decoder: Path, vision: Path, index: Path | None, geometry, request: Request) -> int:
    settings = {"geometry": geometry, "grid": GRID, "context": CONTEXT, "seam_index": index}
    apple = next(CoreAIEngine(decoder, vision, **settings).run([request]))
    replay = next(ReplayEngine(decoder, vision, arithmetic="coreai-cpu", **settings).run([request]))
    assert set(apple) == set(replay)
    different = [seam for seam in apple if not np.array_equal(apple[seam], replay[seam], equal_nan=True)]
    assert not different
    assert apple.facts["tokens"] == replay.facts["tokens"]
    return len(apple)


def test_what_ships_is_bit_equal(shipped):
    decoder, vision, index, geometry = shipped
    seams = CoreAIEngine(decoder, vision, geometry=geometry, grid=GRID, seam_index=index).seams()
    request = Request(small_bundle().image_case(), forced=(3, 4, 5), free=3, seams=seams, kv=True)
    assert compare(decoder, vision, index, geometry, request) > 60


def test_the_sharp_twin_is_bit_equal():
    small = small_bundle()
    request = Request(small.image_case(), forced=(3, 4, 5), free=3, seams=small.engine().seams(), kv=True)
    assert compare(small.decoder, small.vision, small.seams, small.checkpoint.geometry, request) > 60


def test_a_program_of_any_length_is_bit_equal():
    small = small_bundle()
    request = Request(small.image_case(), forced=(3, 4, 5), free=3, kv=True)
    compare(small.dynamic, small.vision, None, small.checkpoint.geometry, request)
