"""The ladder as numbers: for each seam in order of computation, its error by way and region, its bound and noise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.bounds import Bound, Bounds
from harness.report.plain import integer, mapping, number, rows
from harness.run import Run
from harness.verdict import Outcome, Verdict, worst

WAYS = ("local", "accumulated", "")
REGIONS = ("image", "text", "all")
DRAWN = ("worst_token", "rel_l2", "worst_channel", "cosine_gap", "norm_drift", "max_abs")
"""Metrics fit to be drawn, the most telling first: whole-tensor figures hide a dead token."""
_STREAM = re.compile(r"vision\.(?:embed|merger|layers\.\d+|deepstack\.\d+)"
                     r"|decoder\.(?:embed|norm|layers\.\d+(?:\.deepstack)?)|logits")


@dataclass(frozen=True)
class Mark:
    """One measured error of one way, region and seam, with the place of the worst, counted within the region."""

    value: float
    case: str
    token: int | None
    max_abs: float | None
    max_abs_at: Sequence[int]
    cosine: float | None
    worst_cosine: float | None


@dataclass
class Step:
    """One seam: marks by (way, region), limits by way as (bound, benign noise), and its verdicts in all cases."""

    seam: str
    marks: dict[tuple[str, str], Mark] = field(default_factory=dict)
    limits: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """The worst over the cases."""
        return worst(verdict.outcome for verdict in self.verdicts)

    @property
    def leading(self) -> Verdict:
        """The first verdict of that outcome."""
        return next(verdict for verdict in self.verdicts if verdict.outcome is self.outcome)


@dataclass(frozen=True)
class Ladder:
    """Steps in order; `metrics` names what is drawn of each way; `case` is None where steps are worst over cases."""

    rung: str
    case: str | None
    metrics: Mapping[str, str]
    steps: tuple[Step, ...]

    @property
    def broken(self) -> int | None:
        """Index of the first step that failed."""
        return next((at for at, step in enumerate(self.steps) if step.outcome is Outcome.FAIL), None)

    @property
    def first(self) -> str | None:
        """Name of the first seam that failed."""
        return None if self.broken is None else self.steps[self.broken].seam

    @property
    def ways(self) -> list[str]:
        """Ways that have any mark, in reading order."""
        return [way for way in WAYS if any(way == found for step in self.steps for found, _ in step.marks)]

    @property
    def regions(self) -> list[str]:
        """Regions that have any mark."""
        return [name for name in REGIONS if any(name == found for step in self.steps for _, found in step.marks)]

    def only(self, seams: Iterable[str]) -> Ladder:
        """The same ladder, restricted."""
        chosen = set(seams)
        return Ladder(self.rung, self.case, self.metrics, tuple(step for step in self.steps if step.seam in chosen))

    @property
    def families(self) -> dict[str, Ladder]:
        """The seams between layers by family, as one draws them; what lies inside a layer is left for `inside`."""
        streams = [step.seam for step in self.steps if owner(step.seam) is None]
        names = dict.fromkeys(family(seam) for seam in streams)
        return {name: self.only(seam for seam in streams if family(seam) == name) for name in names}

    def inside(self, seam: str) -> Ladder:
        """The seams inside the layer of `seam`, and its output."""
        whole = owner(seam) or seam
        return self.only(step.seam for step in self.steps if step.seam == whole or owner(step.seam) == whole)


def owner(seam: str) -> str | None:
    """The layer that a seam lies inside of; None for a seam of the stream itself, or one that we do not know."""
    found = _STREAM.match(seam)
    return found[0] if found and seam[found.end():found.end() + 1] == "." else None


def family(seam: str) -> str:
    """Which picture a seam stands in: vision, decoder or kv (the cache); empty for a name that is none of ours."""
    if _STREAM.match(seam):
        return "vision" if seam.startswith("vision.") else "decoder"
    return "kv" if seam.startswith("kv.") else ""


def ladder(run: Run, rung: str, case: str | None = None) -> Ladder:
    """The ladder of one rung, of one case or the worst over all; no steps where the rung measured no distances."""
    verdicts = [verdict for verdict in run.of(rung) if case is None or verdict.case == case]
    table, whose = bounds(run), engines(run, rung)
    metrics = _metrics(verdicts, table, rung)
    pictured = {row.get("name"): bool(row.get("image")) for row in rows(run.cases) if isinstance(row.get("name"), str)}
    steps: dict[str, Step] = {}
    for verdict in verdicts:
        if not metrics or not (family(verdict.seam) or _measured(verdict)):
            continue
        step = steps.get(verdict.seam)
        if step is None:
            step = steps[verdict.seam] = Step(verdict.seam, limits=_limits(table, rung, verdict, whose, metrics))
        step.verdicts.append(verdict)
        bare = "image" if verdict.seam.startswith("vision.") else "all" if pictured.get(verdict.case, True) else "text"
        _add(step, verdict, metrics, bare)
    return Ladder(rung, case, metrics, tuple(steps.values()))


def _add(step: Step, verdict: Verdict, metrics: Mapping[str, str], bare: str) -> None:
    """Keep the verdict's marks where they are worse than those of the cases before; `bare` names the sole region."""
    for way, regions in mapping(verdict.figures).items():
        metric, found = metrics.get(way), mapping(regions)
        if metric is None:
            continue
        apart = [name for name in ("image", "text") if name in found]
        for region in apart or ["all"]:
            figures = mapping(found.get(region))
            value = number(figures.get(metric))
            key = (way, region if apart else bare)
            if value is None or key in step.marks and step.marks[key].value >= value:
                continue
            at = figures.get("max_abs_at")
            step.marks[key] = Mark(value, verdict.case, integer(figures.get("worst_token_at")),
                                   number(figures.get("max_abs")), at if isinstance(at, (list, tuple)) else (),
                                   number(figures.get("cosine")), number(figures.get("worst_token_cosine")))


