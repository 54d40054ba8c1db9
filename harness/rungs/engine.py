"""Engine: inside the bundle, on its real runtime, every layer, the KV cache and the logits are the twin's.

Both compute the same weights, so what is left is the engine's rounding: the bound belongs to engine, mode and width. Our
own export runs a second time with float32 activations (`~sharp`), where structure shows without that rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.ladder import judge
from harness.plan import SHARP, with_cache
from harness.rungs import twinned
from harness.shipped import Shipped
from harness.subject import Subject
from harness.trace import vision_seams
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
    bundle = bundle_of(subject, case)
    engine = bundle.trace(name)
    if subject.twin_streams():
        found = twinned.own(subject).verdicts(case)
    else:
        twin = subject.twin_trace(name, subject.twin_tokens(name))
        found = [verdict for seam in planned for verdict in at(subject, case, seam, twin)]
    promised = bundle.engine.seams()
    return found + [Verdict(NAME, case, seam, Outcome.ERROR, "the engine was to read this value and did not")
                    if seam in promised or seam.startswith("kv.") else
                    Verdict(NAME, case, seam, Outcome.SKIP, "no seam index says where the bundle holds this value")
                    for seam in planned if value_at(engine, seam) is None]


def bundle_of(subject: Subject, case: str) -> Shipped:
    """The bundle that a case of this rung looks into."""
    return subject.sharp if case.endswith(SHARP) else subject.shipped


def at(subject: Subject, case: str, seam: str, twin: Mapping[str, np.ndarray]) -> list[Verdict]:
    """The verdict at one seam; none where the engine did not read it."""
    name, bundle = case.removesuffix(SHARP), bundle_of(subject, case)
    got, reference = value_at(bundle.trace(name), seam), value_at(twin, seam)
    if got is None:
        return []
    key = bundle.key if case.endswith(SHARP) else subject.engine_key
    return judge(NAME, case, [seam], {} if reference is None else {seam: reference}, {"": {seam: got}}, subject.bounds,
                 engine=key, regions=subject.regions(name))


def value_at(trace: Mapping[str, np.ndarray], seam: str) -> np.ndarray | None:
    """What a trace holds at a seam, a layer's cache included, or None."""
    layer = seam.rpartition(".")[2]
    whole = seam.removesuffix(f".{layer}")
    if seam.startswith("kv.") and whole in trace:
        states = trace[whole]
        return states[int(layer)].transpose(1, 0, 2) if int(layer) < len(states) else None
    return trace[seam] if seam in trace else None
