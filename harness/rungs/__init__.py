"""The ten rungs as runnable checks: each file states one claim, plans its seams without heavy work, and measures them.

A check is a module with `NAME`, `plan(subject) -> {case: seams}` and `measure(subject, case) -> verdicts`. To add a rung,
write such a file, name it in `CHECKS` and in `harness.ladder.RUNGS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from harness.errors import HarnessError
from harness.rungs import contract, decode, decoder, engine, headroom, inputs, quantized, tokens, vision, weights
from harness.subject import Subject
from harness.verdict import Outcome, Verdict


CERTAIN = 1000.0
"""Times a bound of another model: the widest checkpoint rounds some tens of times worse than the tiny one."""


class Check(Protocol):
    """What a rung's module offers."""

    NAME: str

    def plan(self, subject: Subject) -> Mapping[str, Sequence[str]]:
        """Seams expected by case; needs the checkpoint's header and the cases only, so that a test collector can ask."""
        ...

    def measure(self, subject: Subject, case: str) -> list[Verdict]:
        """Verdicts of one case; may raise HarnessError or Undecided."""
        ...


CHECKS: dict[str, Check] = {check.NAME: check for check in (
    contract, inputs, weights, vision, decoder, decode, quantized, engine, tokens, headroom)}


def answers(check: Check, subject: Subject, case: str) -> list[Verdict]:
    """Every planned seam answered exactly once, in the order planned; what raises or is missing becomes an ERROR."""
    planned: Sequence[str] = ("*",)
    try:
        planned = check.plan(subject).get(case, ())
        found = check.measure(subject, case)
    except HarnessError as error:
        return [Verdict(check.NAME, case, seam, Outcome.ERROR, str(error)) for seam in planned]
    except Exception as error:  # a crash of the thing under test is a verdict, never a stack trace and never a pass
        reason = f"crashed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return [Verdict(check.NAME, case, seam, Outcome.ERROR, reason) for seam in planned]
    if subject.bounds.foreign(subject.geometry.shape):
        found = [_unsure(verdict, subject.bounds.made_for["checkpoint"]) for verdict in found]
    return _complete(check.NAME, case, planned, found)


def _unsure(verdict: Verdict, model: str) -> Verdict:
    """A figure past a bound of another model's is no proof, unless no rounding reaches as far."""
    if verdict.outcome is not Outcome.FAIL or not verdict.bound or verdict.value > CERTAIN * verdict.bound:
        return verdict
    return replace(verdict, outcome=Outcome.ERROR, reason=f"{verdict.reason}; that bound was measured on {model}, a model "
                   "of another shape: run harness calibrate on this one, then give --bounds")


def _complete(rung: str, case: str, planned: Sequence[str], found: Sequence[Verdict]) -> list[Verdict]:
    answered = {verdict.seam for verdict in found}
    missing = [Verdict(rung, case, seam, Outcome.ERROR, "the check did not answer this seam")
               for seam in planned if seam not in answered]
    extra = [Verdict(rung, case, verdict.seam, Outcome.ERROR, "the check answered a seam that it had not planned")
             for verdict in found if verdict.seam not in planned and verdict.outcome is not Outcome.ERROR]
    return [*found, *missing, *extra]


def climb(subject: Subject, names: Sequence[str]) -> Iterator[tuple[str, str, list[Verdict]]]:
    """Run the named rungs case by case: (rung, case, verdicts) as they come."""
    for name in names:
        for case in CHECKS[name].plan(subject):
            yield name, case, answers(CHECKS[name], subject, case)
