"""Reports: what they show stands in the record, what is text stays text, and no record brings a stack trace."""

from __future__ import annotations

import base64
import copy
import json
import re
import struct
import zlib
from functools import cache
from html.parser import HTMLParser
from typing import Any

import fake_run
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.gate import certificate
from harness.policy import policy_from
from harness.report import render_card, render_compare, render_html, render_index, render_markdown
from harness.report.heat import heat_maps
from harness.report.plain import cosine, figure, size
from harness.report.png import INFINITE, NOTHING, data_uri, level
from harness.report.series import ladder, owner
from harness.run import run_from_record

MIB = 2**20
BROKEN = "decoder.layers.01"


@cache
def _made(kind: str) -> str:
    makers = {"healthy": lambda: fake_run.make(layers=3, vision_layers=2, cases=2),
              "failing": lambda: fake_run.make(layers=3, vision_layers=2, cases=2, broken=BROKEN),
              "hostile": fake_run.hostile, "half": fake_run.half}
    return json.dumps(makers[kind]())


def record_of(kind: str) -> dict[str, Any]:
    return json.loads(_made(kind))


def signed(record: dict[str, Any]) -> dict[str, Any]:
    return certificate(run_from_record(record), policy_from(record["policy"]))


class Page(HTMLParser):
    """Tags, text, and every attribute by which a page could ask for something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.seams: list[list[str]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for name, value in attrs
                       if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background")]
        self.seams += [json.loads(value or "") for name, value in attrs if name == "data-seams"]
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_verdict_comes_first_with_its_reason():
    record = record_of("failing")
    page = render_html(record, signed(record))
    assert page.index("FAIL") < page.index("Ten rungs")
    assert f"at {BROKEN}" in page[:page.index("Ten rungs")]
    assert "rotary positions: h and w exchanged" in page and "first broken" in page


def test_a_healthy_run_names_nothing_broken():
    record = record_of("healthy")
    page = render_html(record, signed(record))
    assert "PASS" in page and 'class="broken"' not in page and "Where it broke" not in page


def test_the_page_shows_the_figures_of_the_record():
    record = record_of("healthy")
    verdict = next(row for row in record["verdicts"] if row["rung"] == "decoder" and row["seam"] == "logits")
    page = render_html(record)
    assert figure(verdict["figures"]["accumulated"]["text"]["worst_token"]) in page
    assert record["bounds"][0]["because"] in page and "412" in page and "24/24" in page


def test_the_outcome_is_folded_again_and_a_forged_certificate_is_named():
    record = record_of("failing")
    forged = {**signed(record), "outcome": "PASS"}
    page = render_html(record, forged)
    assert "outcome does not match" in page
    assert "<title>FAIL" in page


def test_no_pass_stands_over_a_certificate_of_another_record():
    record = record_of("healthy")
    claimed = signed(record)
    record["verdicts"][0]["reason"] = "changed"
    page = render_html(record, claimed)
    assert "<title>MISMATCH" in page and "do not agree" in page
    assert "MISMATCH" in render_markdown(record, claimed) and "Not verified" in render_card(record, claimed)


def test_a_pass_past_its_bound_is_no_pass():
    record = record_of("healthy")
    row = next(row for row in record["verdicts"] if row["rung"] == "engine")
    row["value"] = 10 * row["bound"]
    assert "<title>MISMATCH" in render_html(record)


@pytest.mark.parametrize("given_", [[], "PASS", 7])
def test_a_certificate_that_is_none_is_named(given_):
    assert "not a certificate" in render_html(record_of("healthy"), given_)


@pytest.mark.parametrize("kind", ["healthy", "failing", "hostile", "half"])
def test_a_page_asks_for_nothing_and_runs_nothing_foreign(kind):
    page = Page(render_html(record_of(kind)))
    assert all(asked.startswith(("data:", "#")) for asked in page.asked), page.asked
    assert not page.handlers
    assert page.tags.count("script") <= 2 and page.tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(page.tags)


def test_hostile_text_stays_text():
    source = render_html(record_of("hostile"))
    assert fake_run.HOSTILE in "".join(Page(source).words)
    assert "<script>document" not in source and "<img src" not in source
    assert "http://example.invalid/track.png" not in source


@pytest.mark.parametrize("kind", ["healthy", "hostile"])
def test_the_script_can_read_the_seams_of_every_map(kind):
    record = record_of(kind)
    assert Page(render_html(record)).seams == [row["seams"] for row in record["heat"]]


def test_hostile_text_stays_text_in_markdown():
    for source in (render_markdown(record_of("hostile")), render_card(record_of("hostile"))):
        outside = re.sub(r"(?<!\\)`[^`]*`", "", source)  # a backtick after a backslash opens nothing
        assert "<script" not in outside and "<img" not in outside and "@team" not in outside
        assert "http://" not in outside and "[a](b)" not in outside
        for row in re.findall(r"^\|.*$", source, flags=re.MULTILINE):
            assert len(re.findall(r"(?<!\\)\|", row)) in (4, 6), row


def test_links_of_the_comment_cannot_run_scripts():
    source = render_markdown(record_of("healthy"), None, {"report": "javascript:alert(1)", "run": "https://e.org/a b)c"})
    assert "javascript" not in source and "https://e.org/a%20b%29c" in source


def test_markdown_is_short_and_says_where_it_broke():
    source = render_markdown(record_of("failing"))
    assert len(source) < 6000
    assert f"`{BROKEN}" in source and source.startswith("## ✕ FAIL")
    assert all(f"| {name} |" in source for name in ("contract", "headroom"))


def test_the_card_speaks_only_of_a_run_that_passed():
    good, bad = render_card(record_of("healthy")), render_card(record_of("failing"))
    assert "412.5 tok/s" in good and "3/3 layers within bounds" in good and "engine ≡ python 48/48" in good
    assert "harness verify" in good and signed(record_of("healthy"))["digest"] in good
    assert "412.5" not in bad and "Not verified" in bad


def test_half_a_run_makes_a_page():
    page = render_html(record_of("half"))
    assert "nothing was compared" in page and "ERROR" in page
    assert render_markdown(record_of("half")) and render_card(record_of("half"))


@pytest.mark.parametrize("record", [None, [], {}, {"schema": 0}, {"schema": 2}, {"schema": 1}, "text"])
def test_what_is_no_record_is_refused_with_a_sentence(record):
    for render in (render_html, render_markdown, render_card, lambda row: render_compare(row, record_of("half"))):
        with pytest.raises(HarnessError, match="run.json"):
            render(record)


def test_a_record_without_policy_is_refused():
    record = record_of("half") | {"policy": {}}
    with pytest.raises(HarnessError, match="missing"):
        render_html(record)


JUNK = st.recursive(st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=6)
                    | st.sampled_from(["inf", "-inf", "nan", "</script>", "PASS", "data:image/png;base64,AA=="]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                    max_leaves=6)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@cache
def _small() -> tuple[str, list[tuple]]:
    record = fake_run.make(layers=1, vision_layers=1, cases=1, inside=False, broken="decoder.layers.00")
    record["heat"] = [{**row, "seams": row["seams"][:2], "values": [line[:200] for line in row["values"][:2]]}
                      for row in record["heat"]]
    return json.dumps(record), _places(record)[1:]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_broken_record_is_a_page_or_a_sentence(data):
    text, places = _small()
    record = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(places))
        target: Any = record
        try:
            for key in path:
                target = target[key]
            target[last] = data.draw(JUNK)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took this place away
    for render in (render_html, render_markdown, render_card):
        try:
            assert render(record)
        except HarnessError as error:
            assert error.what and "\n" not in str(error)


def test_the_tiny_run_and_an_8b_run_are_lean():
    tiny = render_html(fake_run.make(layers=8, vision_layers=6, cases=10))
    large = render_html(fake_run.make(layers=36, vision_layers=27, cases=8, inside=False))
    assert len(tiny.encode()) < 3 * MIB and len(large.encode()) < 8 * MIB


def test_ten_thousand_seams_make_a_page():
    page = render_html(fake_run.huge())
    assert len(page.encode()) < 8 * MIB and "more seams stand in run.json" in page


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
    assert [level(value, -6, -1) for value in (-9, -6, -1, 3, None, float("inf"))] == [0, 0, 249, 249, NOTHING, INFINITE]


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


def test_the_index_lists_runs_and_keeps_a_bad_one_as_a_row():
    good = record_of("healthy")
    page = render_index([("tiny", good, signed(good)), ("../../etc", {"schema": 0}, None), ("a b/<c>", None, None)])
    asked = [asked for asked in Page(page).asked if not asked.startswith("data:")]
    assert asked == ["./tiny/report.html", "./etc/report.html", "./a%20b/%3Cc%3E/report.html"]
    assert "this tool reads 1" in page and "3 runs" in page
    assert "0 runs" in render_index([])


def test_commands_repeat_the_options_of_the_run():
    page = Page(render_html(record_of("failing")))
    words = "".join(page.words)
    assert "harness ladder qwen3-vl-tiny --bundle exports/qwen3-vl-tiny_decode_int8hu_s1 --rung engine" in words
    assert "--rung decoder --case scene-211" in words


def test_inputs_are_left_as_they_were():
    record = record_of("failing")
    before = copy.deepcopy(record)
    render_html(record), render_markdown(record), render_card(record), render_compare(record, record)
    assert record == before


@pytest.mark.parametrize("value, words", [(None, "–"), (0, "0"), (3.14159e-6, "3.1e-6"), ("inf", "∞"), (float("nan"), "–"),
                                          (0.0321, "0.0321"), (1234.5, "1,234"), (-2.5e9, "-2.5e9"), (True, "–")])
def test_figures(value, words):
    assert figure(value) == words


def test_a_cosine_is_cut_never_rounded_up():
    assert cosine(0.9999999) == "0.999999" and cosine(1.0) == "1.000000"
    assert size(8_700_000_000) == "8.7 GB" and size(999) == "999 B" and size(-1) == "–"
