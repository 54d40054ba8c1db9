"""The verbs that read records and run nothing: verify, publish-check, report. Imports happen inside, as in `cli`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.errors import ExitCode

if TYPE_CHECKING:
    from harness.attest import Asked

Arguments = argparse.Namespace


def verify(arguments: Arguments) -> int:
    """Does a certificate still speak for a bundle?"""
    from harness.attest import check_report

    bundles = [path for path in (arguments.bundle, arguments.vision_bundle) if path is not None]
    return _say(*check_report(arguments.report, bundles, _asked(arguments)))


def publish_check(arguments: Arguments) -> int:
    """Is there a certificate for exactly these bytes?"""
    from harness.attest import publish_check as check

    return _say(*check(arguments.bundle, arguments.certificate, _asked(arguments)))


def report(arguments: Arguments) -> int:
    """Render again what was decided."""
    from harness.rerender import rerender

    print(rerender(arguments.report, card=arguments.card, index=arguments.index, sign_with=arguments.sign,
                   annotations=arguments.annotations, link=arguments.link))
    return ExitCode.PASS


def _asked(arguments: Arguments) -> Asked:
    from harness.attest import Asked

    return Asked(arguments.policy, arguments.bounds, arguments.cases, arguments.signed_by)


def _say(lines: Sequence[str], code: ExitCode) -> int:
    print("\n".join(lines))
    return code
