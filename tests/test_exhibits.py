"""What a report shows beside the verdicts: heat maps, pictures, bandwidth, the price of quantization."""

from __future__ import annotations

import base64
import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_run import record_of
from PIL import Image

from harness import exhibits
from harness.cases import Case, Turn, load_cases
from harness.checkpoint import EMBEDDED, open_checkpoint, read_json
from harness.exhibits import heat_rows, thumbnail
from harness.host import Preprocessing, make_patches
from harness.report import render_html
from harness.report.heat import _by_rows, by_case, error, heat_maps
from harness.report.view import speed
from harness.rungs.heat import token_errors
from harness.rungs.weights import _lost
from harness.run import run_from_record
from harness.tables import Expected


def test_logarithms_are_of_each_token_and_never_nan():
    reference = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    got = np.array([[3.0, 4.0005], [0.0, 0.0], [np.nan, 0.0], [np.inf, 1.0]])
    assert token_errors(reference, got) == [-4.0, -12.0, None, None]


def test_patches_are_drawn_where_they_lie_on_the_image():
    preprocessing = Preprocessing.from_config(read_json(EMBEDDED / "preprocessor_config.json"))
    pixels = np.zeros((128, 192, 3), dtype=np.uint8)
    for y in range(8):
        for x in range(12):
            pixels[16 * y:16 * y + 16, 16 * x:16 * x + 16] = 2 * (12 * y + x)
    patches, grid = make_patches(Image.fromarray(pixels), preprocessing)
    assert grid == (1, 8, 12)
    [line] = _by_rows([[float(round((row.mean() * 0.5 + 0.5) * 255)) for row in patches]], 8, 12)
    assert line == [2.0 * at for at in range(96)]


def test_maps_of_the_tower_and_of_the_engine_stand_with_their_case():
    record = record_of("healthy")
    values = [[-6.0] * 784, [-6.0] * 784]
    values[1][2] = -1.0  # the third patch of the first block: row 1, column 0
    record["heat"] += [{"case": "scene-211", "part": "vision", "way": "accumulated", "grid": [28, 28],
                        "seams": ["vision.embed", "vision.layers.00"], "values": values},
                       {**record["heat"][0], "way": "engine"},
                       {"case": "scene-211", "part": "vision", "way": "accumulated", "grid": [27, 29],
                        "seams": ["vision.embed"], "values": [[-6.0] * 783]}]
    cases = by_case(heat_maps(run_from_record(record))[1])
    labels = [one.label for one in cases[0][1]]
    assert [name for name, _ in cases] == ["scene-211", "text-only"] and labels[1].startswith("inside the bundle")
    tower = cases[0][1][2]
    assert tower.unit == "patch" and tower.worst_token == 2 and tower.grids[0].worst == (1, 0)
    assert cases[0][1][3].grids == [], "a grid that does not fit is not drawn"
    page = render_html(record)
    assert page.count('href="data:image/png') > 8 and page.count("<use ") > 4


def test_exact_tokens_do_not_use_up_the_scale():
    record = record_of("healthy")
    for row in record["heat"]:
        row["values"][0] = [-12.0] * len(row["values"][0])
    scales, _ = heat_maps(run_from_record(record))
    assert -8 < scales["accumulated"].low < scales["accumulated"].high < 0
    assert error(-12.0) == "0" and error(-3.0) == "1.0e-3"


def test_a_thumbnail_is_small_and_whole():
    cases = {case.name: case for case in load_cases()}
    made = thumbnail(SimpleNamespace(cases=cases), "scene-211")
    kind, _, body = made.partition(",")
    with Image.open(io.BytesIO(base64.b64decode(body))) as picture:
        assert kind == "data:image/jpeg;base64" and max(picture.size) == exhibits.SIDE
    noise = {"n": Case("n", "w", (Turn("user", "x", "noise:2000x100:1"),))}
    assert len(thumbnail(SimpleNamespace(cases=noise), "n")) < 4 * exhibits.LONGEST / 3 + 100
    assert thumbnail(SimpleNamespace(cases=cases), "text-only") is None


def test_a_graph_that_breaks_leaves_no_map_and_no_error():
    class Broken(SimpleNamespace):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError(name)

    case = Case("c", "w", (Turn("user", "x", "white:64x64"),), engine=False)
    assert heat_rows(Broken(cases={"c": case}, geometry=open_checkpoint().geometry), "c") == []


def test_bandwidth_says_how_it_was_measured(monkeypatch):
    monkeypatch.setattr(exhibits, "COPIED", 1 << 22)
    found = exhibits.bandwidth()
    assert found["bandwidth_gb_s"] > 0 and "4 MiB" in found["bandwidth_by"]


def test_the_distance_from_the_bandwidth_bound_is_told():
    run = run_from_record(record_of("healthy"))
    run.speed |= {"bytes_per_token": 1e8, "decode_tok_s": 50.0, "bandwidth_gb_s": 20.0}
    told = {label: (value, remark) for label, value, remark in speed(run)}
    assert told["bandwidth used"] == ("5 GB/s", "25 % of what was measured here")
    assert told["bandwidth bound"] == ("200 tok/s", "decode stands at 1/4 of it")
    run.speed["bandwidth_gb_s"] = None
    assert "was not measured" in render_html(run.record())
    for bad in (0, -1, "inf", "nan", "x"):
        run.speed["bandwidth_gb_s"] = bad
        assert render_html(run.record())


def test_the_price_of_quantization_is_a_share_of_the_tensors_norm():
    weight = np.full((5000, 2), 2.0, dtype=np.float32)

    def price(value, right):
        return _lost(Expected("w", right.shape, lambda start, stop: value[start:stop], lambda start, stop: right[start:stop]))

    assert price(weight * 0.99, weight) == pytest.approx(0.01, rel=1e-4)
    assert price(weight, weight) == 0.0 and math.isfinite(price(weight, 0 * weight))


def test_verify_needs_no_torch():
    code = "import sys, harness.attest, harness.rerender; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            cwd=Path(__file__).resolve().parent.parent).stdout.split()
    assert not {"torch", "transformers", "safetensors", "PIL", "huggingface_hub", "coreai"} & set(loaded)
