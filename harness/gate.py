"""The gate folds Verdicts under a policy into a Certificate; `verify` recomputes it from the record."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import HarnessError
from harness.ladder import NAMES
from harness.policy import Policy, policy_from
from harness.run import Run, run_from_record
from harness.scrutiny import complaints
from harness.verdict import Outcome, Verdict, exit_code, worst

SCHEMA = 1
ONE = 1 + 1e-9
_WORDED = {"schema", "tool", "created", "subject", "engine", "policy"}
"""Parts of a record that the certificate holds in words; of everything else it holds a digest."""


@dataclass(frozen=True)
class RungResult:
    """One row of the table: a rung's outcome, how many verdicts of each kind, and the one that stands nearest its bound."""

    rung: str
    outcome: Outcome
    counts: Mapping[str, int]
    leading: Verdict | None
    reason: str


@dataclass(frozen=True)
class Decision:
    """The whole: outcome, one sentence why, and the rungs in order."""

    outcome: Outcome
    reason: str
    rungs: tuple[RungResult, ...]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 could not decide."""
        return int(exit_code(self.outcome))


def fold(verdicts: Sequence[Verdict], policy: Policy) -> Decision:
    """Every rung must have answered; a SKIP counts against the run unless the policy allows it by name."""
    rungs = tuple(_fold_rung(name, [verdict for verdict in verdicts if verdict.rung == name], policy) for name in NAMES)
    strange = sorted({verdict.rung for verdict in verdicts} - set(NAMES))
    judged = {verdict.case for verdict in verdicts if verdict.rung == "decoder" and verdict.outcome is Outcome.PASS}
    outcomes = [rung.outcome for rung in rungs if not (rung.outcome is Outcome.SKIP and rung.rung in policy.allow_skip)]
    outcome, reason = worst(outcomes), ""
    if strange:
        outcome, reason = worst([outcome, Outcome.ERROR]), f"verdicts of an unknown rung {strange[0]!r}"
    if outcome is Outcome.PASS and len(judged) < policy.min_cases:
        outcome = Outcome.ERROR
        reason = f"only {len(judged)} cases were judged on the decoder rung, the policy asks for {policy.min_cases}"
    return Decision(outcome, reason or _why(outcome, rungs), rungs)


def _fold_rung(name: str, verdicts: Sequence[Verdict], policy: Policy) -> RungResult:
    counts = Counter(verdict.outcome.value for verdict in verdicts)
    counted = [verdict for verdict in verdicts if not policy.excuses(verdict)]
    if verdicts and not counted:
        return RungResult(name, Outcome.SKIP, counts, verdicts[0], verdicts[0].reason)
    outcome = worst(verdict.outcome for verdict in counted)
    leading = _leading(counted, outcome)
    reason = leading.reason if leading else "nothing was compared"
    return RungResult(name, outcome, counts, leading, reason)


def _leading(verdicts: Sequence[Verdict], outcome: Outcome) -> Verdict | None:
    """The first failing verdict in the order of computation, or, of a passing rung, the one nearest its bound."""
    same = [verdict for verdict in verdicts if verdict.outcome is outcome]
    if outcome is not Outcome.PASS:
        return same[0] if same else None
    measured = [verdict for verdict in same if verdict.value is not None and verdict.bound]
    return max(measured, key=lambda verdict: verdict.value / verdict.bound, default=same[0] if same else None)


def _why(outcome: Outcome, rungs: Iterable[RungResult]) -> str:
    if outcome is Outcome.PASS:
        return "every rung was measured and within its bounds"
    first = next(rung for rung in rungs if rung.outcome is outcome)
    where = f" at {first.leading.seam} of case {first.leading.case}" if first.leading else ""
    verb = {Outcome.FAIL: "is broken", Outcome.ERROR: "could not be measured", Outcome.SKIP: "was skipped"}[outcome]
    return f"rung {first.rung} {verb}{where}: {first.reason}"


def certificate(run: Run, policy: Policy) -> dict[str, Any]:
    """What was decided, bound by digests to checkpoint, oracle, cases, bundle, policy, bounds, every verdict and figure."""
    decision = fold(run.verdicts, policy)
    record = run.record()
    body = {
        "schema": SCHEMA, "tool": run.tool, "created": run.created, "subject": record["subject"],
        "engine": record["engine"], "policy": {"name": policy.name, "digest": policy.digest},
        "digests": {key: digest_of(value) for key, value in sorted(record.items()) if key not in _WORDED},
        "outcome": decision.outcome.value, "reason": decision.reason,
        "rungs": {rung.rung: rung.outcome.value for rung in decision.rungs},
    }
    return {**body, "digest": digest_of(body)}


def digest_of(value: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def rejudge(verdict: Verdict) -> Outcome:
    """The outcome that the recorded figures call for; a record cannot say PASS over a figure past its bound."""
    if verdict.outcome is not Outcome.PASS or verdict.value is None or verdict.bound is None:
        return verdict.outcome
    return Outcome.PASS if verdict.value <= verdict.bound else Outcome.FAIL


def verify(record: Mapping[str, Any], claimed: Mapping[str, Any], bundle_digest: str | None = None,
           least: Policy | None = None, limits: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
    """Recompute a certificate from its run record, and compare; a list of sentences, empty where all agrees.

    `bundle_digest` is that of the bundle in hand: the certificate must speak for exactly these bytes. `least` is the
    policy that the run's own must not be laxer than, `limits` the rows of the bounds that its own must not be wider than.
    """
    try:
        run, policy = run_from_record(record), policy_from(dict(record["policy"]))
        recomputed = certificate(run, policy)
    except HarnessError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError) as error:
        return [f"run.json is not a run record ({type(error).__name__}: {error})"]
    found = []
    for key, ours in recomputed.items():
        if claimed.get(key) != ours:
            found.append(f"{key} does not match: the certificate says {_short(claimed.get(key))}, the record gives "
                         f"{_short(ours)}")
    for verdict in run.verdicts:
        if rejudge(verdict) is not verdict.outcome:
            found.append(f"{verdict.id} says {verdict.outcome.value}, its figure {verdict.value} is past {verdict.bound}")
        found += [f"{verdict.id} records a cosine of {value}, which nothing has" for value in _cosines(verdict.figures)
                  if not -ONE <= value <= ONE]
    found += complaints(run, recomputed["outcome"] == Outcome.PASS.value, limits)
    if least is not None and not policy.stricter_or_equal(least):
        found.append(f"the run was judged by policy {policy.name!r}, which is laxer than {least.name!r}")
    spoken = (run.subject.get("bundle") or {}).get("digest")
    if bundle_digest is not None and spoken != bundle_digest:
        found.append(f"the certificate speaks for bundle {_short(spoken)}, this one is {_short(bundle_digest)}")
    return found


def _cosines(figures: Any) -> Iterator[float]:
    """Every recorded cosine: float32 sums print 1.0001, ours cannot."""
    if isinstance(figures, Mapping):
        for name, value in figures.items():
            if "cosine" in name and name != "cosine_gap" and isinstance(value, (int, float)):
                yield value
            else:
                yield from _cosines(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
