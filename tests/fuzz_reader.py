"""Mutated programs through the whole reader: our own checks first, then Apple's bindings in a process of its own.

    python tests/fuzz_reader.py [COUNT] [SEED]        # by default 10000 files, seed 0; prints a Markdown table

A mutated file carries a hash that fits it, so that its damage reaches the reader. The bindings are imported once and each
file is read in a fork of that process, as `read_program` reads it in a child: what dies there, dies alone. A fork may use
LIMIT_S seconds and MEMORY bytes more than it began with.
"""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness.engines.mlirb import parse
from harness.errors import HarnessError

LIMIT_S = 20
MEMORY = 2 << 30
OPENED, SENTENCE, ABORTED, SLOW, STRANGE = "read", "refused with a sentence", "killed its reader", "too slow", "escaped"
BLIND = (OPENED, SENTENCE, ABORTED)
"""Outcomes that a caller sees as a program, a HarnessError or an Undecided."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file: kind, the sentence or signal, seconds, and bytes of memory at most."""

    kind: str
    said: str
    seconds: float
    memory: int


def mutate(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One way of damage and the bytes it leaves."""
    way = draw.choice(("truncated", "bits", "bytes", "header", "number", "copied", "tables", "zeros"))
    made = bytearray(data)
    if way == "truncated":
        return way, data[:draw.randrange(len(data))]
    if way == "header":  # magic, version, producer, first section
        made[draw.randrange(48)] = draw.randrange(256)
    elif way == "number":  # a count, size or offset
        place = draw.randrange(len(data) - 9)
        made[place:place + 9] = b"\x00" + struct.pack("<Q", draw.choice((0, 1, 1 << 31, 1 << 40, (1 << 64) - 1)))
    elif way == "copied":
        start, end, to = (draw.randrange(len(data)) for _ in range(3))
        part = data[min(start, end):max(start, end)][:64]
        made[to:to + len(part)] = part
    elif way == "zeros":
        place = draw.randrange(len(data))
        made[place:place + 32] = bytes(min(32, len(data) - place))
    for _ in range(draw.randint(1, 8) if way in ("bits", "bytes", "tables") else 0):
        # Attributes and types, operations and tables of names stand at both ends, weights between them.
        near = draw.choice((6000, 30000, len(data)))
        place = draw.randrange(min(near, len(data)))
        place = len(data) - 1 - place if draw.random() < 0.5 or way == "tables" else place
        made[place] = made[place] ^ 1 << draw.randrange(8) if way == "bits" else draw.randrange(256)
    return way, bytes(made)


def read(data: bytes, folder: Path) -> Outcome:
    """What `read_program` makes of these bytes, hash apart; the bindings must be imported in this process already."""
    started = time.monotonic()
    try:
        parse(data)
    except HarnessError as error:
        return Outcome(SENTENCE if "\n" not in str(error) else STRANGE, f"ours: {error.what}", time.monotonic() - started, 0)
    asset = folder / "x.aimodel"
    asset.mkdir(exist_ok=True)
    (asset / "main.mlirb").write_bytes(data)
    incoming, outgoing = os.pipe()
    child = os.fork()
    if not child:
        os.close(incoming)
        _read_and_leave(asset, outgoing)
    os.close(outgoing)
    with os.fdopen(incoming, "rb") as answers:
        said = answers.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(child, 0)
    seconds, memory = time.monotonic() - started, usage.ru_maxrss << 10
    if os.WIFSIGNALED(status):
        slow = os.WTERMSIG(status) == signal.SIGALRM
        return Outcome(SLOW if slow else ABORTED, signal.Signals(os.WTERMSIG(status)).name, seconds, memory)
    return Outcome({0: OPENED, 1: SENTENCE, 3: ABORTED}.get(os.WEXITSTATUS(status), STRANGE), said, seconds, memory)


def _read_and_leave(asset: Path, outgoing: int) -> None:
    """The fork: reads as `harness.engines.replay.reader` does, and says what it raised."""
    from harness.engines.replay import reader

    class Desk:
        job = {"asset": str(asset)}

        @staticmethod
        def put(name: str, arrays: object, facts: object) -> None:
            pass

    faulthandler.disable()  # an abort is an outcome here, and its traceback would fill the log of the tests
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.alarm(LIMIT_S)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code, said = 0, ""
    try:
        reader._work(Desk())
    except HarnessError as error:
        code, said = 1 if "\n" not in str(error) else 2, error.what
    except Exception as error:  # `worker.serve` makes an Undecided of it, with its first line
        code, said = 3, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    os.write(outgoing, said[:500].encode())
    os._exit(code)


def prepare() -> None:
    """Import the bindings in this process."""
    from coreai.authoring.asset import AIModelAsset  # noqa: F401
    from coreai._compiler import ir  # noqa: F401  # isort: skip


def fuzz(assets: list[Path], count: int, seed: int) -> list[tuple[str, str, Outcome]]:
    """(asset, way of damage, outcome) of `count` mutated files, the same for the same seed and assets."""
    draw, found = random.Random(seed), []
    held = [(asset.name, (asset / "main.mlirb").read_bytes()) for asset in assets]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            name, data = held[number % len(held)]
            way, mutated = mutate(data, draw)
            found.append((name, way, read(mutated, Path(folder))))
    return found


def table(found: list[tuple[str, str, Outcome]]) -> str:
    """Markdown: ways of damage by outcome."""
    kinds = (OPENED, SENTENCE, ABORTED, SLOW, STRANGE)
    counts = Counter((way, outcome.kind) for _, way, outcome in found)
    lines = [f"| damage | files | {' | '.join(kinds)} |", f"|{'---|' * (len(kinds) + 2)}"]
    for way in sorted({way for _, way, _ in found}):
        row = [counts[way, kind] for kind in kinds]
        lines.append(f"| {way} | {sum(row)} | {' | '.join(map(str, row))} |")
    slowest, biggest = max(one.seconds for *_, one in found), max(one.memory for *_, one in found)
    lines.append(f"\nSlowest {slowest:.2f} s; most memory of a reading process {biggest / 2**20:.0f} MiB, bindings included.")
    return "\n".join(lines)


def _main(count: int = 10_000, seed: int = 0) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    from small_bundle import small_bundle

    small = small_bundle()
    prepare()
    started = time.monotonic()
    found = fuzz([small.decoder, small.dynamic, small.vision], count, seed)
    print(table(found))
    print(f"{count} files, seed {seed}, {time.monotonic() - started:.0f} s")
    said = Counter(outcome.said for *_, outcome in found if outcome.kind in (ABORTED, STRANGE, SLOW))
    print("\nWhat killed or stopped the reading process:\n")
    print("\n".join(f"- {number} x {what}" for what, number in said.most_common(20)))
    return int(any(outcome.kind not in BLIND for *_, outcome in found))


if __name__ == "__main__":
    sys.exit(_main(*map(int, sys.argv[1:])))
