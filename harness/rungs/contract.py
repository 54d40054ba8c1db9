"""Contract: what follows from (id, position) alone is exact: the host's rope shift, in-graph planes, DeepStack rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.graph.contract import positions
from harness.ladder import exact
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

NAME = "contract"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Host planes and graph planes for every case; the DeepStack additions where there is an image."""
    taps = [f"deepstack.{tap}" for tap in range(len(subject.geometry.deepstack_taps))]
    return {name: ["host.positions", "graph.positions", *(taps if case.images else [])]
            for name, case in subject.cases.items()}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """Exact comparisons with HF's planes and with index arithmetic."""
    geometry, recorded, ids = subject.geometry, subject.recorded(case), subject.sequence(case)
    grid = recorded.inputs.grid
    merged = (grid[1] // geometry.merge, grid[2] // geometry.merge) if grid else None
    host = subject.host(ids, geometry.image_token, geometry.vocab, merged)
    ours = positions(host.ids, geometry.vocab, host.shift_start, host.shift_amount, merged[1] if merged else 1)
    verdicts = [exact(NAME, case, "host.positions", recorded.positions, ours, "planes from extension ids and rope shift")]
    trace = subject.graph_trace(case, "accumulated")
    if "decoder.positions" in trace:
        verdicts.append(exact(NAME, case, "graph.positions", recorded.positions, trace["decoder.positions"].T,
                              "planes inside the graph"))
    else:
        verdicts.append(Verdict(NAME, case, "graph.positions", Outcome.SKIP, "the graph under test does not offer them"))
    if merged:
        image = host.ids >= geometry.vocab
        verdicts += [_deepstack(case, tap, trace, image) for tap in range(len(geometry.deepstack_taps))]
    return verdicts


def _deepstack(case: str, tap: int, trace: Mapping[str, np.ndarray], image: np.ndarray) -> Verdict:
    """After layer `tap`, image rows gain exactly their slot's row, text rows nothing.

    The sum is recomputed in float64 and must be met within the rounding of one float32 addition.
    """
    seam, before_name = f"deepstack.{tap}", f"decoder.layers.{tap:02d}"
    names = (before_name, f"{before_name}.deepstack", f"vision.deepstack.{tap}")
    lacking = [name for name in names if name not in trace]
    if lacking:
        return Verdict(NAME, case, seam, Outcome.SKIP, f"the graph under test does not offer {lacking[0]}")
    before, after, rows = (trace[name].astype(np.float64) for name in names)
    expected = before.copy()
    expected[image] += rows
    wrong = np.abs(after - expected) > np.finfo(np.float32).eps * (np.abs(before) + np.abs(expected))
    return exact(NAME, case, seam, np.zeros(len(wrong), dtype=np.int64), wrong.sum(axis=-1),
                 f"wrong channels a token after the DeepStack addition {tap}")
