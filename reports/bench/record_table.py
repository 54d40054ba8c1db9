"""Renders what `record.py` wrote as the rows of the benchmark table.

    python reports/bench/record_table.py BENCH.json [BENCH.json ...] > reports/bench/record.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def rows(held: dict) -> list[str]:
    """One row a run, with its ratio to the plain forward and to the bound of the same file."""
    runs, bounds = held["runs"], held.get("bound", {})
    plain = runs.get("plain")
    found = []
    for name, run in runs.items():
        if name == "rates":
            continue
        cases = name.rpartition("-")[2] if name.rpartition("-")[2].isdecimal() else "1"
        oracle = run.get("oracle", {}).get("cases", {})
        passes = max((facts["passes"] for facts in oracle.values()), default=1)
        bound = bounds.get(cases, {}).get("bound_s")
        found.append(f"| {held['checkpoint']} | {name} | {cases} | {passes} | {run['wall_s']:.1f} | {run['cpu_s']:.1f} | "
                     f"{run['wall_s'] / plain['wall_s']:.2f} | " if plain else
                     f"| {held['checkpoint']} | {name} | {cases} | {passes} | {run['wall_s']:.1f} | {run['cpu_s']:.1f} | | ")
        found[-1] += f"{run['wall_s'] / bound:.2f} | " if bound else "| "
        found[-1] += f"{run['peak_rss_gib']:.2f} | {run['peak_anon_gib']:.2f} |"
    return found


def main() -> None:
    print("# Recording at full geometry\n\n`reports/bench/record.py` says what each run is; raw figures and memory over time "
          "are in the JSON files beside this one.\n")
    for path in map(Path, sys.argv[1:]):
        held = json.loads(path.read_text(encoding="utf-8"))
        machine, rates = held["machine"], held["runs"].get("rates", {}).get("said", {})
        print(f"## {path.name}\n\n{machine['date']}, {machine['cpu']}, {machine['cores']} cores, "
              f"{machine['memory_gib']} GiB, load before {machine['load_before']}; torch {machine['torch']}, transformers "
              f"{machine['transformers']}. " + ", ".join(f"{name} {value:.2f}" for name, value in rates.items()) + ".\n")
        print("| checkpoint | run | cases | passes | wall s | processor s | x plain | x bound | peak resident GiB | "
              "anonymous GiB |\n|---|---|---|---|---|---|---|---|---|---|")
        print("\n".join(rows(held)) + "\n")


if __name__ == "__main__":
    main()
