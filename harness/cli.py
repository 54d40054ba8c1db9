"""The command line: each verb is a line of help, its arguments, and one function; imports happen inside the verb.

Exit codes: 0 pass, 1 fail, 2 usage or bad input, 3 could not decide, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
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


def _subject_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="?", help="HF model directory or hub id (default: the embedded tiny one)")
    add("--revision", help="revision of a hub id")
    add("--graph", metavar="MODULE:FACTORY", help="torch graph under test (default: ours)")
    add("--bundle", type=Path, metavar="DIR", help="LanguageBundle under test (default: export one)")
    add("--vision-bundle", type=Path, metavar="DIR", help="vision bundle that goes with it")
    add("--oracle", type=Path, metavar="DIR", help="recorded oracle (default: record or resume one)")
    add("--mode", choices=("fp16", "int8lin", "int8hu"), help="mode of the bundle we export (default: int8hu)")
    add("--grid", type=_grid, metavar="HxW", help="patch grid that the bundle is made for (default: 28x28)")
    add("--device", choices=("cpu", "cuda"), help="where torch computes (default: cpu)")
    add("--cases", type=Path, metavar="TOML", help="cases (default: ladders/cases.toml)")
    add("--bounds", type=Path, metavar="TOML", help="bounds (default: ladders/qwen3_vl.toml)")
    add("--policy", type=Path, metavar="TOML", help="policy (default: ladders/policy.toml)")
    add("--timeout", type=_seconds, dest="timeout_s", metavar="S", help="seconds the engine may take (default: 900)")


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r} is no grid of patches; write for example 28x28")
    return int(rows), int(columns)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="report folder (default: reports/<checkpoint>-<mode>)")
    parser.add_argument("--json", action="store_true", help="print the run record instead of the table")


def _rung_arguments(parser: argparse.ArgumentParser) -> None:
    from harness.ladder import NAMES

    parser.add_argument("--rung", action="append", choices=NAMES, help="only this rung (may be repeated)")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")


def _record_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="?", help="HF model directory or hub id (default: the embedded tiny one)")
    add("--revision", help="revision of a hub id")
    add("--out", type=Path, metavar="DIR", help="oracle folder (default: under oracles/recorded)")
    add("--cases", type=Path, metavar="TOML", help="cases (default: ladders/cases.toml)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--inside", metavar="LAYERS", help="also record the inside of layers: all, or numbers such as 0,1,5")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="?", help="HF model directory or hub id (default: the embedded tiny one)")
    add("--revision", help="revision of a hub id")
    add("--mode", choices=("fp16", "int8lin", "int8hu"), default="int8hu")
    add("--out", type=Path, metavar="DIR", default=Path("build"), help="where the bundles go (default: build)")
    add("--grid", type=_grid, default=(28, 28), metavar="HxW", help="patch grid of the vision bundle (default: 28x28)")
    add("--context", type=int, default=512, metavar="TOKENS", help="slots of the KV cache (default: 512)")
    add("--dynamic", action="store_true", help="also export the dynamic-S twin")
    add("--activations", choices=("fp16", "fp32"), default="fp16", help="fp32 separates structure from rounding")
    add("--overwrite", action="store_true", help="replace bundles that are there")
    add("--json", action="store_true", help="print paths and sizes as JSON")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="report folder with run.json and certificate.json")
    parser.add_argument("bundle", type=Path, nargs="?", help="the bundle that the certificate must speak for")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("report", type=Path, nargs="*", help="report folder with run.json; two folders: what changed between them")
    add("--card", action="store_true", help="print the section for a model card")
    add("--index", type=Path, metavar="DIR", help="write DIR/index.html over the reports in DIR")


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="TOML", required=True, help="where the bounds are written")


def _nothing(parser: argparse.ArgumentParser) -> None:
    pass


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
    whole = list(names) == list(_all_rungs())
    try:
        with Screen(quiet=arguments.json) as screen:
            subject.progress = screen.step
            session.climb_all(subject, run, names, screen.rung)
    finally:
        subject.close()
    decision = session.write(run, subject, folder)
    if arguments.json:
        print(json.dumps(run.record()))
    else:
        screen.table(run, decision, names, folder)
    return decision.exit_code if whole else _part(run, subject.policy)


def _all_rungs() -> Sequence[str]:
    from harness.ladder import NAMES

    return NAMES


def _part(run: Any, policy: Any) -> int:
    """Exit code of a run that asked for some rungs only: theirs, not that of the ladder."""
    from harness.verdict import exit_code, worst

    return int(exit_code(worst(verdict.outcome for verdict in run.verdicts if not policy.excuses(verdict))))


def _record(arguments: Arguments) -> int:
    subject = subject_of(arguments)
    checkpoint, cases = subject.checkpoint, list(subject.cases.values())
    from harness.oracle import record  # heavy, so what can be refused is refused before
    from harness.subject import recorded_folder
    from harness.terminal import Screen

    inside = _layers(arguments.inside, max(checkpoint.geometry.layers, checkpoint.geometry.vision_layers))
    folder = arguments.out or recorded_folder(checkpoint, arguments.device)
    with Screen() as screen:
        oracle = record(checkpoint, cases, folder, device=arguments.device, inside=inside,
                        progress=lambda what, done, total: screen.step("record", done, total))
    print(f"{len(oracle.cases)} cases of {checkpoint.name} recorded in {folder}, digest {oracle.digest[:12]}")
    return ExitCode.PASS


def _layers(text: str | None, count: int) -> frozenset[int] | str | None:
    if text is None or text == "all":
        return text
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < count for part in parts):
        raise HarnessError(f"{text!r} is neither 'all' nor layer numbers below {count}", where="--inside",
                           fix="write for example --inside 0,1")
    return frozenset(map(int, parts))


def _export(arguments: Arguments) -> int:
    checkpoint = subject_of(arguments).checkpoint
    from harness.export import export  # heavy, so what can be refused is refused before
    from harness.terminal import Screen

    with Screen(quiet=arguments.json) as screen:
        result = export(checkpoint, arguments.out, arguments.mode, grid=arguments.grid, context=arguments.context,
                        dynamic=arguments.dynamic, activations=arguments.activations, overwrite=arguments.overwrite,
                        progress=screen.say)
    print(json.dumps(result.record()) if arguments.json else result.describe())
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
            subject.progress = screen.step
            bounds = calibrate(subject, screen.step)
    finally:
        subject.close()
    write_atomic(arguments.out, to_toml(bounds, arguments.command))
    print(f"{len(bounds)} bounds written to {arguments.out}")
    return ExitCode.PASS


def _verify(arguments: Arguments) -> int:
    from harness.bundle import Bundle
    from harness.gate import verify
    from harness.session import read_report
    from harness.verdict import Outcome, exit_code

    record, certificate = read_report(arguments.report)
    digest = Bundle.open(arguments.bundle).digest if arguments.bundle else None
    found = verify(record, certificate, digest)
    for sentence in found:
        print(f"does not match: {sentence}")
    if found:
        return ExitCode.FAIL
    speaks = f" and speaks for {arguments.bundle}" if arguments.bundle else "; give the bundle to check its bytes too"
    print(f"{certificate['outcome']}: the certificate agrees with its record{speaks}")
    return exit_code(Outcome(certificate["outcome"]))


def _report(arguments: Arguments) -> int:
    from harness.session import rerender

    print(rerender(arguments.report, card=arguments.card, index=arguments.index))
    return ExitCode.PASS


def _doctor(arguments: Arguments) -> int:
    from harness.doctor import examine

    return examine()


VERBS = {
    "gate": Verb("run the whole ladder, write the report and the certificate", (_subject_arguments, _output_arguments),
                 _gate),
    "ladder": Verb("run some rungs", (_subject_arguments, _output_arguments, _rung_arguments), _ladder),
    "record": Verb("record the fp32 oracle", (_record_arguments,), _record),
    "export": Verb("quantize and export a bundle", (_export_arguments,), _export),
    "calibrate": Verb("measure this model's healthy noise and write its bounds",
                      (_subject_arguments, _calibrate_arguments), _calibrate),
    "verify": Verb("does a certificate still speak for a bundle?", (_verify_arguments,), _verify),
    "report": Verb("render reports again from their records", (_report_arguments,), _report),
    "doctor": Verb("what this machine can record, export and run", (_nothing,), _doctor),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="harness", description="Proves a model converted to Core AI right, or says where "
                                  "it is wrong.", epilog="exit codes: 0 pass, 1 fail, 2 usage or bad input, 3 could not "
                                  "decide, 130 interrupted")
    top.add_argument("--version", action="version", version=f"harness {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.help, description=verb.help[0].upper() + verb.help[1:] + ".")
        for add in verb.arguments:
            add(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; whatever goes wrong is one sentence on stderr and a documented exit code, never a stack trace."""
    arguments = parser().parse_args(argv)
    arguments.command = shlex.join(["harness", *(sys.argv[1:] if argv is None else argv)])
    try:
        with _killed_as_interrupted():
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
