"""How big a report is, how fast it renders, and how soon a browser paints it: python reports/bench/report_pages.py

Three records made up by tests/fake_run.py in the shape of real ones: the tiny model, an 8B (27 vision and 36 decoder
layers, 8 cases of 700 tokens) and ten thousand seams. First paint is read from the browser's own performance timeline.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const paint = performance.getEntriesByType("paint").map(one => [one.name, one.startTime]);
  const load = performance.getEntriesByType("navigation")[0];
  navigator.sendBeacon("ADDRESS", JSON.stringify({paint, dom: load.domContentLoadedEventEnd, load: load.loadEventEnd}));
}, 500));</script>"""
PATIENCE_S = 60


def long_tokens(record: dict[str, Any], tokens: int, rng: random.Random) -> dict[str, Any]:
    """The record's heat maps with so many tokens, noise as wide as measured."""
    for row in record["heat"]:
        row["values"] = [[round(-6 + at / 40 + rng.gauss(0, 0.2), 2) for _ in range(tokens)]
                         for at in range(len(row["seams"]))]
    seams = [f"vision.layers.{layer:02d}" for layer in range(27)]
    pictures = [{"case": row["name"], "part": "vision", "way": "accumulated", "grid": [28, 28], "seams": seams,
                 "values": [[round(-6.3 + rng.gauss(0, 0.2), 2) for _ in range(784)] for _ in seams]}
                for row in record["cases"] if row["image"]]
    more = [{**row, "way": way} for row in record["heat"] for way in ("local", "engine")]
    record["heat"] += more + pictures
    for row in record["cases"]:
        row["length"] = tokens - 24
    return record


def painted(page: Path) -> dict[str, float]:
    """Milliseconds from the start of navigation, the best of three, as the browser's performance timeline has them."""
    tool = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if tool is None:
        return {}
    told: queue.Queue[str] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The probe needs leave from the page's own policy, so the copy that is timed has none.
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy = page.with_suffix(".bench.html")
    probe = PROBE.replace("ADDRESS", f"http://127.0.0.1:{server.server_port}/")
    copy.write_text(source.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    best: dict[str, float] = {}
    for _ in range(3):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            child = subprocess.Popen([tool, "--headless", "--disable-gpu", *root, f"--user-data-dir={profile}",
                                      "--no-first-run", "--remote-debugging-port=0", copy.as_uri()],
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                found = json.loads(told.get(timeout=PATIENCE_S))
            finally:
                child.terminate()
                child.wait()
        now = {**dict(found["paint"]), "dom": found["dom"], "load": found["load"]}
        best = {name: round(min(value, best.get(name, value)), 1) for name, value in now.items()}
    server.shutdown()
    return {f"{name}_ms": value for name, value in best.items()}


def main() -> None:
    """Print one JSON line a record."""
    import fake_run

    from harness.report import render_html

    rng = random.Random(3)
    makers = {"tiny": lambda: fake_run.make(layers=4, vision_layers=4, cases=10, inside=False),
              "8B, 8 cases, 700 tokens": lambda: long_tokens(fake_run.make(layers=36, vision_layers=27, cases=8,
                                                                           inside=False), 700, rng),
              "8B that fails": lambda: long_tokens(fake_run.make(layers=36, vision_layers=27, cases=8, inside=False,
                                                                 broken="decoder.layers.17"), 700, rng),
              "ten thousand seams": fake_run.huge}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in makers.items():
            record = make()
            certificate = fake_run.signed(record)
            started = time.perf_counter()
            page = Path(folder) / "report.html"
            page.write_text(render_html(record, certificate), encoding="utf-8")
            took = time.perf_counter() - started
            print(json.dumps({"record": name, "verdicts": len(record["verdicts"]), "render_s": round(took, 2),
                              "html_MiB": round(page.stat().st_size / 2**20, 2), "run_json_MiB":
                              round(len(json.dumps(record)) / 2**20, 1), **painted(page)}), flush=True)


if __name__ == "__main__":
    main()
