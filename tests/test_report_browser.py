"""Reports in a real browser: they render, the console stays silent, nothing is asked for, hostile text stays text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fake_run
import pytest

from harness.report import render_compare, render_html, render_index

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on PATH to open a report in")
FLAGS = ("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=2000")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """An address that a page may be tricked into asking, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", asked
    listening.shutdown()
    listening.server_close()


def opened(source: str, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and the lines of its console."""
    page = folder / "page.html"
    page.write_text(source, encoding="utf-8")
    root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run([CHROMIUM, *FLAGS, *flags, *root, profile, "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_checks_below_can_fail(server, tmp_path):
    address, asked = server
    dom, console = opened(f"<img src='{address}/seen'><script>document.title='ran'; console.error('heard')</script>",
                          tmp_path)
    assert "/seen" in asked and any("heard" in line for line in console) and "<title>ran" in dom


@pytest.mark.parametrize("kind", ["failing", "half", "compare", "index"])
def test_a_page_renders_in_silence(kind, tmp_path):
    failing = fake_run.make(layers=3, vision_layers=2, cases=3, broken="decoder.layers.01")
    source = {"failing": lambda: render_html(failing), "half": lambda: render_html(fake_run.half()),
              "compare": lambda: render_compare(fake_run.make(layers=3, vision_layers=2, cases=3), failing),
              "index": lambda: render_index([("a", failing, None), ("b", {}, None)])}[kind]()
    dom, console = opened(source, tmp_path)
    assert console == []
    assert '<div class="tip" aria-hidden="true">' in dom, "the page's own script ran, so its digest fits the policy"
    if kind == "failing":
        assert dom.count("<button") == dom.count('<pre class="copy') > 5


def test_hostile_text_stays_text_and_asks_for_nothing(server, tmp_path):
    address, asked = server
    asked.clear()
    hostile = json.loads(json.dumps(fake_run.hostile()).replace("http://example.invalid", address))
    dom, console = opened(render_html(hostile), tmp_path)
    assert console == [] and asked == []
    assert "<title>FAIL" in dom and "owned</title>" not in dom and "<img" not in dom
    assert "&lt;script&gt;document.title" in dom


def driven(source: str, script: str, folder: Path, *flags: str) -> str:
    """The DOM after a script of the test ran in the page, which for that goes without its policy."""
    assert 'http-equiv="Content-Security-Policy"' in source
    source = source.replace('http-equiv="Content-Security-Policy"', 'name="policy"')
    dom, console = opened(source.replace("</body>", f"<script>{script}</script></body>"), folder, *flags)
    assert console == []
    return dom


def test_the_keyboard_walks_ladders_and_heat_maps(tmp_path):
    script = """
      const press = (chart, key) => chart.dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      const ladder = document.querySelector("#ladder .chart"), map = document.querySelector("#heat .chart");
      const said = [];
      const hear = () => said.push(document.querySelector(".spoken").textContent);
      ladder.focus(); press(ladder, "ArrowRight"); hear(); press(ladder, "ArrowRight"); hear(); press(ladder, "End"); hear();
      map.focus();
      setTimeout(() => { press(map, "ArrowRight"); press(map, "ArrowDown"); hear();
                         document.title = JSON.stringify(said); }, 400);"""
    record = fake_run.make(layers=3, vision_layers=2, cases=2, inside=False)
    title = driven(render_html(record), script, tmp_path).partition("<title>")[2].partition("</title>")[0]
    said = json.loads(title.replace("&quot;", '"'))
    assert said[0].startswith("vision.embed: PASS") and said[1].startswith("vision.layers.00: PASS")
    assert said[2].startswith("vision.merger: PASS") and "bound accumulated" in said[0]
    assert said[3].startswith("decoder.layers.00\ntoken 0: ≈ ")


@pytest.mark.parametrize("kind", ["report", "compare", "index"])
def test_nothing_is_wider_than_a_phone(kind, tmp_path):
    failing = fake_run.make(layers=3, vision_layers=2, cases=2, broken="decoder.layers.01")
    source = {"report": lambda: render_html(failing), "index": lambda: render_index([("a" * 60, failing, None)]),
              "compare": lambda: render_compare(fake_run.make(layers=3, vision_layers=2, cases=2), failing)}[kind]()
    script = """document.body.style.width = "390px";
      const wide = [...document.querySelectorAll("body *")]
        .filter(one => !one.closest(".scroll, nav, svg.defs, .tip, .spoken") && one.getBoundingClientRect().right > 391).map(one => one.tagName + "." + one.getAttribute("class"));
      document.title = JSON.stringify(wide.slice(0, 5));"""
    dom = driven(source, script, tmp_path, "--window-size=500,900")
    assert dom.partition("<title>")[2].partition("</title>")[0] == "[]"


def test_a_report_prints_with_its_maps_open(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(render_html(fake_run.make(layers=3, vision_layers=2, cases=3, inside=False)), encoding="utf-8")
    root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
    subprocess.run([CHROMIUM, *FLAGS, *root, f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer",
                    f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri()], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF") and (tmp_path / "page.pdf").stat().st_size > 50_000
