"""The weight audit of a bundle pair beside a plain read of the same files, in one run.

    python reports/bench/audit_speed.py CHECKPOINT DECODER_BUNDLE VISION_BUNDLE

Prints one JSON object: seconds and GB/s of reading checkpoint and bundles (before and after the audit, into one buffer),
of opening (sha256 of the programs), of the structure, of the audit itself, with processor seconds and peak anonymous
memory, and how many tensors passed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path


def read(files: list[Path]) -> float:
    """Seconds to read the files into one buffer."""
    buffer, started = bytearray(1 << 24), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def anonymous() -> int:
    """Anonymous bytes of this process now (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(checkpoint: str, decoder: str, vision: str) -> None:
    """Measure and print."""
    from harness.options import Options
    from harness.rungs import weights
    from harness.subject import Subject

    files = [path for root in (checkpoint, decoder, vision) for path in sorted(Path(root).rglob("*"))
             if path.suffix in (".safetensors", ".mlirb")]
    size = sum(path.stat().st_size for path in files)
    before = read(files)
    subject = Subject(Options(checkpoint=checkpoint, bundle=Path(decoder), vision_bundle=Path(vision)))
    times, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        times[name], started = round(time.perf_counter() - started, 2), time.perf_counter()

    _ = subject.bundle, subject.vision_bundle
    lap("open_s")
    _ = subject.programs()
    lap("structure_s")
    peak, stop = [0], []
    import threading

    def watch() -> None:
        while not stop:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu = time.process_time()
    verdicts = weights.measure(subject, "bundle")
    lap("audit_s")
    cpu = time.process_time() - cpu
    stop.append(1)
    watcher.join()
    after = read(files)
    print(json.dumps({"bytes": size, "read_before_s": round(before, 2), "read_after_s": round(after, 2), **times,
                      "audit_cpu_s": round(cpu, 2), "audit_over_read": round(times["audit_s"] / min(before, after), 2),
                      "peak_anonymous_gib": round(peak[0] / 2**30, 2),
                      "max_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                      "verdicts": Counter(verdict.outcome.value for verdict in verdicts),
                      "not_passed": [(verdict.seam, verdict.reason) for verdict in verdicts
                                     if verdict.outcome.value != "PASS"][:5]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
