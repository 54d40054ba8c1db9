"""One screen: what this machine can record, export and run, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.checkpoint import EMBEDDED, open_checkpoint
from harness.errors import ExitCode, HarnessError

PACKAGES = {"record": ("torch", "transformers", "safetensors", "pillow", "tokenizers"),
            "export": ("coreai-torch", "coreai-opt"), "run": ("coreai-core",)}
NEEDS = {"record": "pip install .", "export": "pip install '.[coreai]'", "run": "pip install '.[coreai]'"}
DISK = 4 << 30
"""Bytes of free disk below which a run at tiny size may end half-way; real sizes state their own need."""


def examine() -> int:
    """Print the table; exit code 0 where everything can be done, 3 where something is missing."""
    rows = [*_packages(), _platform(), _memory(), _disk(), _embedded(), _gpu()]
    table = Table(box=None, pad_edge=False)
    for header in ("", "what", "found"):
        table.add_column(header)
    for good, what, found in rows:
        table.add_row({True: "[green]yes[/green]", False: "[red]no[/red]", None: "-"}[good], what, found)
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    return int(ExitCode.UNDECIDED if any(good is False for good, *_ in rows) else ExitCode.PASS)


Row = tuple[bool | None, str, str]


def _packages() -> Iterator[Row]:
    for verb, names in PACKAGES.items():
        found, missing = [], []
        for name in names:
            try:
                found.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                missing.append(name)
        text = ", ".join(found) + (f"; missing {', '.join(missing)}: {NEEDS[verb]}" if missing else "")
        yield not missing, verb, text


def _platform() -> Row:
    system, arch = platform.system(), platform.machine()
    known = (system, arch) in {("Linux", "x86_64"), ("Darwin", "arm64")} and (3, 11) <= sys.version_info[:2] < (3, 14)
    engine = "Core AI CPU runtime" if system == "Linux" else "Core AI on CPU, GPU and Neural Engine"
    text = f"{system} {arch}, Python {platform.python_version()}"
    return known, "platform", f"{text}: {engine}" if known else f"{text}: no Core AI wheels for it"


def _memory() -> Row:
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None, "memory", f"{total / 2**30:.1f} GiB, {os.cpu_count()} cores"


def _disk() -> Row:
    free = shutil.disk_usage(Path.cwd()).free
    return free >= DISK, "disk", f"{free / 2**30:.1f} GiB free here"


def _embedded() -> Row:
    try:
        checkpoint = open_checkpoint()
    except HarnessError as error:
        return False, "checkpoint", str(error)
    return True, "checkpoint", f"{EMBEDDED.name}, digest {checkpoint.digest[:12]}"


def _gpu() -> Row:
    if importlib.util.find_spec("torch") is None:
        return None, "gpu", "not looked for: torch is missing"
    try:
        import torch
    except Exception as error:  # an installation that is broken: that is what a doctor is asked about
        return False, "gpu", f"torch is there and cannot be imported ({type(error).__name__}: {error})"
    return None, "gpu", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none; the CPU records as well"
