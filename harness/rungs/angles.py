"""The shipped program's positions, tried at every place of its context and every slot of its image, against the contract.

What rotates queries and keys is evaluated from the program's own operations, for a text without image and for an image at
the beginning, in the middle and at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.errors import HarnessError
from harness.graph.contract import NO_SHIFT, positions, rope_axis
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

SEAM = "rope.positions"
NEAR = 2.0**-20
"""Relative: another order of one float32 multiplication, and no other integer below a million."""


def angles(subject: Subject, case: str) -> Verdict:
    """One verdict: how many (token, lane) angles are those of another position."""
    from harness.graph.norms import inverse_frequencies

    geometry = subject.geometry
    try:
        made = subject.rotations()
    except HarnessError as error:
        return Verdict("weights", case, SEAM, Outcome.SKIP, f"the program {error.what}")
    lanes = geometry.head_dim // 2
    axis = rope_axis(geometry.mrope_section, lanes)
    frequencies = inverse_frequencies(geometry.rope_theta, lanes).numpy()
    total, wrong, first = 0, 0, ""
    for name, ids, start, amount, width in _conversations(subject, made):
        planes = positions(ids, geometry.vocab, start, amount, width)
        want = planes.astype(np.float32)[axis].T * frequencies
        found = made.of(ids, start, amount)
        if found.shape[1] not in (lanes, 2 * lanes):
            return Verdict("weights", case, SEAM, Outcome.FAIL, f"{found.shape[1]} angles a token where {lanes} are right")
        for half in np.split(found, found.shape[1] // lanes, axis=1):
            # Written so that NaN is not near.
            off = ~(np.abs(half - want) <= NEAR * np.abs(want))
            total, wrong = total + off.size, wrong + int(off.sum())
            if off.any() and not first:
                place, lane = (int(part) for part in np.argwhere(off)[0])
                first = (f", the first with {name} at place {place}, lane {lane}: "
                         f"{half[place, lane] / frequencies[lane]:.6g} where {planes[axis[lane], place]} is right")
    reason = f"{wrong} of {total} angles are another position's{first}" if wrong else f"{total} angles as the contract says"
    return Verdict("weights", case, SEAM, Outcome.FAIL if wrong else Outcome.PASS, reason, "mismatches", float(wrong), 0.0)


def _conversations(subject: Subject, made: Any) -> Iterator[tuple[str, np.ndarray, int, int, int]]:
    """Name, ids over the whole context, shift start and amount, and columns of the image."""
    slots, context = made.slots, made.context or subject.bundle.max_context_length
    rows, columns = (side // subject.geometry.merge for side in subject.options.grid)
    text = np.zeros(context, dtype=np.int32)
    yield "text alone", text, NO_SHIFT, 0, columns
    if slots and slots <= context:
        for name, start in (("an image first", 0), ("an image in the middle", (context - slots) // 2),
                            ("an image last", context - slots)):
            ids = text.copy()
            ids[start:start + slots] = subject.geometry.vocab + np.arange(slots)
            yield name, ids, start + slots, slots - max(rows, columns), columns
