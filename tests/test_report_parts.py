"""What reports are made of: ladders, heat maps, comparisons, figures in words."""

from __future__ import annotations

import base64
import struct
import zlib

import pytest
from fake_run import BROKEN, record_of, signed

from harness.cli import main
from harness.report import render_compare
from harness.report.commands import again, commands
from harness.report.heat import heat_maps
from harness.report.plain import cosine, figure, size
from harness.report.png import INFINITE, NOTHING, data_uri, level
from harness.report.read import read
from harness.report.series import ladder, owner
from harness.run import run_from_record, write_json


def test_a_ladder_is_the_worst_over_cases_with_its_place():
    run = run_from_record(record_of("healthy"))
    step = next(step for step in ladder(run, "decoder").steps if step.seam == "logits")
    values = {verdict.case: verdict.figures["local"]["image"]["worst_token"] for verdict in run.of("decoder")
              if verdict.seam == "logits" and "image" in verdict.figures["local"]}
    mark = step.marks["local", "image"]
    assert mark.value == max(values.values()) and values[mark.case] == mark.value
    assert step.limits["accumulated"] == (6e-4, 8.8e-5), "the last bound that covers a seam is its bound"


def test_text_only_cases_count_as_text():
    run = run_from_record(record_of("healthy"))
    assert {region for step in ladder(run, "decoder", "text-only").steps for _, region in step.marks} == {"text"}


def test_the_first_broken_seam_is_the_first_in_order_of_computation():
    run = run_from_record(record_of("failing"))
    whole = ladder(run, "decoder")
    assert whole.first == f"{BROKEN}.input_norm" and whole.families["decoder"].first == BROKEN
    assert [owner(step.seam) for step in whole.inside(BROKEN).steps] == [BROKEN] * 13 + [None]


@pytest.mark.parametrize("seam, layer", [("decoder.layers.03.attn.q_rope", "decoder.layers.03"), ("logits", None),
                                         ("decoder.layers.03.deepstack", None), ("vision.merger.fc1", "vision.merger"),
                                         ("decoder.layers.031", None), ("other.block", None)])
def test_owner(seam, layer):
    assert owner(seam) == layer


def _pixels(uri: str) -> list[bytes]:
    body = base64.b64decode(uri.partition(",")[2])
    width, height = struct.unpack(">II", body[16:24])
    start = body.index(b"IDAT")
    length = struct.unpack(">I", body[start - 4:start])[0]
    raw = zlib.decompress(body[start + 4:start + 4 + length])
    return [raw[row * (width + 1) + 1:(row + 1) * (width + 1)] for row in range(height)]


def test_a_heat_map_holds_what_was_measured():
    rows = [bytes([0, 7, 249]), bytes([INFINITE, NOTHING, 3])]
    assert _pixels(data_uri(rows)) == rows
    values = (-9, -6, -1, 3, None, float("inf"))
    assert [level(value, -6, -1) for value in values] == [0, 0, 249, 249, NOTHING, INFINITE]


def test_a_dead_token_is_found_and_drawn_back_on_the_image():
    record = record_of("healthy")
    heat = record["heat"][0]
    heat["values"][2][7 + 14 * 3 + 5] = 0.5
    _, maps = heat_maps(run_from_record(record))
    assert (maps[0].worst_token, maps[0].worst_row) == (7 + 14 * 3 + 5, 2)
    assert maps[0].grids[0].worst == (3, 5)
    assert maps[0].image == (7, 203) and maps[1].image is None
    assert len(_pixels(maps[0].uri)) == len(heat["seams"])


def test_compare_tells_broke_from_noise():
    page = render_compare(record_of("healthy"), record_of("failing"))
    assert "✕ broke" in page and BROKEN in page
    same = render_compare(record_of("healthy"), record_of("healthy"))
    assert "within noise" in same and "broke</td>" not in same and "worse</td>" not in same


def test_compare_counts_a_change_larger_than_noise():
    before, after = record_of("healthy"), record_of("healthy")
    for row in after["verdicts"]:
        if row["rung"] == "decoder" and row["seam"] == "decoder.layers.02":
            for region in row["figures"]["local"].values():
                region["worst_token"] += 6e-6  # noise of this bound: 2.4e-6
    page = render_compare(before, after)
    assert "▲ worse" in page and "broke</td>" not in page
    assert "▼ better" in render_compare(after, before)


@pytest.mark.parametrize("value, words", [(None, "–"), (0, "0"), (3.14159e-6, "3.1e-6"), ("inf", "∞"),
                                          (float("nan"), "–"), (0.0321, "0.0321"), (1234.5, "1,234"),
                                          (-2.5e9, "-2.5e9"), (True, "–")])
def test_figures(value, words):
    assert figure(value) == words


def test_a_cosine_is_cut_never_rounded_up():
    assert cosine(0.9999999) == "0.999999" and cosine(1.0) == "1.000000"
    assert size(8_700_000_000) == "8.7 GB" and size(999) == "999 B" and size(-1) == "–"


@pytest.mark.parametrize("command, ladder, folder", [
    ("harness gate model --mode fp16 --out r/x", "harness ladder model --mode fp16 --rung decoder", "r/x"),
    ("pytest /a/ladders/ --tb=short --report=r/y --graph=p.q:f --checkpoint m",
     "harness ladder m --graph p.q:f --rung decoder", "r/y"),
    ("harness gate --bundle a/b_s1/", "harness ladder --bundle a/b_s1/ --rung decoder", "reports/qwen3-vl-tiny-b_s1"),
    ("harness 'torn", "harness ladder --rung decoder", "reports/qwen3-vl-tiny-int8hu")])
def test_commands_are_those_of_the_run(command, ladder, folder):
    record = record_of("healthy") | {"command": command}
    judged = read(record)
    told = dict(commands(judged))
    assert told["rung decoder"] == again(judged)["decoder"] == ladder
    assert told["the rows for a model card"] == f"harness report {folder} --card"


def test_an_index_lists_a_folder_that_cannot_be_read(tmp_path, capsys):
    write_json(tmp_path / "good" / "run.json", record_of("healthy"))
    write_json(tmp_path / "good" / "certificate.json", signed(record_of("healthy")))
    for name, text in (("torn", "{"), ("list", "[]"), ("nan", '{"schema": NaN}')):
        write_json(tmp_path / name / "certificate.json", {})
        (tmp_path / name / "run.json").write_text(text)
    assert main(["report", "--index", str(tmp_path)]) == 0 and "4 runs" in capsys.readouterr().out
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "./good/report.html" in page and page.count("torn") >= 1 and "must be a JSON object" in page
