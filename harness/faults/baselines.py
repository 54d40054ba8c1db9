"""What people do today, on the same faults: four common gates over one prompt.

cosine: whole-tensor cosine >= 0.999 at every layer of one image prompt, and 16 greedy tokens, as ports of this family
publish it. allclose: final logits within rtol 1e-5 and atol 1e-3, coreai-torch's default. polygraphy: final logits
through Polygraphy's own comparison at its defaults (rtol and atol 1e-5, element by element), where it is installed (the
`test` extra). last: cosine >= 0.999 of the last position's logits.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from harness.engines import Request
from harness.metrics import distance
from harness.subject import Subject
from harness.trace import Trace, decoder_seams, vision_seams

GATES = {"cosine": "cosine 0.999 + 16 tokens", "allclose": "allclose", "polygraphy": "Polygraphy", "last": "last logits"}
"""Name and heading of each gate."""
LEAST, TOKENS = 0.999, 16
RTOL, ATOL = 1e-5, 1e-3


def verdicts(subject: Subject, on_engine: bool) -> dict[str, bool | None]:
    """For each gate whether it stops what is under test: the graph against the oracle, the engine against the twin."""
    case = next(name for name in subject.engine_cases() if subject.cases[name].images)
    recorded = subject.recorded(case)
    length = recorded.inputs.length
    try:
        if on_engine:
            tokens = subject.twin_tokens(case)
            reference, found = subject.twin_trace(case, tokens), subject.shipped.trace(case)
            chosen = found["logits"][length - 1:length - 1 + TOKENS].argmax(-1)
        else:
            tokens = tuple(map(int, recorded.rollout.tokens))
            reference, found = recorded.trace, subject.graph_trace(case, "accumulated")
            request = Request(recorded.inputs, forced=tokens[:TOKENS])
            stepped = next(subject.graph(case, stepwise=True).run([request]))
            chosen = stepped["logits"][length - 1:length - 1 + TOKENS].argmax(-1)
    except Exception:  # what cannot be run passes no gate
        return dict.fromkeys(GATES, True)
    seams = [*vision_seams(subject.geometry), *decoder_seams(subject.geometry)]
    layers = all(_cosine(reference, found, seam) >= LEAST for seam in seams if seam in reference and seam in found)
    prompt, theirs = reference["logits"][:length], found["logits"][:length]
    return {"cosine": not (layers and list(chosen) == list(tokens[:TOKENS])),
            "allclose": not np.allclose(theirs, prompt, rtol=RTOL, atol=ATOL),
            "polygraphy": _polygraphy(prompt, theirs),
            "last": not distance(prompt[-1:], theirs[-1:]).cosine >= LEAST}


def _cosine(reference: Trace, found: Trace, seam: str) -> float:
    if reference[seam].shape != found[seam].shape:
        return -1.0
    return distance(reference[seam], found[seam]).cosine


def _polygraphy(prompt: np.ndarray, theirs: np.ndarray) -> bool | None:
    """Whether Polygraphy's default comparison stops these logits; None where it is not installed."""
    if find_spec("polygraphy") is None:
        return None
    from polygraphy.comparator import IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    results = (IterationResult({"logits": array}, runner) for array, runner in ((theirs, "converted"), (prompt, "reference")))
    return not all(SimpleCompareFunc()(*results).values())
