"""The whole run, folded under the policy: what no single test sees (an unplanned answer, an empty rung) shows here."""


def test_gate(session_run, request):
    from harness.gate import fold
    from harness.ladder import NAMES
    from harness.rungs import CHECKS
    from harness.session import describe, write
    from harness.verdict import Outcome
    from harness.zoom import localize

    for rung in NAMES:
        for case in CHECKS[rung].plan(session_run.subject):
            session_run.verdicts(rung, case)
    decision = fold(session_run.run.verdicts, session_run.subject.policy)
    folder = request.config.getoption("--report")
    if folder:
        from pathlib import Path

        session_run.run.localization = localize(session_run.subject, session_run.run.verdicts)
        describe(session_run.subject, session_run.run)
        write(session_run.run, session_run.subject, Path(folder))
    assert decision.outcome is Outcome.PASS, decision.reason
