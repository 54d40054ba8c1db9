"""The gate folds Verdicts under a policy into a Certificate; `verify` recomputes it from the record."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from harness.bounds import Bounds, bounds_from
from harness.errors import HarnessError
from harness.ladder import NAMES
from harness.plan import NOT_IN_SKETCH
from harness.policy import Policy, policy_from
from harness.recheck import recheck, weaker
from harness.run import Run, run_from_record
from harness.verdict import Outcome, Verdict, exit_code, worst

SCHEMA = 2
CHAIN = ("checkpoint", "oracle", "cases", "bundle", "vision_bundle", "engine", "policy", "bounds", "verdicts")
"""What a decision rests on, in the order of the chain; behind these stand the other parts of the record by name."""
BY_SKETCH = "judged by sketch, not by the whole oracle: "
"""How the reason of such a run begins, wherever it is shown."""
_SUBJECT = {"checkpoint", "oracle", "bundle", "vision_bundle"}


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
    by = BY_SKETCH if any(verdict.seam == NOT_IN_SKETCH for verdict in verdicts) else ""
    return Decision(outcome, by + (reason or _why(outcome, rungs)), rungs)


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
    """What was decided, bound by a chain of digests to all that it rests on, and signed off by one digest over the whole.

    `chain` holds the links of CHAIN and then every other part of the record, each with the sha256 of its content and
    `sum`, the sha256 over the sum before it, its name and its digest: the first sum that does not match names the link
    that was changed.
    """
    decision = fold(run.verdicts, policy)
    record = run.record()
    body = {
        "schema": SCHEMA, "tool": run.tool, "created": run.created, "subject": record["subject"],
        "engine": record["engine"], "policy": {"name": policy.name, "digest": policy.digest}, "chain": chain(record),
        "outcome": decision.outcome.value, "reason": decision.reason,
        "rungs": {rung.rung: rung.outcome.value for rung in decision.rungs},
    }
    return {**body, "digest": digest_of(body)}


def chain(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The links of a record: name, digest of its content, and the running sum."""
    subject = record["subject"]
    parts = {name: subject.get(name) if name in _SUBJECT else record[name] for name in CHAIN}
    parts |= {name: record[name] for name in sorted(record) if name not in CHAIN and name != "schema"}
    links, total = [], ""
    for name, value in parts.items():
        digest = digest_of(value)
        total = hashlib.sha256(f"{total}\n{name}\n{digest}".encode()).hexdigest()
        links.append({"name": name, "digest": digest, "sum": total})
    return links


def digest_of(value: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def verify(record: Mapping[str, Any], claimed: Mapping[str, Any], bundle_digest: str | None = None,
           least: Policy | None = None, bounds: Bounds | None = None) -> list[str]:
    """Recompute a certificate from its run record and judge every figure again; sentences, none where all holds.

    `bundle_digest` is that of the bundle in hand: the certificate must speak for exactly these bytes. `least` and
    `bounds` are the policy and the bounds that the run's own must not be laxer than.
    """
    try:
        run, policy = run_from_record(record), policy_from(dict(record["policy"]))
        recomputed = certificate(run, policy)
    except HarnessError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"run.json is not a run record ({type(error).__name__}: {error})"]
    if claimed.get("schema") != SCHEMA:
        return [f"certificate of schema {claimed.get('schema')!r}, this tool reads {SCHEMA}: check it with the version that "
                "wrote it, or run the gate again"]
    found = [*_links(claimed.get("chain"), recomputed["chain"])]
    found += [f"{key} does not match: the certificate says {_short(claimed.get(key))}, the record gives {_short(ours)}"
              for key, ours in recomputed.items() if key != "chain" and claimed.get(key) != ours]
    try:
        found += recheck(run, policy, recomputed["outcome"] == Outcome.PASS.value)
        if bounds is not None:
            with suppress(HarnessError):  # bounds that cannot be read have their sentence already
                found += weaker(run, bounds_from(run.bounds), bounds)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        found.append(f"run.json holds a value that no run record has ({type(error).__name__}: {error})")
    if least is not None and not policy.stricter_or_equal(least):
        found.append(f"the run was judged by policy {policy.name!r}, which is laxer than {least.name!r}")
    spoken = [part.get("digest") if isinstance(part := run.subject.get(name), Mapping) else None
              for name in ("bundle", "vision_bundle")]
    if bundle_digest is not None and bundle_digest not in spoken:
        found.append(f"the certificate speaks for bundle {_short(spoken[0])}, this one is {_short(bundle_digest)}")
    return found


def _links(claimed: Any, ours: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Each link whose content differs; then the first sum that does, where the contents agree."""
    links = claimed if isinstance(claimed, list) else []
    held = {link.get("name"): link for link in links if isinstance(link, Mapping)}
    differ = [link["name"] for link in ours if (held.get(link["name"]) or {}).get("digest") != link["digest"]]
    for name in differ:
        theirs = (held.get(name) or {}).get("digest")
        yield f"{name} is not what the certificate was made from: it says {_short(theirs)[:14]}, the record gives " \
              f"{next(link['digest'] for link in ours if link['name'] == name)[:12]}"
    if not differ and links != list(ours):
        broken = next((link["name"] for link, other in zip(ours, links) if link != other), "the end")
        yield f"the chain of digests is broken at {broken}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
