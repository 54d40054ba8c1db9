"""One fault, switched on: the rungs that look at its target, what they name, and what the common gates would have said."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.faults import Fault, baselines
from harness.faults.place import matches, op, same_block
from harness.faults.suspect import Host, Suspect, engine_key
from harness.faults.tables import ship
from harness.gate import fold
from harness.localize import broken
from harness.rungs import CHECKS, answers
from harness.run import Run
from harness.subject import Subject, recorded_folder
from harness.verdict import Outcome, Verdict
from harness.zoom import localize

LOOKS: dict[str, tuple[tuple[str, tuple[str, ...] | None], ...]] = {
    "graph": (("contract", None), ("weights", ("graph",)), ("vision", None), ("decoder", None), ("decode", None)),
    "host": (("contract", None), ("inputs", None)),
    "bundle": (("weights", ("bundle", "constants")), ("engine", None), ("tokens", None)),
    "engine": (("engine", None), ("tokens", None)),
    "asset": (("inputs", None), ("weights", ("bundle", "constants")), ("engine", None)),
    "model": (("headroom", None),)}
"""Rungs, and their cases where not all, that see a target; `harness.faults.suspect` says what each target is."""


@dataclass
class Result:
    """What came of one fault. outcome: FAIL or ERROR where the run was stopped, PASS where it was let through.

    named: rung and seam that the report would put first. block, op: whether these are right; None where the fault has
    no op. cause: what the report says of it. gates: for each common gate whether it stops the fault, None where it does not look at this target.
    """

    fault: str
    kind: str
    title: str
    target: str
    source: str
    equivalent: bool
    expected: str
    outcome: str = "PASS"
    named: str = ""
    reason: str = ""
    rung: bool = False
    block: bool = False
    op: bool | None = None
    cause: str = ""
    gates: dict[str, bool | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def caught(self) -> bool:
        """Whether the run was stopped."""
        return self.outcome != "PASS"

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "seconds": round(self.seconds, 2)}


class Bench:
    """What all trials share: the healthy subject with the inside of every layer recorded, and a place to work in."""

    def __init__(self, subject: Subject, work: Path) -> None:
        self.subject, self.work = subject, work
        subject.__dict__["oracle"] = _oracle(subject)
        for name in subject.cases:
            _ = subject.recorded(name).trace
        for name in subject.engine_cases():
            subject.twin_trace(name, subject.twin_tokens(name))

    @classmethod
    def like(cls, other: Bench, options: Any) -> Bench:
        """Another bench on the same cases."""
        subject = Subject(options)
        subject.__dict__.update(cases=other.subject.cases, policy=other.subject.policy, oracle=other.subject.oracle)
        return cls(subject, other.work)

    @cached_property
    def green(self) -> Run:
        """A healthy run of all ten rungs, with the loop for its engine."""
        from harness.faults.proof import BUNDLE

        suspect, run = Suspect(self.subject), Run(command="harness faults")
        suspect.tables = ship(self.subject)
        for rung, check in CHECKS.items():
            for case in check.plan(suspect):
                run.verdicts += answers(check, suspect, case)
        decision = fold(run.verdicts, self.subject.policy)
        if decision.outcome is not Outcome.PASS:
            raise HarnessError(f"healthy, and yet {decision.reason}", where="the run that evidence is made of",
                               fix="calibrate the bounds for this checkpoint")
        run.policy, run.bounds = self.subject.policy.record(), self.subject.bounds.record()
        run.subject = {"bundle": {"digest": BUNDLE}, "mode": suspect.mode, "exported": suspect.options.bundle is None,
                       "checkpoint": {"digest": self.subject.checkpoint.digest,
                                      "geometry": self.subject.geometry.record()}}
        run.engine = {"name": engine_key(self.subject).split(":")[0]}
        run.cases = [{"name": name, "image": bool(case.images), "engine": case.engine}
                     for name, case in self.subject.cases.items()]
        return run

    @cached_property
    def bundles(self) -> tuple[Path, Path]:
        """Decoder and vision bundle: given, or exported once."""
        return self.subject.bundle.path, self.subject.vision_bundle.path

    def use(self, decoder: Path, vision: Path) -> None:
        """Take these bundles instead of exporting."""
        self.__dict__["bundles"] = decoder, vision

    @cached_property
    def programs(self) -> tuple[Any, ...]:
        """What the healthy bundles hold."""
        from harness.engines.program import read_constants

        return tuple(read_constants(path / f"{path.name}.aimodel") for path in self.bundles)

    def files(self, folder: Path) -> Any:
        """A copy of the bundles, to be changed."""
        from harness.faults.files import Files

        return Files(*self.bundles, folder, self.programs, self.subject)

    def try_out(self, fault: Fault) -> Result:
        """Switch one fault on and look."""
        result = Result(fault.id, fault.kind, fault.title, fault.target, fault.source, fault.equivalent,
                        f"{fault.rung}: {fault.seam}" + (f" ({fault.op})" if fault.op else ""))
        started = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix=f"{fault.id}-", dir=self.work))
        try:
            self._try(fault, result, folder)
        except Exception as error:  # a fault that cannot be switched on counts as missed, and does not end the run
            result.outcome = "ERROR" if fault.equivalent else "PASS"
            result.reason = f"could not be switched on: {type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            gc.collect()  # a suspect and its loop hold each other; uncollected, the graphs of many trials pile up
        result.seconds = time.perf_counter() - started
        return result

    def _try(self, fault: Fault, result: Result, folder: Path) -> None:
        if fault.target == "evidence":
            self._evidence(fault, result, folder)
            return
        if fault.target == "asset":
            files = self.files(folder)
            fault.apply(files)
            subject: Subject = Subject(replace(self.subject.options, bundle=files.decoder, vision_bundle=files.vision))
            subject.__dict__.update(oracle=self.subject.oracle, bounds=self.subject.bounds, cases=self.subject.cases,
                                    engine_cases=lambda: [self.subject.engine_cases()[0]])
            refused = _refused(subject)
            if refused:
                _settle(fault, result, "check", "*", None, "ERROR", refused)
                return
        else:
            subject = self.suspect(fault)
        looks = LOOKS[fault.target]
        if fault.equivalent and fault.rung != "none":
            looks = [row for row in looks if matches(row[0], fault.rung)]
        verdicts = climb(subject, looks)
        _name(fault, result, subject, verdicts)
        if fault.target in ("graph", "engine", "bundle"):
            result.gates = baselines.verdicts(subject, on_engine=fault.target != "graph")

    def suspect(self, fault: Fault) -> Suspect:
        """A Subject with the fault switched on."""
        suspect = Suspect(self.subject)
        if fault.target == "graph":
            suspect.bend_graph = fault.apply
        elif fault.target == "host":
            suspect.host_under_test = Host(suspect)
            fault.apply(suspect.host_under_test)
        elif fault.target == "bundle":
            suspect.tables = ship(self.subject)
            fault.apply(suspect.tables)
        elif fault.target == "engine":
            suspect.bend_loop = fault.apply
        else:
            suspect.use_model(_twin_weights(self.subject))
            fault.apply(suspect.model)
        return suspect

    def _evidence(self, fault: Fault, result: Result, folder: Path) -> None:
        from harness.faults.proof import Evidence, examine

        evidence = Evidence(self.subject, self.green, folder)
        fault.apply(evidence)
        found = examine(evidence)
        if found:
            _settle(fault, result, "verify", found[0], None, "FAIL", found[1])


def _oracle(subject: Subject) -> Any:
    """The oracle given, or ours with the inside of every layer, so that no trial records it again to zoom in."""
    if subject.options.oracle is not None:
        return subject.oracle
    from harness.oracle import record

    folder = recorded_folder(subject.checkpoint, subject.options.device)
    return record(subject.checkpoint, list(subject.cases.values()), folder.with_name(folder.name + "-inside"),
                  device=subject.options.device, inside="all",
                  progress=lambda what, done, total: subject.progress("record", done, total))


def climb(subject: Subject, looks: Sequence[tuple[str, tuple[str, ...] | None]]) -> list[Verdict]:
    """Verdicts up to the first rung that fails by itself: what stands behind it cannot be named before it."""
    verdicts: list[Verdict] = []
    for rung, cases in looks:
        plan = CHECKS[rung].plan(subject)
        for case in plan if cases is None else [case for case in cases if case in plan]:
            verdicts += answers(CHECKS[rung], subject, case)
        if any(not _inherits(one) for one in broken(verdicts)):
            break
    return verdicts


def _inherits(verdict: Verdict) -> bool:
    from harness.localize import inherited

    return inherited(verdict)


def _refused(subject: Subject) -> str | None:
    from harness.session import check_given

    try:
        check_given(subject)
    except HarnessError as error:
        return str(error)
    return None


def _name(fault: Fault, result: Result, subject: Subject, verdicts: Sequence[Verdict]) -> None:
    rows = localize(subject, verdicts)
    first = next((row for row in rows if not row["inherited"]), rows[0] if rows else None)
    if first is not None:
        _settle(fault, result, first["rung"], first["seam"], first["op"], "FAIL", f"{first['case']}: {first['reason']}")
        result.cause = first["cause"] or ""
        return
    stopped = next((one for one in verdicts if one.outcome is Outcome.ERROR or (
        one.outcome is Outcome.SKIP and not subject.policy.excuses(one))), None)
    if stopped is not None:
        _settle(fault, result, stopped.rung, stopped.seam, None, stopped.outcome.value, stopped.reason)


def _settle(fault: Fault, result: Result, rung: str, seam: str, inside: str | None, outcome: str, reason: str) -> None:
    place = inside or seam
    result.outcome, result.named, result.reason = outcome, f"{rung}: {place}", reason
    result.rung = matches(rung, fault.rung)
    result.block = same_block(place, fault.seam)
    result.op = None if fault.op is None else result.block and matches(op(place), fault.op)


def _twin_weights(subject: Subject) -> dict[str, Any]:
    from harness.graph.quantize import RECIPES, twin_weights

    return {name: value.float() for name, value in twin_weights(subject.checkpoint, RECIPES[subject.mode]).items()}
