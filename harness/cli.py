"""The command line: each verb is a line of help, its arguments, and one function; imports happen inside the verb.

Exit codes: 0 pass, 1 fail, 2 usage or bad input, 3 could not decide, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import __version__
from harness import arguments as takes
from harness import apart, checking
from harness.errors import ExitCode, HarnessError

if TYPE_CHECKING:
    from harness.subject import Subject

Arguments = argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """One subcommand: help, the groups of arguments it takes, and what it does; returns the exit code."""

    help: str
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]
    run: Callable[[Arguments], int]


def subject_of(arguments: Arguments) -> Subject:
    """A Subject from what the command line gave; what it did not give keeps the default of `subject.Options`."""
    from harness.options import Options
    from harness.subject import Subject

    given = {name: value for name in Options.__dataclass_fields__
             if (value := getattr(arguments, name, None)) is not None}
    return Subject(Options(**given))


def _gate(arguments: Arguments) -> int:
    from harness.ladder import NAMES

    return _judge(arguments, NAMES)


def _ladder(arguments: Arguments) -> int:
    from harness.ladder import NAMES

    return _judge(arguments, [name for name in NAMES if not arguments.rung or name in arguments.rung])


def _judge(arguments: Arguments, names: Sequence[str]) -> int:
    from dataclasses import replace

    from harness import session
    from harness.ladder import NAMES
    from harness.run import Run
    from harness.terminal import Screen

    subject = subject_of(arguments)
    subject.keep_cases(getattr(arguments, "case", None))
    bundle = subject.options.bundle
    folder = arguments.out or \
        Path("reports") / f"{subject.checkpoint.name}-{bundle.resolve().name if bundle else subject.mode}"
    subject.options = replace(subject.options, work=folder)
    session.check_given(subject)
    run = Run(command=arguments.command)
    whole = list(names) == list(NAMES)
    try:
        with Screen(quiet=arguments.json) as screen:
            subject.progress, subject.say = screen.step, screen.say
            session.climb_all(subject, run, names, screen.rung)
    finally:
        subject.close()
    decision = session.write(run, subject, folder)
    if arguments.json:
        print(json.dumps(run.record()))
    else:
        screen.table(run, decision, names, folder)
        if subject.watch:
            screen.say(subject.watch.describe(subject.options.memory))
    return decision.exit_code if whole else _part(run, subject.policy)


def _part(run: Any, policy: Any) -> int:
    """Exit code of a run that asked for some rungs only: theirs, not that of the ladder."""
    from harness.verdict import exit_code, worst

    return int(exit_code(worst(verdict.outcome for verdict in run.verdicts if not policy.excuses(verdict))))


def _record(arguments: Arguments) -> int:
    from harness import commands

    return commands.record(arguments, subject_of(arguments))


def _synth(arguments: Arguments) -> int:
    from harness import commands

    return commands.synth(arguments)


def _export(arguments: Arguments) -> int:
    checkpoint = subject_of(arguments).checkpoint
    from harness.export import export  # heavy, so what can be refused is refused before
    from harness.terminal import Screen

    with Screen(quiet=arguments.json) as screen:
        result = export(checkpoint, arguments.out, arguments.mode, grid=arguments.grid, context=arguments.context,
                        dynamic=arguments.dynamic, activations=arguments.activations, overwrite=arguments.overwrite,
                        tmp=arguments.tmp, progress=screen.say)
    print(json.dumps(result.record()) if arguments.json else result.describe())
    return ExitCode.PASS


def _sketch(arguments: Arguments) -> int:
    from harness.store import Oracle, write_sketch

    print(write_sketch(Oracle.open(arguments.oracle), arguments.out))
    return ExitCode.PASS


def _calibrate(arguments: Arguments) -> int:
    from harness.calibrate import calibrate, to_toml
    from harness.run import write_atomic
    from harness.session import check_given
    from harness.terminal import Screen

    subject = subject_of(arguments)
    check_given(subject)
    try:
        with Screen() as screen:
            subject.progress, subject.say = screen.step, screen.say
            bounds = calibrate(subject, screen.step)
    finally:
        subject.close()
    write_atomic(arguments.out, to_toml(bounds, arguments.command, subject.checkpoint.name, subject.geometry))
    print(f"{len(bounds)} bounds written to {arguments.out}")
    return ExitCode.PASS


def _faults(arguments: Arguments) -> int:
    from harness.faults import benign, power, scoreboard
    from harness.run import json_text, write_files
    from harness.terminal import Screen

    subject = subject_of(arguments)
    if arguments.jobs < 1:
        raise HarnessError(f"{arguments.jobs} processes", where="--jobs", fix="give 1 or more")
    with Screen(quiet=arguments.json) as screen:
        made = benign if arguments.benign else power if arguments.power else scoreboard
        record = made.make(subject.options, arguments, lambda done, total: screen.step(arguments.verb, done, total))
    text, name = made.markdown(record), made.__name__.rpartition(".")[2]
    pictures = power.pictures(record) if made is power else {}
    some = arguments.kinds or arguments.only or arguments.fast
    write_files(arguments.out or Path("build/faults" if some else "reports/faults"),
                {f"{name}.json": json_text(record), f"{name}.md": text, **pictures})
    print(json.dumps(record) if arguments.json else text)
    return ExitCode.PASS if made.passed(record) else ExitCode.FAIL


def _replay(arguments: Arguments) -> int:
    from harness.engines.replay.show import shown

    print(shown(arguments))
    return ExitCode.PASS


def _diff(arguments: Arguments) -> int:
    from harness.engines.replay.difference import shown

    text, same = shown(arguments.left, arguments.right)
    print(text)
    return ExitCode.PASS if same else ExitCode.FAIL


def _doctor(arguments: Arguments) -> int:
    from harness.doctor import examine

    return examine()


VERBS = {
    "gate": Verb("run the whole ladder, write the report and the certificate", (takes.subject, takes.output),
                 _gate),
    "ladder": Verb("run some rungs", (takes.subject, takes.output, takes.rung), _ladder),
    "record": Verb("record the fp32 oracle", (takes.record,), _record),
    "sketch": Verb("make a small stand-in of a recorded oracle, for git and model cards", (takes.sketch,), _sketch),
    "synth": Verb("write a random checkpoint at full geometry", (takes.synth,), _synth),
    "export": Verb("quantize and export a bundle", (takes.export,), _export),
    "calibrate": Verb("measure this model's healthy noise and write its bounds",
                      (takes.subject, takes.calibrate), _calibrate),
    "faults": Verb("switch known faults on one at a time and count what is caught and named",
                   (takes.subject, takes.faults), _faults),
    "verify": Verb("does a certificate still speak for a bundle?", (takes.verify,), checking.verify),
    "publish-check": Verb("is there a certificate for exactly this bundle? the line before an upload",
                          (takes.publish_check,), checking.publish_check),
    "report": Verb("render reports again from their records", (takes.report,), checking.report),
    "replay": Verb("read a bundle's program, or print it as torch source", (takes.replay,), _replay),
    "diff": Verb("what changed between two bundles' programs: structure, constants, weights", (takes.pair,), _diff),
    "doctor": Verb("what this machine can record, export and run", (takes.nothing,), _doctor),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    # An option is written out: `--case` of one verb must not be taken for another's `--cases`.
    top = argparse.ArgumentParser(
        prog="harness", allow_abbrev=False, description="Proves a model converted to Core AI right, or says where it is wrong.",
        epilog="exit codes: 0 pass, 1 fail, 2 usage or bad input, 3 could not decide, 130 interrupted")
    top.add_argument("--version", action="version", version=f"harness {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, allow_abbrev=False, help=verb.help,
                               description=verb.help[0].upper() + verb.help[1:] + ".")
        for add in verb.arguments:
            add(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; whatever goes wrong is one sentence on stderr and a documented exit code, never a stack trace."""
    arguments = parser().parse_args(argv)
    arguments.command = shlex.join(["harness", *(sys.argv[1:] if argv is None else argv)])
    try:
        with _killed_as_interrupted():
            if argv is None and arguments.verb in APART and not apart.watched():
                return apart.run(sys.argv[1:])
            return int(VERBS[arguments.verb].run(arguments))
    except HarnessError as error:
        return _complain(arguments.verb, str(error), error.exit_code)
    except KeyboardInterrupt:
        kept = INTERRUPTED.get(arguments.verb, "nothing half-written is left")
        return _complain(arguments.verb, f"interrupted; {kept}", ExitCode.INTERRUPTED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(arguments.verb, f"{where}cannot be read or written ({error.strerror or error})",
                         ExitCode.BAD_INPUT)
    except (Exception, SystemExit) as error:  # also a graph under test that calls sys.exit(0): that is no pass
        at = traceback.extract_tb(error.__traceback__)[-1]
        return _complain(arguments.verb, f"crashed with {type(error).__name__}: {str(error) or 'no message'} "
                         f"({Path(at.filename).name}, line {at.lineno}); nothing was decided", ExitCode.UNDECIDED)


APART = ("export",)
"""Verbs that convert: their libraries may end the process."""
INTERRUPTED = dict.fromkeys(("gate", "ladder", "calibrate", "record"),
                            "what was recorded is kept, run the same command to go on")


def _complain(verb: str, sentence: str, code: ExitCode) -> int:
    print(f"harness {verb}: {' '.join(sentence.split())}", file=sys.stderr)
    return int(code)


@contextmanager
def _killed_as_interrupted() -> Iterator[None]:
    """A killed run cleans up as an interrupted one does: drafts are removed, children ended.

    Only the main thread may set a handler; it is put back, because a caller in this process may have its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


if __name__ == "__main__":
    sys.exit(main())
