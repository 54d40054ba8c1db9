"""A run record made ready to render: its schema checked, its decision and certificate recomputed, never believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from harness.errors import HarnessError
from harness.gate import Decision, certificate, fold, verify
from harness.policy import Policy, policy_from
from harness.recheck import recheck
from harness.report.plain import mapping
from harness.run import Run, run_from_record
from harness.verdict import Outcome

_P, _T = ParamSpec("_P"), TypeVar("_T")
UNVERIFIED = "MISMATCH"


@dataclass(frozen=True)
class Judged:
    """A run, what it folds to, and where record and certificate disagree (sentences; empty where they agree)."""

    run: Run
    policy: Policy
    decision: Decision
    certificate: Mapping[str, Any]
    given: bool
    problems: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The outcome; or MISMATCH where record and certificate contradict each other: no PASS stands over that."""
        return UNVERIFIED if self.problems and self.decision.outcome is Outcome.PASS else self.decision.outcome.value

    @property
    def why(self) -> str:
        """One sentence."""
        if self.headline == UNVERIFIED:
            return f"the record passes, but {self.problems[0]}"
        return self.decision.reason


def guarded(render: Callable[_P, _T]) -> Callable[_P, _T]:
    """A record is data from elsewhere: whatever in it is not as the schema says becomes one sentence, never a trace."""

    @wraps(render)
    def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
        try:
            return render(*arguments, **options)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise HarnessError(f"holds a value that no run record has ({type(error).__name__}: {error})",
                               where="run.json", fix="run the gate again") from error

    return call


@guarded
def read(record: Any, claimed: Any = None) -> Judged:
    """Fold the record again and compare with the certificate that came with it (None: recomputed from the record).

    Raises HarnessError for a record of another schema, half a record, or one whose policy cannot be read.
    """
    run = run_from_record(record)
    policy = policy_from(dict(mapping(record["policy"])))
    decision, given = fold(run.verdicts, policy), claimed is not None
    if given:
        good = isinstance(claimed, Mapping)
        problems = verify(record, claimed) if good else ["certificate.json is not a certificate"]
    else:
        problems = list(recheck(run, policy, decision.outcome is Outcome.PASS))
    # Digests of thousands of verdicts take time: a certificate that agrees in everything need not be made again.
    ours = claimed if given and not problems else certificate(run, policy)
    return Judged(run, policy, decision, ours, given, tuple(problems))
