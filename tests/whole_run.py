"""A record that holds every row its cases call for, made up: what `harness verify` may accept. No model is run."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from harness import scrutiny
from harness.run import Run
from harness.verdict import Outcome, Verdict

GEOMETRY = {"layers": 1, "vision_layers": 1, "deepstack_taps": [0]}
CASES = [{"name": name, "image": image, "engine": True} for name, image in (("scene-211", {"count": 4}), ("text-only", None))]


def passing(rung: str, case: str, seam: str) -> Verdict:
    return Verdict(rung, case, seam, Outcome.PASS, "fine", "mismatches", 0.0, 0.0)


def whole_verdicts() -> list[Verdict]:
    """Every row of two cases of a model with one layer."""
    planned = dict(scrutiny.planned(SimpleNamespace(**GEOMETRY), CASES, set()))
    rows = [*((rung, case["name"], "s") for rung in ("contract", "inputs") for case in CASES), ("weights", "graph", "s"),
            *((rung, case, seam) for (rung, case), seams in planned.items() for seam in sorted(seams))]
    return [passing(*row) for row in rows]


def whole_run(policy: dict[str, Any], bundle_digest: str) -> Run:
    """That run, of a bundle."""
    return Run(policy=policy, verdicts=whole_verdicts(), cases=json.loads(json.dumps(CASES)), subject={
        "bundle": {"digest": bundle_digest}, "checkpoint": {"geometry": GEOMETRY}})
