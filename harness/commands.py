"""What the verbs `record` and `synth` do; heavy imports happen inside."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from harness.errors import ExitCode, HarnessError

if TYPE_CHECKING:
    from harness.subject import Subject


def record(arguments: argparse.Namespace, subject: Subject) -> int:
    """`harness record`."""
    checkpoint, cases = subject.checkpoint, list(subject.cases.values())
    checkpoint.digest_soon()  # beside the imports
    from harness.drafts import read

    given = read(arguments.draft) if arguments.draft else None
    from harness import oracle as oracles  # heavy, so what can be refused is refused before
    from harness.subject import recorded_folder
    from harness.terminal import Screen

    inside = _layers(arguments.inside, max(checkpoint.geometry.layers, checkpoint.geometry.vision_layers))
    folder = arguments.out or recorded_folder(checkpoint, arguments.device)
    with Screen() as screen:
        oracle = oracles.record(
            checkpoint, cases, folder, device=arguments.device, inside=inside, memory=arguments.memory, drafts=given,
            progress=lambda what, done, total: screen.step(what.partition(":")[0], done, total),
            say=lambda text: print(text, flush=True))
    facts = [oracle.case(name).facts for name in oracle.cases]
    drafts = {"own": " behind a draft of its own", "given": " behind the draft given"}
    drafted = drafts.get(facts[0].get("draft"), "") if len({fact.get("draft") for fact in facts}) == 1 else ""
    print(f"{len(oracle.cases)} cases of {checkpoint.name} recorded in {folder} with "
          f"{max(fact.get('passes', 1) for fact in facts)} passes over the weights in float32{drafted}, "
          f"digest {oracle.digest[:12]}")
    return ExitCode.PASS


def _layers(text: str | None, count: int) -> frozenset[int] | str | None:
    if text is None or text == "all":
        return text
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < count for part in parts):
        raise HarnessError(f"{text!r} is neither 'all' nor layer numbers below {count}", where="--inside",
                           fix="write for example --inside 0,1")
    return frozenset(map(int, parts))


def synth(arguments: argparse.Namespace) -> int:
    """`harness synth`."""
    from harness.synth import plan, synthesize
    from harness.terminal import Screen

    what = plan(arguments.size, arguments.layers, arguments.vision_layers)
    print(what.describe(arguments.target), flush=True)
    with Screen() as screen:
        synthesize(what, arguments.target, arguments.seed,
                   lambda done, total: screen.step("weights", done, total))
    print(f"{arguments.target} is written: {arguments.size}, seed {arguments.seed}")
    return ExitCode.PASS
