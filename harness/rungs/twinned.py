"""What the twin's rungs measure of a twin that streams: for all cases at once, and judged as the values come.

The judgements are those of the rungs themselves; only when they are made differs. On the oracle's tokens the twin is
compared with the oracle, and chooses its own; on its own tokens with the engine. Of its activations nothing is kept but
the largest of each seam, and the logits that choose its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from harness.engines import Request
from harness.errors import HarnessError
from harness.plan import SHARP
from harness.rungs.heat import token_errors
from harness.rungs.swept import Judged
from harness.subject import Subject
from harness.subject.sweeps import for_all
from harness.trace import decoder_seams

T = TypeVar("T")


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of an array, NaN where it holds one, and where it stands."""

    largest: float
    at: tuple[int, ...]


def peak(array: np.ndarray) -> Peak:
    """Of an activation."""
    size = np.abs(array)
    place = tuple(int(part) for part in np.unravel_index(size.argmax(), size.shape))
    return Peak(float(size[place]), place)


@dataclass
class Twinned(Judged):
    """rows by case: logits [n, V] that choose the twin's own tokens. heat by (case, seam): see `harness.rungs.heat`."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    heat: dict[tuple[str, str], list[float | None]] = field(default_factory=dict)


def forced(subject: Subject) -> Twinned:
    """Every case on the oracle's tokens, against the oracle; the twin's own tokens come of it, see `twin_tokens`."""
    return _once(subject, "forced", _forced)


def own(subject: Subject) -> Twinned:
    """The cases that the bundle runs, on the twin's own tokens, against every engine that has got that far."""
    return _once(subject, "own", _own)


def peaks(subject: Subject) -> Mapping[str, Mapping[str, Peak]]:
    """The largest magnitude at every seam of every case, on the twin's own tokens; in a sweep of their own only cases
    that no other sweep has brought through."""
    forced(subject)
    lacking = [case for case in subject.cases if case not in _peaks(subject)]
    if lacking:
        for_all(subject, "headroom", subject.twin, lambda case: _through(subject, case, lambda seam, values: None), lacking)
    return {case: _peaks(subject)[case] for case in subject.cases}


def _once(subject: Subject, name: str, make: Callable[[Subject], T]) -> T:
    key = ("twinned", name)
    if key not in subject.memory:
        subject.memory[key] = make(subject)
    return subject.memory[key]


def _peaks(subject: Subject) -> dict[str, dict[str, Peak]]:
    return _once(subject, "peaks", lambda _: {})


def _forced(subject: Subject) -> Twinned:
    from harness.rungs import quantized

    found, seams = Twinned(), frozenset(decoder_seams(subject.geometry))

    def call(case: str) -> list[int]:
        largest: dict[str, Peak] = {}

        def sink(seam: str, values: np.ndarray) -> None:
            largest[seam] = peak(values)
            if seam in seams:
                reference = subject.recorded(case).load((seam,))
                found.add(case, lambda: quantized.at(subject, case, seam, reference, {seam: values}))
                if seam == "logits":
                    found.add(case, lambda: quantized.choices(subject, case, reference, values))

        tokens = subject.verify_twin(case, sink, subject.twin_engine(case).seams())
        if tuple(tokens) == subject.oracle_tokens(case):
            _peaks(subject)[case] = largest
        return tokens

    subject.keep_twin_tokens(for_all(subject, "the twin on the oracle's tokens", subject.twin, call))
    return found


def _own(subject: Subject) -> Twinned:
    from harness.rungs import engine

    found, ran = Twinned(), _ran(subject)
    length = {name: subject.recorded(name).inputs.length for name in ran}

    def call(name: str) -> None:
        def sink(seam: str, values: np.ndarray) -> None:
            for case in ran[name]:
                found.add(case, lambda case=case: engine.at(subject, case, seam, {seam: values}) if seam in planned[case]
                          else [])
            if name in ran[name] and seam in planned[name]:
                got = engine.value_at(subject.engine_trace(name), seam)
                if got is not None and seam.startswith(("decoder.", "logits")) and len(got) == len(values):
                    found.heat[name, seam] = token_errors(values, got)
            if seam == "logits":
                found.rows[name] = values[length[name] - 1:-1].copy()

        cache = _through(subject, name, sink)
        for case in ran[name]:
            for seam in [seam for seam in planned[case] if seam.startswith("kv.")]:
                found.add(case, lambda case=case, seam=seam: engine.at(subject, case, seam, cache))

    planned = engine.plan(subject)
    if ran:
        for_all(subject, "the twin on its own tokens", subject.twin, call, list(ran))
    for case, held in found.found.items():
        if not isinstance(held, Exception):
            held.sort(key=lambda verdict: planned[case].index(verdict.seam))
    return found


def _ran(subject: Subject) -> dict[str, list[str]]:
    """Cases of the engine rung by their name: those whose engine gave a trace. Waits until all engines are done."""
    from harness.rungs import engine

    ran: dict[str, list[str]] = {}
    for case in engine.plan(subject):
        name = case.removesuffix(SHARP)
        try:
            engine.bundle_of(subject, case).trace(name)
        except HarnessError:  # the rung asks for it again, and says so
            continue
        ran.setdefault(name, []).append(case)
    return ran


def _through(subject: Subject, case: str, sink: Callable[[str, np.ndarray], None]) -> Mapping[str, np.ndarray]:
    """The twin on its own tokens at every seam: peaks are noted, values go to the sink, the cache comes back."""
    largest: dict[str, Peak] = {}

    def both(seam: str, values: np.ndarray) -> None:
        largest[seam] = peak(values)
        sink(seam, values)

    made = subject.twin_engine(case)
    request = Request(subject.recorded(case).inputs, forced=subject.twin_tokens(case), seams=made.seams(), kv=True)
    trace = next(made.run([request], sink=both))
    _peaks(subject)[case] = largest
    return {name: array for name, array in trace.items() if name.startswith("kv.")}
