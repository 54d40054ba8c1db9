"""The decoder ladder of a checkpoint that streams, local and accumulated, beside one forward of the same graph.

    python reports/bench/ladder.py CHECKPOINT OUT.json [--rounds 3] [--oracle DIR]

Both read every weight once; the ladder computes each layer twice (on the oracle's values and on the graph's own) and takes
all distances of each seam. A text case of some 210 tokens, so that nothing but the decoder runs; forward and ladder take
turns in one process, then the ladder runs once more under cProfile ("profiled": its seconds, and those of F.linear). The
oracle is recorded first where DIR does not hold it.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from pathlib import Path

from measured import machine

CASE = """[[case]]
name = "long-text"
why = "as many tokens as an image brings, without one"
decode = 24
turns = [{{ role = "user", text = "{}" }}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--oracle", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.out.parent) as scratch:
        cases = Path(scratch) / "cases.toml"
        cases.write_text(CASE.format("Tell me a story. " * 40), encoding="utf-8")
        found = measure(given.checkpoint, cases, given.oracle or Path(scratch) / "oracle", given.rounds)
    found = {"machine": machine(), "checkpoint": given.checkpoint.name, **found}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def measure(root: Path, cases: Path, oracle: Path, rounds: int) -> dict:
    """Seconds of each, round by round."""
    from harness.cases import load_cases
    from harness.checkpoint import open_checkpoint
    from harness.engines import Request
    from harness.graph.reference import LARGE
    from harness.graph.streamed import StreamedReference, together
    from harness.options import Options
    from harness.oracle import record
    from harness.rungs import swept
    from harness.subject import Subject

    checkpoint = open_checkpoint(str(root))
    if checkpoint.weight_bytes() <= LARGE:
        raise SystemExit("this checkpoint does not stream")
    record(checkpoint, load_cases(cases), oracle)
    subject = Subject(Options(checkpoint=str(root), oracle=oracle, cases=cases))
    conversion = subject.conversion(subject.grid("long-text"))
    assert isinstance(conversion, StreamedReference)
    recorded, engine = subject.recorded("long-text"), subject.graph("long-text")
    request = Request(recorded.inputs, forced=tuple(map(int, recorded.rollout.tokens)))
    spent: dict[str, list[float]] = {"forward": [], "ladder": []}
    for _ in range(rounds):
        spent["forward"].append(seconds(lambda: together([conversion], [lambda: next(engine.run([request]))])))
        spent["ladder"].append(seconds(lambda: swept._Sweep(subject).run()))
    profile, sweep = cProfile.Profile(), swept._Sweep(subject)
    took = seconds(lambda: profile.runcall(sweep.run))
    products = sum(row[2] for (_, _, name), row in pstats.Stats(profile).stats.items() if "_nn.linear" in name)
    spent["profiled"] = [took, round(products, 2)]
    return {"tokens": len(subject.sequence("long-text")), "seams": len(swept._Sweep(subject).stream), **spent,
            "ratio": round(statistics.median(spent["ladder"]) / statistics.median(spent["forward"]), 2)}


def seconds(call) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return round(time.perf_counter() - started, 2)


if __name__ == "__main__":
    main()
