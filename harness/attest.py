"""What a certificate is good for: checking a report against a bundle elsewhere, and the line before an upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.bounds import BOUNDS, Bounds, load_bounds
from harness.bundle import LANGUAGE, VISION, Bundle
from harness.cases import CASES, load_cases
from harness.checkpoint import open_checkpoint, read_json
from harness.errors import ExitCode, HarnessError, Undecided
from harness.gate import verify
from harness.policy import POLICY, load_policy
from harness.signing import unsigned
from harness.verdict import Outcome, exit_code

RECORD, CERTIFICATE = "run.json", "certificate.json"
ABOVE = 3
"""How many folders above a bundle are searched: `harness gate` exports to reports/<run>/bundles/<bundle>."""


@dataclass(frozen=True)
class Asked:
    """What a certificate is held against; None asks for nothing, or for the default of `publish_check`."""

    policy: Path | None = None
    bounds: Path | None = None
    cases: Path | None = None
    signed_by: str | None = None


def read_report(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and certificate.json of a report folder. Raises HarnessError where one is missing or no JSON object."""
    found = []
    for path in (folder / RECORD, folder / CERTIFICATE):
        found.append(read_json(path))
        if not isinstance(found[-1], dict):
            raise HarnessError("must be a JSON object", where=path, fix="run the gate again")
    return found[0], found[1]


def check_report(folder: Path, bundles: list[Path], asked: Asked) -> tuple[list[str], ExitCode]:
    """`harness verify`: what to print, and the exit code: 1 where anything does not match, else that of the outcome."""
    record, certificate = read_report(folder)
    found = problems(folder, record, certificate, [open_any(path) for path in bundles], asked)
    if found:
        return [f"does not match: {sentence}" for sentence in found], ExitCode.FAIL
    speaks = f"it speaks for {' and '.join(map(str, bundles))}" if bundles else "give the bundle to check its bytes too"
    by = " by a sketch of the oracle" if "sketch_of" in (record["subject"].get("oracle") or {}) else ""
    return ([f"{certificate['outcome']}: the certificate agrees with its record, whose figures were judged again{by}; "
             f"{speaks}"],
            exit_code(Outcome(certificate["outcome"])))


def publish_check(path: Path, given: Path | None, asked: Asked) -> tuple[list[str], ExitCode]:
    """`harness publish-check`: 0 only where a certificate of a PASS speaks for exactly these bytes under a strict policy.

    Raises HarnessError for what is no bundle, Undecided where no certificate is found.
    """
    bundle = open_any(path)
    folder = given if given is not None else beside(path)
    record, certificate = read_report(folder)
    found = problems(folder, record, certificate, [bundle],
                     replace(asked, policy=asked.policy or POLICY, cases=asked.cases or CASES))
    if not found and certificate["outcome"] != Outcome.PASS.value:
        found = [f"the certificate says {certificate['outcome']}: {certificate['reason']}"]
    if found:
        return [f"do not publish {path}, by the certificate in {folder}:", *(f"  {one}" for one in found)], ExitCode.FAIL
    signed = f", signed by {asked.signed_by}" if asked.signed_by else "; it is not signed, so it is as good as its source"
    return [f"publish {path}: {certificate['outcome']} by {certificate['engine'].get('name')}, policy "
            f"{certificate['policy']['name']}, certificate {certificate['digest']} in {folder}{signed}"], ExitCode.PASS


def beside(path: Path) -> Path:
    """The report folder that goes with a bundle: `<bundle>.report` beside it, or the nearest folder above with one.

    It cannot lie inside: the certificate speaks for every file there.
    """
    whole = path.resolve()
    looked = [whole.with_name(whole.name + ".report"), *list(whole.parents)[:ABOVE]]
    found = next((folder for folder in looked if (folder / CERTIFICATE).is_file()), None)
    if found is None:
        raise Undecided(f"no certificate speaks for it: none in {', '.join(map(str, looked))}", where=path,
                        fix="run `harness gate --bundle`, or give --certificate")
    return found


def open_any(path: Path) -> Bundle:
    """A bundle of either kind. Raises HarnessError where it is none, or damaged."""
    if path.is_dir() and path.suffix != ".aimodel":
        table = read_json(path / "metadata.json")
        kind = table.get("kind") if isinstance(table, dict) else None
        return Bundle.open(path, VISION if kind == VISION else LANGUAGE)
    return Bundle.open(path, VISION if path.suffix == ".aimodel" else LANGUAGE)


def problems(folder: Path, record: Mapping[str, Any], certificate: Mapping[str, Any], bundles: list[Bundle],
             asked: Asked) -> list[str]:
    """Everything that does not hold, in sentences."""
    found = verify(record, certificate, None, load_policy(asked.policy) if asked.policy else None,
                   _least_bounds(record, asked.bounds))
    found += _cases(record, asked.cases) if asked.cases else []
    found += [sentence for bundle in bundles for sentence in _bytes(record, bundle)]
    if asked.signed_by is not None and (why := unsigned(folder / CERTIFICATE, asked.signed_by)):
        found.append(why)
    return found


def _least_bounds(record: Mapping[str, Any], given: Path | None) -> Bounds | None:
    """Bounds asked for; or those of this repository where the record is of the checkpoint that they were measured on."""
    if given is not None:
        return load_bounds(given)
    subject = record.get("subject")
    checkpoint = subject.get("checkpoint") if isinstance(subject, dict) else None
    ours = isinstance(checkpoint, dict) and checkpoint.get("revision") == "embedded" and BOUNDS.is_file()
    return load_bounds() if ours and checkpoint.get("digest") == open_checkpoint().digest else None


def _cases(record: Mapping[str, Any], least: Path) -> list[str]:
    """Cases of a file that the run left out, or did not run on the engine."""
    verdicts = [row for row in record.get("verdicts", []) if isinstance(row, dict)]
    judged = {rung: {row.get("case") for row in verdicts if row.get("rung") == rung} for rung in ("decoder", "tokens")}
    found = []
    for case in load_cases(least):
        if case.name not in judged["decoder"]:
            found.append(f"case {case.name!r} of {least.name} was not judged")
        elif case.engine and case.name not in judged["tokens"]:
            found.append(f"case {case.name!r} of {least.name} was not run on the engine")
    return found


def _bytes(record: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """Where the bundle in hand is not the one that was judged, file by file as far as the record knows them."""
    subject = record.get("subject")
    part = "bundle" if bundle.kind == LANGUAGE else "vision_bundle"
    spoken = subject.get(part) if isinstance(subject, dict) else None
    if not isinstance(spoken, dict):
        return [f"the certificate speaks for no {part.replace('_', ' ')}, this is {bundle.path}"]
    if spoken.get("digest") == bundle.digest:
        return []
    sentence = f"the certificate speaks for {part.replace('_', ' ')} {str(spoken.get('digest'))[:12]}, {bundle.path} is " \
               f"{bundle.digest[:12]}"
    held = spoken.get("files")
    if not isinstance(held, dict):
        return [sentence]
    names = sorted({*held, *bundle.hashes})
    words = {(True, True): "differs", (True, False): "is missing", (False, True): "was not judged"}
    apart = [f"{name} {words[name in held, name in bundle.hashes]}" for name in names
             if held.get(name) != bundle.hashes.get(name)]
    return [f"{sentence}: {', '.join(apart[:8])}{f' and {len(apart) - 8} more' if len(apart) > 8 else ''}"]
