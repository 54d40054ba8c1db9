"""What went wrong, where, and what to do about it, in one sentence; the exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Documented exit codes of every verb."""

    PASS = 0
    FAIL = 1
    BAD_INPUT = 2
    UNDECIDED = 3
    INTERRUPTED = 130


class HarnessError(Exception):
    """Bad input: a user can mend it. Carries what is wrong, where, and the fix; the path grows as it travels up."""

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.path: tuple[str, ...] = (str(where),) if where is not None else ()
        self.fix = fix

    def at(self, place: object) -> HarnessError:
        """Prefix the path with `place` and return self, so that `raise error.at(path)` reads well."""
        self.path = (str(place), *self.path)
        return self

    def __str__(self) -> str:
        where = f"{': '.join(self.path)}: " if self.path else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{where}{self.what}{fix}"


class Undecided(HarnessError):
    """Nothing is known to be wrong, but it could not be measured: a crash, a hang, a missing runtime."""

    exit_code = ExitCode.UNDECIDED


@contextmanager
def within(place: object) -> Iterator[None]:
    """Add `place` to the path of any HarnessError raised inside."""
    try:
        yield
    except HarnessError as error:
        raise error.at(place) from error.__cause__
