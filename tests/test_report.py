"""Reports: what they show stands in the record, what is text stays text, and no record brings a stack trace."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from html.parser import HTMLParser
from typing import Any

import fake_run
import pytest
from fake_run import BROKEN, record_of, signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.gate import verify
from harness.report import render_annotations, render_card, render_compare, render_html, render_index, render_markdown
from harness.report.plain import figure

MIB = 2**20


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
    links = {"report": "javascript:alert(1)", "run": "https://e.org/a b)c"}
    source = render_markdown(record_of("healthy"), None, links)
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


@cache
def _certificate() -> dict[str, Any]:
    return signed(json.loads(_small()[0]))


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
    for render in (render_html, render_markdown, render_card, render_annotations):
        try:
            assert render(record)
        except HarnessError as error:
            assert error.what and "\n" not in str(error)
    assert all(isinstance(sentence, str) for sentence in verify(record, _certificate(), bounds=fake_run.BOUNDS))


def test_the_tiny_run_and_an_8b_run_are_lean():
    tiny = render_html(fake_run.make(layers=8, vision_layers=6, cases=10))
    large = render_html(fake_run.make(layers=36, vision_layers=27, cases=8, inside=False))
    assert len(tiny.encode()) < 3 * MIB and len(large.encode()) < 8 * MIB


def test_ten_thousand_seams_make_a_page():
    page = render_html(fake_run.huge())
    assert len(page.encode()) < 8 * MIB and "more seams stand in run.json" in page


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
