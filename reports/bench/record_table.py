"""Renders what `record.py` wrote as the rows of the benchmark table.

    python reports/bench/record_table.py BENCH.json [BENCH.json ...] > reports/bench/record.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


WHAT = {"undrafted": "ours, no draft given", "drafted": "ours, draft given", "plain": "plain Hugging Face, one forward",
        "generate": "plain Hugging Face, 24 tokens decoded",
        "accelerate": "accelerate, 2 GiB, rest on disk"}


def rows(held: dict) -> list[str]:
    """One row a run, with its ratio to the plain forward, to accelerate and to the bound of the same file."""
    runs = held["runs"]
    return [_row(name, run, {base: runs[base] for base in ("plain", "accelerate") if base in runs})
            for name, run in runs.items() if name != "rates"]


def _row(name: str, run: dict, bases: dict) -> str:
    cases = run.get("oracle", {}).get("cases", {})
    passes = max((facts["passes"] for facts in cases.values()), default=1)
    draft = next(iter(cases.values()), {}).get("draft", "")
    what, count = name.partition("-")[0], run.get("cases", 1)
    alone = count == 1 and run.get("kind", "image") == "image"
    ratios = [f"{run['wall_s'] / bases[base]['wall_s']:.2f}" if base in bases and alone else ""
              for base in ("plain", "accelerate")]
    bound = f"{run['wall_s'] / run['bound']['bound_s']:.2f}" if "bound" in run else ""
    memory = f"{run['peak_rss_gib'] / bases['plain']['peak_rss_gib']:.2f}" if "plain" in bases and alone else ""
    label = WHAT.get(what, what) + (", its own made" if draft == "own" else "")
    return "| " + " | ".join([
        label, f"{count} {run.get('kind', 'image')}", str(passes), f"{run['wall_s']:.1f}", f"{run['cpu_s']:.1f}", *ratios,
        bound, f"{run['peak_rss_gib']:.2f}", memory, f"{run['peak_anon_gib']:.2f}"]) + " |"


def main() -> None:
    print("# Recording at full geometry\n\n`reports/bench/record.py` says what each run is; raw figures and memory over time "
          "are in the JSON files beside this one.\n")
    for path in map(Path, sys.argv[1:]):
        held = json.loads(path.read_text(encoding="utf-8"))
        machine, rates = held["machine"], held["runs"].get("rates", {}).get("said", {})
        print(f"## {path.name}\n\n{machine['date']}, {machine['cpu']}, {machine['cores']} cores, "
              f"{machine['memory_gib']} GiB, load before {machine['load_before']}; torch {machine['torch']}, transformers "
              f"{machine['transformers']}. " + ", ".join(f"{name} {value:.2f}" for name, value in rates.items()) + ".\n")
        print(f"{held['checkpoint']}:\n\n| run | cases | float32 passes | wall s | processor s | x plain | x accelerate | "
              "x bound | peak resident GiB | x plain's | anonymous GiB |\n|" + "---|" * 11)
        print("\n".join([*rows(held), ""]) + (f"\n{held['note']}\n" if "note" in held else ""))


if __name__ == "__main__":
    main()