def _metrics(verdicts: Sequence[Verdict], bounds: Bounds, rung: str) -> dict[str, str]:
    """What to draw of each way that was measured: the most telling metric that has a bound."""
    ways = {way for verdict in verdicts for way in _measured(verdict)}
    bounded = [bound.metric for bound in bounds.all if bound.rung == rung]
    return {way: next((name for name in DRAWN if (f"{way}.{name}" if way else name) in bounded), DRAWN[0])
            for way in WAYS if way in ways}


def _measured(verdict: Verdict) -> list[str]:
    """The ways in which the verdict holds distances."""
    return [way for way, regions in mapping(verdict.figures).items()
            if way in WAYS and isinstance(mapping(regions).get("all"), Mapping)]


def _limits(bounds: Bounds, rung: str, verdict: Verdict, engines: Sequence[str],
            metrics: Mapping[str, str]) -> dict[str, tuple[float, float | None]]:
    """Bound and noise by way; the bound that the verdict itself names where the table has none for its engine."""
    names = {way: f"{way}.{metric}" if way else metric for way, metric in metrics.items()}
    found = next((found for engine in engines if (found := bounds.at(rung, verdict.seam, engine))), {})
    limits: dict[str, tuple[float, float | None]] = {}
    for way, name in names.items():
        if name in found:
            limits[way] = (found[name].limit, found[name].measured)
        elif verdict.metric == name and verdict.bound is not None:
            limits[way] = (verdict.bound, None)
    return limits


def bounds(run: Run) -> Bounds:
    """The record's own bounds, not those of this checkout; rows that are none are left out."""
    found = []
    for row in rows(run.bounds):
        limit, noise = number(row.get("limit")), number(row.get("measured"))
        named = [row.get(key) for key in ("rung", "metric")]
        if limit is None or not all(isinstance(name, str) for name in named):
            continue
        found.append(Bound(*named, limit, 0.0 if noise is None else noise, str(row.get("because", "")),
                           str(row.get("date", "")), str(row.get("seams", "*")), str(row.get("engine", "*"))))
    return Bounds(found)


def engines(run: Run, rung: str) -> list[str]:
    """By whose bounds a rung was judged: what an engine computed by that engine's, the twin's price by its mode."""
    engine, subject = mapping(run.engine), mapping(run.subject)
    mode = subject.get("mode") or mapping(subject.get("bundle")).get("mode")
    if rung in ("engine", "tokens"):
        hidden = mapping(mapping(subject.get("checkpoint")).get("geometry")).get("hidden")
        names = [f"{engine.get('name')}:{mode}:h{hidden}", engine.get("name")]
    elif rung == "quantized":
        names = [mode]
    else:
        names = []
    return [name for name in names if isinstance(name, str)] + [""]
