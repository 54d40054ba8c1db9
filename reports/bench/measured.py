"""What the benchmark scripts share: a command run in its own process, its memory sampled, and the machine described."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
EVERY_S = 0.05
sys.path.insert(0, str(ROOT))


def run(name: str, command: list[str]) -> dict[str, Any]:
    """Run a command to its end: seconds, peak resident and anonymous memory (GiB), processor seconds, samples of memory.

    A sample is [seconds, resident GiB, anonymous GiB]; the last line that the command prints on stdout is kept.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    started, samples = time.perf_counter(), []
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    watcher = threading.Thread(target=_watch, args=(child.pid, started, samples), daemon=True)
    watcher.start()
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{name}: ended with {child.returncode}: {' '.join(command)}\n{said[-2000:]}")
    lines = said.strip().splitlines()
    found = {"name": name, "command": " ".join(Path(part).name if "/" in part else part for part in command),
             "wall_s": round(seconds, 2), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
             "peak_rss_gib": round(usage.ru_maxrss / 2**20, 3),
             "peak_anon_gib": round(max((row[2] for row in samples), default=0), 3), "said": re.sub(r"\S*/", "", lines[-1]) if lines else "",
             "samples": samples[::max(1, len(samples) // 400)]}
    if lines and lines[-1].startswith("{"):
        found["said"] = json.loads(lines[-1])
    print(f"{name}: {found['wall_s']} s wall, {found['cpu_s']} s of processor, peak {found['peak_rss_gib']} GiB resident, "
          f"{found['peak_anon_gib']} GiB anonymous", flush=True)
    return found


def written(held: dict[str, Any]) -> str:
    """As JSON, each sample of memory on one line."""
    return re.sub(r"\[\s+([\d.]+),\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2, \3]", json.dumps(held, indent=1)) + "\n"


def machine() -> dict[str, Any]:
    """Where and when, and how busy it was."""
    import torch
    import transformers

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "cpu": model, "cores": os.cpu_count(),
            "memory_gib": round(memory, 1), "load_before": round(os.getloadavg()[0], 2), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version()}


def _watch(pid: int, started: float, samples: list) -> None:
    path = Path(f"/proc/{pid}/status")
    while True:
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            samples.append([round(time.perf_counter() - started, 2),
                            *(round(int(fields[key].split()[0]) / 2**20, 4) for key in ("VmRSS", "RssAnon"))])
        except (OSError, KeyError, ValueError):  # the process has ended
            return
        time.sleep(EVERY_S)
