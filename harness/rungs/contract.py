"""Contract: what follows from (id, position) alone is exact: the host's rope shift, in-graph planes, DeepStack rows.

Behind the cases stand the probes: every operation on inputs that no prompt has, see `harness.probes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from harness.graph.contract import positions
from harness.ladder import exact
from harness.probes import Call, planned
from harness.rungs.swept import swept
from harness.streaming.room import load
from harness.subject import Subject, streams
from harness.subject.sweeps import together
from harness.verdict import Outcome, Verdict

NAME, PROBES = "contract", "probes"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Host planes and graph planes for every case; the DeepStack additions where there is an image."""
    taps = [f"deepstack.{tap}" for tap in range(len(subject.geometry.deepstack_taps))]
    return {**{name: ["host.positions", "graph.positions", *(taps if case.images else [])]
               for name, case in subject.cases.items()}, PROBES: planned(subject.geometry)}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """Exact comparisons with HF's planes and with index arithmetic."""
    if case == PROBES:
        return _probes(subject)
    geometry, recorded, ids = subject.geometry, subject.recorded(case), subject.sequence(case)
    grid = recorded.inputs.grid
    merged = (grid[1] // geometry.merge, grid[2] // geometry.merge) if grid else None
    host = subject.host(ids, geometry.image_token, geometry.vocab, merged)
    ours = positions(host.ids, geometry.vocab, host.shift_start, host.shift_amount, merged[1] if merged else 1)
    verdicts = [exact(NAME, case, "host.positions", recorded.positions, ours, "planes from extension ids and rope shift")]
    streamed = streams(subject.conversion(subject.grid(case)))
    trace = swept(subject).traces[case] if streamed else subject.graph_trace(case, "accumulated")
    if "decoder.positions" in trace:
        verdicts.append(_planes(case, recorded.positions, trace["decoder.positions"].T))
    else:
        verdicts.append(Verdict(NAME, case, "graph.positions", Outcome.SKIP, "the graph under test does not offer them"))
    if merged:
        image = host.ids >= geometry.vocab
        verdicts += [_deepstack(case, tap, trace, image) for tap in range(len(geometry.deepstack_taps))]
    return verdicts


def _planes(case: str, expected: np.ndarray, found: np.ndarray) -> Verdict:
    """Equal, or apart by one constant: attention sees differences of positions only."""
    apart = offset(expected, found)
    words = f"planes inside the graph, {apart} further throughout" if apart else "planes inside the graph"
    return exact(NAME, case, "graph.positions", expected + apart, found, words)


def offset(expected: np.ndarray, found: np.ndarray) -> int:
    """The constant by which all positions differ, 0 where there is none."""
    if expected.shape != found.shape or not expected.size:
        return 0
    apart = found.astype(np.int64) - expected
    return int(apart.flat[0]) if (apart == apart.flat[0]).all() else 0


def _probes(subject: Subject) -> list[Verdict]:
    """Each reading as a verdict; its figure counts in what float32 rounding may cost there, so the bound is 1."""
    from harness.probes import probe

    verdicts, graph = [], subject.conversion(subject.options.grid)
    make = partial(_together, subject, graph) if streams(graph) else None
    for one in probe(graph, subject.checkpoint, subject.options.grid, make):
        if one.error is None:
            verdicts.append(Verdict(NAME, PROBES, one.seam, Outcome.SKIP, one.lacking))
            continue
        verdicts.append(Verdict(NAME, PROBES, one.seam, Outcome.PASS if one.error <= 1 else Outcome.FAIL, one.words,
                                "roundings", one.error, 1.0,
                                figures={"place": one.place} if one.place else {}))
    return verdicts


def _together(subject: Subject, graph: Any, calls: Sequence[Call]) -> None:
    """Calls of a graph that streams, each weight read once for all that fit into memory at once."""
    loads = [load(subject.geometry, call.tokens, call.patches, call.slots, call.layers) for call in calls]
    together(subject, "probes", [graph], loads, [call.run for call in calls])


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
