"""Engine: inside the bundle, on its real runtime, every layer, the KV cache and the logits are the twin's.

Both compute the same weights, so what is left is the engine's rounding: the bound belongs to engine, mode and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.checkpoint import Geometry
from harness.ladder import judge
from harness.rungs.decode import by_layer
from harness.subject import Subject
from harness.trace import Trace, decoder_seams, vision_seams
from harness.verdict import Outcome, Verdict

NAME = "engine"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """All stream seams, cache and logits, for each case the bundle runs."""
    seams = {}
    for case in subject.engine_cases():
        vision = vision_seams(subject.geometry) if subject.cases[case].images else ()
        seams[case] = (*vision, *_with_cache(subject.geometry))
    return seams


def _with_cache(geometry: Geometry) -> list[str]:
    """Decoder seams, each layer's cache before its output: so they are computed, so the first that breaks is the first."""
    cache = {f"decoder.layers.{layer:02d}": (f"kv.keys.{layer:02d}", f"kv.values.{layer:02d}")
             for layer in range(geometry.layers)}
    return [name for seam in decoder_seams(geometry) for name in (*cache.get(seam, ()), seam)]


def measure(subject: Subject, case: str) -> list[Verdict]:
    """The engine's trace against the twin's, both teacher-forced on the twin's greedy tokens."""
    engine, twin = subject.engine_trace(case), subject.twin_trace(case, subject.twin_tokens(case))
    planned = plan(subject)[case]
    got = Trace({**engine.arrays, **by_layer(engine).arrays}).only(planned)
    have = [seam for seam in planned if seam in got]
    reference = {**twin.arrays, **by_layer(twin).arrays}
    verdicts = judge(NAME, case, have, reference, {"": got}, subject.bounds, engine=subject.engine_key,
                     regions=subject.regions(case)) if have else []
    promised = subject.engine_seams
    return verdicts + [Verdict(NAME, case, seam, Outcome.ERROR, "the engine was to read this value and did not")
                       if seam in promised or seam.startswith("kv.") else
                       Verdict(NAME, case, seam, Outcome.SKIP, "no seam index says where the bundle holds this value")
                       for seam in planned if seam not in got]
