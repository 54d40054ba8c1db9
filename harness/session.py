"""One run from start to finish: climb the rungs, localize what failed, fold, write the record and its reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.attest import read_report
from harness.errors import HarnessError, Undecided, within
from harness.exhibits import bandwidth, heat_rows, power_rows, tensor_rows, thumbnail
from harness.gate import Decision, certificate, fold
from harness.ladder import NAMES
from harness.options import factory_of
from harness.run import Run, json_text, machine, write_files
from harness.signing import SUFFIX
from harness.store import Oracle
from harness.subject import Subject
from harness.verdict import Outcome, Verdict
from harness.zoom import localize

Progress = Callable[[str, str, int, int], None]


def check_given(subject: Subject) -> None:
    """Open everything that the user gave, before any work: what is bad input then ends the run with one sentence.

    Raises HarnessError for whatever cannot be read, does not belong to the checkpoint, or was changed since it was made.
    """
    options = subject.options
    _ = subject.checkpoint, subject.cases, subject.bounds, subject.policy, factory_of(options.graph)
    if options.work.exists() and not options.work.is_dir():
        raise HarnessError("is no directory", where=options.work, fix="give another --out")
    if options.bundle is not None and subject.bundle.vocab_size != subject.geometry.vocab:
        raise HarnessError(f"its vocab_size is {subject.bundle.vocab_size}, the checkpoint's {subject.geometry.vocab}",
                           where=options.bundle, fix="give the checkpoint that the bundle was made from")
    _ = options.vision_bundle and subject.vision_bundle
    if options.oracle is not None:
        with within(options.oracle):
            for name in subject.cases:
                recorded = subject.recorded(name)
                _ = recorded.inputs, recorded.rollout
                for seam in recorded.seams:
                    recorded.load((seam,))


def climb_all(subject: Subject, run: Run, names: Sequence[str] = NAMES,
              progress: Progress = lambda rung, case, done, total: None) -> None:
    """Judge the named rungs into `run.verdicts`, localize failures, and gather what the report shows."""
    from harness.rungs import CHECKS, answers

    if "tokens" in names or "engine" in names:
        with run.timed("prepare engine"):
            with suppress(Undecided):  # the rungs that need the engine say why there is none; the others still judge
                subject.start_engine()
    for name in names:
        plan = _plan(subject, run, name)
        with run.timed(f"rung {name}"):
            for done, case in enumerate(plan):
                progress(name, case, done, len(plan))
                run.verdicts += answers(CHECKS[name], subject, case)
    with run.timed("localize"):
        run.localization = localize(subject, run.verdicts)
    with run.timed("describe"):
        describe(subject, run)


def _plan(subject: Subject, run: Run, name: str) -> Sequence[str]:
    """Cases of a rung; a plan that cannot be made is an ERROR of the rung, not the end of the run."""
    from harness.rungs import CHECKS

    try:
        return list(CHECKS[name].plan(subject))
    except HarnessError as error:
        reason = str(error)
    except Exception as error:  # what is under test may break here too
        reason = f"its plan crashed with {type(error).__name__}: {error}"
    run.verdicts.append(Verdict(name, "*", "*", Outcome.ERROR, reason))
    return []


def describe(subject: Subject, run: Run) -> None:
    """Fill in what was judged and by what; what cannot be known any more is left empty, the verdicts say why."""
    checkpoint = subject.checkpoint
    run.policy, run.bounds = subject.policy.record(), subject.bounds.record()
    run.subject = {"checkpoint": {"name": checkpoint.name, "revision": checkpoint.revision, "digest": checkpoint.digest,
                                  "geometry": subject.geometry.record()},
                   "exported": subject.sharp is not None, "graph": subject.options.graph,
                   "mode": _try(lambda: subject.mode),
                   "oracle": _try(lambda: oracle_row(subject.oracle)) if subject.has_oracle else None,
                   "bundle": None, "vision_bundle": None}
    # Only what the rungs asked for is described: a porter who climbs one torch rung must not wait for an export.
    if subject.shipped.there:
        run.subject |= {"bundle": _try(lambda: subject.bundle.record()),
                        "vision_bundle": _try(lambda: subject.vision_bundle and subject.vision_bundle.record())}
    started = subject.shipped.started
    engine = _try(lambda: subject.shipped.engine) if started else None
    facts = engine.facts if engine else {}
    run.engine = {"name": engine.name if engine else None, "version": facts.get("runtime"),
                  "platform": facts.get("platform"),
                  "compute_unit": facts.get("compute_unit"), "dtype": facts.get("dtype"), "build": facts.get("build")}
    run.speed = _try(lambda: speed(subject)) or {} if started else {}
    run.cases = [row for name in subject.cases
                 if subject.has_oracle and (row := _try(lambda name=name: case_row(subject, name)))]
    judged = {rung: {verdict.case for verdict in run.of(rung)} for rung in ("tokens", "decoder")}
    run.tokens = [row for name in subject.cases if name in judged["tokens"]
                  and (row := _try(lambda name=name: token_rows(subject, name)))]
    run.heat = [row for name in subject.cases if name in judged["decoder"]
                for row in _try(lambda name=name: heat_rows(subject, name)) or []]
    run.weights = tensor_rows(run.of("weights"))
    run.power = _try(lambda: power_rows(subject)) or []


def oracle_row(oracle: Oracle) -> dict[str, Any]:
    """Digest of the oracle, and what it was recorded with; its checkpoint is named beside it. Of a sketch also the
    digest of the oracle that it stands for."""
    identity = oracle.identity.record()
    kept = ("revision", "device", "attention", "dtype", "transformers", "torch")
    row = {"digest": oracle.digest, "identity": {name: identity[name] for name in kept}}
    return row if oracle.exact else {**row, "sketch_of": oracle.of}


def speed(subject: Subject) -> dict[str, Any]:
    """The row that ports publish, from the first case the bundle runs: tokens/s, seconds, bytes, with engine and machine.

    A decode step reads every weight but the text table, of which it reads one row.
    """
    case = subject.engine_cases()[0]
    facts = subject.engine_trace(case).facts
    geometry, bundle = subject.geometry, subject.bundle
    own_head = not geometry.tied or subject.mode == "int8hu"
    table = 2 * geometry.hidden * (geometry.vocab - 1) if own_head else 0
    known = ("prefill_tok_s", "decode_tok_s", "cold_load_s", "warm_load_s", "vision_s", "peak_rss_bytes")
    return {**{name: facts.get(name) for name in known}, "case": case, "bundle_bytes": bundle.size,
            "bytes_per_token": (bundle.asset / "main.mlirb").stat().st_size - table, "engine": subject.shipped.engine.name,
            "machine": machine(), **bandwidth()}


def _try(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception:  # a porter's code may raise anything; the verdicts say what, the description just lacks a row
        return None


def case_row(subject: Subject, name: str) -> dict[str, Any]:
    """What the report says of a case."""
    case, recorded = subject.cases[name], subject.recorded(name)
    row: dict[str, Any] = {"name": name, "why": case.why, "length": recorded.inputs.length, "image": None,
                           "prompt": "\n".join(turn.text for turn in case.turns), "engine": case.engine}
    if recorded.inputs.grid:
        _, height, width = recorded.inputs.grid
        merge = subject.geometry.merge
        first = int((recorded.inputs.ids == subject.geometry.image_token).argmax())
        row["image"] = {"grid": [height // merge, width // merge], "first": first,
                        "count": height * width // merge**2, "thumbnail": _try(lambda: thumbnail(subject, name))}
    return row


def token_rows(subject: Subject, name: str) -> dict[str, Any]:
    """Oracle beside python (the twin) beside the engine, step by step, each row from the same forced tokens."""
    recorded = subject.recorded(name)
    first, oracle = recorded.inputs.length - 1, recorded.rollout.tokens
    python = _try(lambda: subject.twin_tokens(name)) if subject.cases[name].engine else None
    engine = _try(lambda: subject.engine_trace(name)["logits"].argmax(-1)) if python else None
    rows = []
    for step, token in enumerate(map(int, oracle)):
        rows.append({"step": step, "position": first + step + 1, "oracle": token,
                     "python": int(python[step]) if python else None,
                     "engine": int(engine[first + step]) if engine is not None else None,
                     "margin": round(float(recorded.rollout.margins[step]), 4),
                     "tie": step in recorded.rollout.ties, "text": subject.decode_text(token)})
    return {"case": name, "steps": rows}


def write(run: Run, subject: Subject, folder: Path) -> Decision:
    """Write run.json, certificate.json, report.md and report.html into `folder`, all or none."""
    from harness.report import render_html, render_markdown

    decision = fold(run.verdicts, subject.policy)
    record, signed = run.record(), certificate(run, subject.policy)
    (folder / f"certificate.json{SUFFIX}").unlink(missing_ok=True)  # it was made for another certificate
    write_files(folder, {"run.json": json_text(record), "certificate.json": json_text(signed),
                         "report.md": render_markdown(record, signed), "report.html": render_html(record, signed)})
    return decision
