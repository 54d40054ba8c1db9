"""Bounds from measurement: run the rungs over healthy variations, and set each bound from what they differ by.

A bound is the larger of `MARGIN` times the largest healthy figure and the figure that a lognormal fitted to all of them
exceeds with probability `FALSE_ALARM`: errors multiply through a network, so their logarithms are what is about normal.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from statistics import NormalDist, fmean, pstdev

from harness.benign import VARIATIONS, Variation
from harness.bounds import Bound, Bounds
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.graph.quantize import RECIPES
from harness.graph.reference import Reference, large
from harness.graph.streamed import StreamedReference
from harness.ladder import NAMES
from harness.rungs import CHECKS
from harness.rungs.engine import SHARP
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

FALSE_ALARM = 1e-6
MARGIN = 4.0
"""Times the largest healthy figure in float32: other machines sum in orders that no variation here has shown."""
ROUNDED_MARGIN = 2.0
"""The same where fp16 or int8 decides: that arithmetic is the same on every machine, only other prompts differ."""
ROUNDING = 4 * 2.0**-24
"""Least bound on float32 values: an addition associated differently may move any of them by an ulp."""
SHAPE = ("rel_l2", "worst_token", "worst_channel", "norm_drift")
WIDE = 1e30
HEADROOM = 0.5

Key = tuple[str, str, str]
"""rung, metric, seams pattern."""


def calibrate(subject: Subject, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> list[Bound]:
    """Measure this model's healthy noise at every rung; bounds in the order of the ladder.

    The graph's rungs are measured over all variations, the bundle's over all cases of one healthy bundle. Raises
    HarnessError where something healthy fails for another reason than a bound.
    """
    samples: dict[Key, list[float]] = defaultdict(list)
    for done, (name, variation) in enumerate(VARIATIONS.items()):
        progress(f"variation {name}", done, len(VARIATIONS) + 1)
        varied = _Varied(subject.options, variation)
        varied.__dict__.update(oracle=subject.oracle, bounds=_wide(), say=subject.say)
        _measure(varied, ("vision", "decoder", "decode"), samples, "*")
    given = subject.options.bundle is not None or subject.options.mode is not None
    for mode in (subject.mode,) if given else RECIPES:
        progress(f"bundle {mode}", len(VARIATIONS), len(VARIATIONS) + 1)
        _bundle(subject, mode, samples)
    graph = f"healthy variations ({', '.join(name.replace('_', ' ') for name in VARIATIONS)})"
    # The last bound that covers a seam wins, so the broader pattern of a family stands before the narrower.
    ordered = sorted(samples.items(), key=lambda row: (NAMES.index(row[0][0]), len(row[0][2].split("@")[0])))
    return [_bound(key, values, graph, len(subject.cases)) for key, values in ordered] + [_headroom()]


def _bundle(subject: Subject, mode: str, samples: dict[Key, list[float]]) -> None:
    made = Subject(replace(subject.options, mode=mode, work=subject.options.work / mode))
    made.__dict__.update(oracle=subject.oracle, bounds=_wide(), say=subject.say)
    try:
        made.start_engine()
        _measure(made, ("quantized",), samples, mode)
        _measure(made, ("engine", "tokens"), samples, made.engine_key)
    finally:
        made.close()


class _Varied(Subject):
    """A Subject whose graph under test is ours, varied."""

    def __init__(self, options, variation: Variation) -> None:
        super().__init__(options)
        self._variation = variation

    def conversion(self, grid: tuple[int, int]) -> Reference:
        """Our graph, changed in place by the variation."""
        if ("varied", grid) not in self.memory:
            if large(self.checkpoint):
                graph: Reference = StreamedReference(self.checkpoint, grid, vary=self._variation)
            else:
                graph = Reference(self.geometry, grid, {name: value.float() for name, value in self.checkpoint.tensors()})
                self._variation(graph)
            self.memory["varied", grid] = graph
        return self.memory["varied", grid]


def _wide() -> Bounds:
    rows = [(rung, f"{way}.{name}", "*") for rung in ("vision", "decoder") for way in ("local", "accumulated")
            for name in SHAPE]
    rows += [(rung, name, "*") for rung in ("quantized", "engine") for name in SHAPE]
    rows += [("decode", name, "kv.*") for name in SHAPE]
    rows += [(rung, "kl", "kl") for rung in ("decode", "quantized")]
    rows += [(rung, "tie_margin", "tokens") for rung in ("decode", "quantized", "tokens")]
    return Bounds(Bound(rung, metric, WIDE, 0.0, "calibrating", "", seams) for rung, metric, seams in rows)


def _measure(subject: Subject, rungs: Sequence[str], samples: dict[Key, list[float]], engine: str) -> None:
    for rung in rungs:
        for case in CHECKS[rung].plan(subject):
            for verdict in CHECKS[rung].measure(subject, case):
                if verdict.outcome is Outcome.ERROR:
                    raise HarnessError(f"healthy, and yet {verdict.reason}", where=verdict.id)
                key = subject.sharp.key if case.endswith(SHARP) else engine
                for metric, seams, value in _figures(verdict):
                    samples[rung, metric, f"{seams}@{key}"].append(value)


def _figures(verdict: Verdict) -> Iterator[tuple[str, str, float]]:
    if verdict.seam == "tokens":
        yield "tie_margin", "tokens", 2 * float(verdict.figures["noise"])
    elif verdict.seam == "kl":
        yield "kl", "kl", float(verdict.value)
    else:
        seams = re.sub(r"\d+", "*", verdict.seam)  # one bound for each family: layers among layers, mergers among mergers
        for way, regions in verdict.figures.items():
            if isinstance(regions, Mapping) and "all" in regions:
                for name in SHAPE:
                    yield f"{way}.{name}".lstrip("."), seams, max(float(found[name]) for found in regions.values())


def _bound(key: Key, values: list[float], graph: str, cases: int) -> Bound:
    rung, metric, place = key
    seams, engine = place.split("@")
    logs = [math.log(value) for value in values if value > 0] or [-math.inf]
    spread = pstdev(logs) if len(logs) > 1 else 0.0
    tail = math.exp(fmean(logs) + NormalDist().inv_cdf(1 - FALSE_ALARM) * spread) if math.isfinite(logs[0]) else 0.0
    largest = max(values)
    margin = MARGIN if engine == "*" or "-fp32:" in engine else ROUNDED_MARGIN
    limit = round_up(max(margin * largest, tail, ROUNDING))
    source = graph if engine == "*" else f"one healthy bundle ({engine})"
    return Bound(rung, metric, limit, largest, f"{len(values)} figures of {source} over {cases} cases; the larger of "
                 f"{margin:g} x the largest and the lognormal's {FALSE_ALARM:g} tail", date.today().isoformat(), seams, engine, limit)


def _headroom() -> Bound:
    return Bound("headroom", "fraction", HEADROOM, 0.0, "set by hand: one bit of the fp16 range is left for inputs that "
                 "no case has shown", date.today().isoformat())


def round_up(value: float) -> float:
    """Up to two significant digits, so that a bound reads well and never falls below what was measured."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.1e}")


def to_toml(bounds: Sequence[Bound], command: str, checkpoint: str, geometry: Geometry) -> str:
    """A bounds file; `load_bounds` reads it back."""
    lines = ["# How much error is healthy, and why. Made by:", f"#   {command}",
             '# Whoever tightens or loosens a limit says why: by_hand = "...". Without it the file does not load.', "",
             "[made_for]", f"checkpoint = {json.dumps(checkpoint)}",
             *(f"{name} = {size}" for name, size in geometry.shape.items()), ""]
    for bound in bounds:
        lines.append("[[bound]]")
        for name, value in vars(bound).items():
            if value in ("*", "", None):
                continue
            text = f"{value:.3g}" if isinstance(value, float) else '"' + value.replace('"', "'") + '"'
            lines.append(f"{name} = {text if not isinstance(value, float) or any(c in text for c in '.e') else text + '.0'}")
        lines.append("")
    return "\n".join(lines)
