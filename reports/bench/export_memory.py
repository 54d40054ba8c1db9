"""Exports a checkpoint in a process of its own and samples its memory and the disk from outside, every 50 ms.

    python reports/bench/export_memory.py CHECKPOINT OUT [arguments of harness export]

Prints one JSON object: wall and processor seconds, peak anonymous and resident memory of the process tree in GiB, bytes
written below --out, and what the export said of itself. A sampler inside the process is blind while the converter holds
the interpreter's lock, so this one reads /proc.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

GIB = 2**30


def memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process and its children (Linux)."""
    anonymous = resident = 0
    for one in (pid, *children(pid)):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        anonymous += int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
        resident += int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
    return anonymous, resident


def children(pid: int) -> list[int]:
    """Pids of all descendants."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            direct = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        found += direct + [inner for child in direct for inner in children(child)]
    return found


def main(checkpoint: str, out: str, *extra: str) -> None:
    """Run, sample, print."""
    command = [sys.executable, "-m", "harness.cli", "export", checkpoint, "--out", out, "--overwrite", "--json", *extra]
    Path(out).mkdir(parents=True, exist_ok=True)
    free = least = shutil.disk_usage(out).free
    started, before = time.perf_counter(), os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        peak_anonymous = peak_resident = 0
        curve = []
        while child.poll() is None:
            anonymous, resident = memory(child.pid)
            peak_anonymous, peak_resident = max(peak_anonymous, anonymous), max(peak_resident, resident)
            least = min(least, shutil.disk_usage(out).free)
            curve.append((round(time.perf_counter() - started, 1), round(anonymous / GIB, 2)))
            time.sleep(0.05)
        said = child.stdout.read()
    after = os.times()
    print(json.dumps({
        "command": " ".join(command[1:]), "code": child.returncode, "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(after.children_user + after.children_system - before.children_user - before.children_system, 1),
        "peak_anonymous_gib": round(peak_anonymous / GIB, 2), "peak_resident_gib": round(peak_resident / GIB, 2),
        "disk_used_at_most_gib": round((free - least) / GIB, 2), "anonymous_over_time": curve[::40],
        "export": json.loads(said.strip().rpartition("\n")[2]) if child.returncode == 0 else said}))


if __name__ == "__main__":
    main(*sys.argv[1:])
