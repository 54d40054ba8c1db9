"""The pictures of the README: python reports/screenshots/make.py REPORT FAILING

REPORT is a folder of `harness gate`; FAILING one of a conversion with a fault in it, ours being `shifted.py`:
PYTHONPATH=reports/screenshots harness gate --graph shifted:factory --out reports/shifted \\
  --bundle REPORT/bundles/qwen3_vl_tiny_decode_int8hu_s1 --vision-bundle REPORT/bundles/qwen3_vl_tiny_vision
Needs Chromium. Pictures are reduced to 256 colours, so that each stays below 200 kB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHOTS = {"report.png": (0, 1280, 1500, "light", ""), "failure.png": (1, 1280, 900, "light", ""),
         "phone.png": (0, 390, 844, "light", ""), "dark.png": (1, 1280, 1100, "dark", "heat")}
"""File -> which report, width, height, colour scheme, section to begin with."""
NARROWEST = 500
"""Chromium makes no narrower window: a phone's page is shown in a frame inside it, and cut out."""
LARGEST = 200_000


def shoot(page: Path, out: Path, width: int, height: int, scheme: str, section: str) -> None:
    """One picture of a page."""
    tool = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if tool is None:
        sys.exit("no chromium on PATH")
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = page.read_text(encoding="utf-8")
        if section:  # what stands before the section is left out: a headless picture begins at the top
            head, start = source.index('<header class="top">'), source.index(f'<section id="{section}">')
            source = f"{source[:head]}<main>{source[start:]}"
        if scheme == "dark":  # headless Chromium has no switch for the colour scheme
            source = source.replace("@media (prefers-color-scheme: dark)", "@media all")
        copy = Path(folder) / "page.html"
        # A changed page no longer fits the digests of its own policy.
        copy.write_text(source.replace('http-equiv="Content-Security-Policy"', 'name="policy"'), encoding="utf-8")
        shown = copy
        if width < NARROWEST:
            shown = Path(folder) / "frame.html"
            style = f"border:0;width:{width}px;height:{height}px"
            shown.write_text(f'<body style="margin:0"><iframe src="page.html" style="{style}"></iframe>', encoding="utf-8")
        subprocess.run([tool, "--headless", "--disable-gpu", "--hide-scrollbars", *root,
                        f"--user-data-dir={folder}/profile", "--virtual-time-budget=2000",
                        f"--window-size={max(width, NARROWEST)},{height}", f"--screenshot={folder}/shot.png",
                        shown.as_uri()],
                       check=True, capture_output=True, timeout=120)
        with Image.open(f"{folder}/shot.png") as picture:
            cut = picture.convert("RGB").crop((0, 0, width, height))
            cut.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    if out.stat().st_size > LARGEST:
        sys.exit(f"{out} has {out.stat().st_size} bytes, more than {LARGEST}")
    print(f"{out.relative_to(ROOT)}: {out.stat().st_size} bytes")


def main() -> None:
    """Every picture."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    pages = [Path(folder) / "report.html" for folder in sys.argv[1:]]
    for name, (which, *how) in SHOTS.items():
        shoot(pages[which], HERE / name, *how)


if __name__ == "__main__":
    main()
