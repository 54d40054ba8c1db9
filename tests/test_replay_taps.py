"""Layers found in a released program by structure: the same values as debug information names, and as the twin computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_bundle import CONTEXT, GRID, Small, small_bundle

from harness.engines import Request
from harness.engines.coreai import write_index
from harness.engines.coreai_locate import locate_for
from harness.engines.replay.engine import ReplayEngine
from harness.engines.replay.program import Function, read_program
from harness.engines.replay.taps import decoder_taps
from harness.engines.replay.taps_vision import vision_taps
from harness.errors import HarnessError
from harness.trace import Trace, decoder_seams, vision_seams

pytest.importorskip("coreai")


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bundle()


def replayed(small: Small, decoder: Path | None = None, index: Path | None = None, arithmetic: str = "fp32") -> Trace:
    engine = ReplayEngine(decoder or small.decoder, small.vision, geometry=small.checkpoint.geometry, grid=GRID,
                          context=CONTEXT, seam_index=index, arithmetic=arithmetic)
    request = Request(small.image_case(), forced=(3, 4), seams=engine.seams())
    return next(engine.run([request]))


def test_every_seam_is_found_and_is_the_twin_s(small: Small) -> None:
    geometry, found = small.checkpoint.geometry, replayed(small)
    wanted = {*decoder_seams(geometry, inside=True), *vision_seams(geometry, inside=True), "decoder.positions"}
    assert wanted <= set(found)
    twin = next(small.twin.run([Request(small.image_case(), forced=(3, 4), seams=small.twin.seams())]))
    for seam in wanted & set(twin):
        assert found[seam].shape == twin[seam].shape, seam
        error = np.linalg.norm(found[seam].astype(np.float64) - twin[seam]) / np.linalg.norm(twin[seam])
        assert error < 1e-5, seam
    assert len(wanted & set(twin)) > 100


def test_structure_and_debug_information_agree(small: Small) -> None:
    structure, index = replayed(small), replayed(small, index=small.seams)
    assert len(index) > 80
    assert set(index) <= set(structure)
    for seam in index:
        assert np.array_equal(structure[seam], index[seam]), seam


def test_a_program_that_takes_any_count_of_tokens(small: Small) -> None:
    one, many = replayed(small), replayed(small, decoder=small.dynamic)
    inner = {seam for seam in one if seam.startswith("decoder.")} - {"decoder.positions"}
    assert inner <= set(many)
    for seam in inner:
        assert np.allclose(one[seam], many[seam], rtol=1e-4, atol=1e-5), seam


def test_the_runtime_s_operations_are_found_by_replay_alone(small: Small, tmp_path: Path) -> None:
    """Values of replay in the runtime's own arithmetic name its operations exactly: no source, no debug information."""
    engine = small.engine(small.decoder)
    request = Request(small.image_case(), forced=(3, 4))
    found = locate_for(engine, request, replayed(small, arithmetic="coreai-cpu"))
    for tower, least in (("decoder", 45), ("vision", 50)):
        entries = found[tower][1]
        assert len(entries) >= least
        assert all(entry["distance"] == 0 for entry in entries.values())
    write_index(tmp_path / "index.json", found)
    inner = small.engine(seam_index=tmp_path / "index.json")
    trace = next(inner.run([replace(request, seams=inner.seams())]))
    want = replayed(small, arithmetic="coreai-cpu")
    inner_seams = [seam for seam in trace if seam in want and seam.startswith("decoder.layers")]
    assert len(inner_seams) > 30
    assert all(np.array_equal(trace[seam], want[seam]) for seam in inner_seams)


def main(asset: Path) -> Function:
    return read_program(asset).main


def test_what_is_checked(small: Small) -> None:
    checks = decoder_taps(main(small.decoder)).checks
    assert "3 layers in the cache, as many in the stream, each of attention and MLP, the first 3 with DeepStack" in checks
    assert sum("writes slot" in check for check in checks) == 2 * 3
    assert "DeepStack outputs read the stream after blocks [0, 1, 2]" in vision_taps(main(small.vision)).checks


def test_a_layer_that_writes_another_s_slot_is_refused(small: Small) -> None:
    function = main(small.decoder)
    first, _, second, *_ = (node for node in function.nodes if node.op == "slice_update")
    swapped = replace(first, operands=(*first.operands[:1], *second.operands[1:4], first.operands[4]))
    with pytest.raises(HarnessError, match="writes slot 0 of"):
        decoder_taps(replace(function, nodes=tuple(swapped if node is first else node for node in function.nodes)))


def test_a_stream_with_an_addition_too_few_is_refused(small: Small) -> None:
    function = main(small.decoder)
    stream = decoder_taps(function).values["decoder.layers.01"]
    node = next(node for node in function.nodes if stream in node.results)
    lost = replace(node, op="reshape", operands=node.operands[:1])
    with pytest.raises(HarnessError, match="addition 5 to the stream is layer 1's mlp"):
        decoder_taps(replace(function, nodes=tuple(lost if one is node else one for one in function.nodes)))


def test_another_structure_has_no_inner_seams(small: Small) -> None:
    function = main(small.decoder)
    with pytest.raises(HarnessError, match="contract"):
        vision_taps(function)
    head = [node for node in function.nodes if node.op == "broadcasting_batch_matmul"][-1]
    with pytest.raises(HarnessError, match="a product with a weight"):
        decoder_taps(replace(function, nodes=tuple(replace(node, op="tanh") if node is head else node
                                                   for node in function.nodes)))
