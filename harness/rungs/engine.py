"""Engine: inside the bundle, on its real runtime, every layer, the KV cache and the logits are the twin's.

Both compute the same weights, so what is left is the engine's rounding: the bound belongs to engine, mode and width. Our
own export runs a second time with float32 activations (`~sharp`), where structure shows without that rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.ladder import judge
from harness.plan import SHARP, with_cache
from harness.rungs.decode import by_layer
from harness.subject import Subject
from harness.trace import Trace, vision_seams
from harness.verdict import Outcome, Verdict

NAME = "engine"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """All stream seams, cache and logits, for each case the bundle runs; for our own export on its sharp twin as well."""
    seams = {}
    for case in subject.engine_cases():
        vision = vision_seams(subject.geometry) if subject.cases[case].images else ()
        seams[case] = (*vision, *with_cache(subject.geometry))
    if subject.sharp is not None:
        # The sharp twin first: what breaks there is structure, and it breaks at its own place.
        seams = {**{case + SHARP: planned for case, planned in seams.items()}, **seams}
    return seams


def measure(subject: Subject, case: str) -> list[Verdict]:
    """The engine's trace against the twin's, both teacher-forced on the twin's greedy tokens."""
    planned, name = plan(subject)[case], case.removesuffix(SHARP)
    bundle = subject.shipped if name == case else subject.sharp
    engine, twin = bundle.trace(name), subject.twin_trace(name, subject.twin_tokens(name))
    got = Trace({**engine.arrays, **by_layer(engine).arrays}).only(planned)
    have = [seam for seam in planned if seam in got]
    reference = {**twin.arrays, **by_layer(twin).arrays}
    key = subject.engine_key if bundle is subject.shipped else bundle.key
    verdicts = judge(NAME, case, have, reference, {"": got}, subject.bounds, engine=key,
                     regions=subject.regions(name)) if have else []
    promised = bundle.engine.seams()
    return verdicts + [Verdict(NAME, case, seam, Outcome.ERROR, "the engine was to read this value and did not")
                       if seam in promised or seam.startswith("kv.") else
                       Verdict(NAME, case, seam, Outcome.SKIP, "no seam index says where the bundle holds this value")
                       for seam in planned if seam not in got]
