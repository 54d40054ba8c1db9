"""Constants of the exported program that no checkpoint holds, against its config: eps, scale, GELU, mask, rotation; its
position arithmetic, evaluated; and the types of its norms and softmaxes.

A program may not show one of them (a fused operation holds it, or it is folded into a weight): that is a SKIP by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.checkpoint import Geometry
from harness.graph.contract import rope_axis
from harness.plan import CONSTANTS as SEAMS
from harness.rungs import angles, precision
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

CASE = "constants"
HIDDEN = -1e3
"""A hidden score must lie below this: exp(-1000) is 0 in every float."""


def constants(subject: Subject) -> list[Verdict]:
    """One verdict for each of `SEAMS`."""
    from harness.graph.vision import LAYER_NORM_EPS

    geometry, (decoder, vision) = subject.geometry, subject.programs()
    size = geometry.vision_hidden // geometry.vision_heads
    return [_eps("norm.eps", decoder.attributes, geometry.rms_eps), _eps("vision.eps", vision.attributes, LAYER_NORM_EPS),
            _scale("attention.scale", decoder.attributes, geometry.head_dim**-0.5, geometry.layers),
            _scale("vision.scale", vision.attributes, size**-0.5, geometry.vision_layers),
            _gelu(vision.attributes, geometry), _fill(decoder.attributes), *_rotations(subject, decoder, vision),
            angles.angles(subject, CASE), *precision.precision(subject, CASE)]


def _answer(seam: str, wrong: Sequence[Any], right: Any, count: int, what: str) -> Verdict:
    if not count:
        return Verdict("weights", CASE, seam, Outcome.SKIP, f"the program shows no {what}")
    reason = f"{count} x {what} {right}" if not wrong else f"{what} {wrong[0]} where {right} is right, {len(wrong)} of {count}"
    return Verdict("weights", CASE, seam, Outcome.FAIL if wrong else Outcome.PASS, reason, "mismatches",
                   float(len(wrong)), 0.0)


def _held(value: float, right: float) -> bool:
    """Whether a program's scalar is the right one as float32 or float16 holds it."""
    return np.float32(value) == np.float32(right) or np.float32(value) == np.float32(np.float16(right))


def _named(attributes: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row["value"] for row in attributes if row["name"] == name]


def _eps(seam: str, attributes: Sequence[Mapping[str, Any]], right: float) -> Verdict:
    found = _named(attributes, "eps")
    return _answer(seam, [value for value in found if not _held(value, right)], right, len(found), "eps")


def _scale(seam: str, attributes: Sequence[Mapping[str, Any]], right: float, layers: int) -> Verdict:
    """Factors below 1 that occur once a layer; others belong to something else."""
    counts = Counter(value for value in _named(attributes, "scale") if isinstance(value, float) and 0 < value < 1)
    found = [value for value, count in counts.items() if count == layers]
    held = sum(count for value, count in counts.items() if _held(value, right))
    if 0 < held < layers:  # some layers have it, so the others have another
        return _answer(seam, [value for value in counts if not _held(value, right)] or ["none"] * (layers - held), right,
                       layers, "attention scale")
    good = held > 0
    return _answer(seam, [] if good else found, right, layers if good or found else 0, "attention scale")


def _gelu(attributes: Sequence[Mapping[str, Any]], geometry: Geometry) -> Verdict:
    counts = Counter(_named(attributes, "approximate"))
    right = {"tanh": geometry.vision_layers, "none": 1 + len(geometry.deepstack_taps)}
    wrong = [f"{counts[name]} x {name}" for name, count in right.items() if counts[name] != count]
    return _answer("gelu.flavour", wrong, " and ".join(f"{count} x {name}" for name, count in right.items()),
                   sum(counts.values()), "GELU")


def _fill(attributes: Sequence[Mapping[str, Any]]) -> Verdict:
    found = [value for value in _named(attributes, "fill") if isinstance(value, float) and value < 0]
    return _answer("mask.fill", [value for value in found if value > HIDDEN], f"at most {HIDDEN:g}", len(found), "fill")


def _rotations(subject: Subject, decoder: Any, vision: Any) -> list[Verdict]:
    from harness.graph.norms import inverse_frequencies
    from harness.graph.vision import rotary_tables

    geometry = subject.geometry
    size = geometry.vision_hidden // geometry.vision_heads
    frequencies = [inverse_frequencies(geometry.rope_theta, geometry.head_dim // 2).numpy()]
    tables = [table.numpy() for table in rotary_tables(*subject.options.grid, geometry.merge, size)]
    halves = [np.split(table, 2, axis=-1)[0] for table in tables]
    return [_lanes(_tables("rope.frequencies", decoder.weights, [frequencies]), decoder, geometry),
            _tables("vision.rope", vision.weights, [tables, halves])]


def _lanes(verdict: Verdict, decoder: Any, geometry: Geometry) -> Verdict:
    """The same, or a FAIL where a table of truth values, one a lane, picks other lanes for a plane than the contract's."""
    axis = rope_axis(geometry.mrope_section, geometry.head_dim // 2)
    right = [axis == plane for plane in range(3)] + [axis != plane for plane in range(3)]
    found = [one.array.ravel() for one in getattr(decoder, "constants", ())
             if one.dtype == "i1" and np.prod(one.shape) == len(axis)]
    wrong = [np.flatnonzero(one).tolist() for one in found if not any(np.array_equal(one, held) for held in right)]
    if not wrong or verdict.outcome is Outcome.FAIL:
        return verdict
    lanes = [np.flatnonzero(held).tolist() for held in right[1:3]]
    return _answer("rope.frequencies", wrong, lanes, len(found), "lanes of a plane")


def _tables(seam: str, weights: Sequence[Any], forms: Sequence[Sequence[np.ndarray]]) -> Verdict:
    """Float32 tables of a form's size, bit by bit; every table of one of the forms must be there."""
    for form in forms:
        found = [table.rows().ravel() for table in weights if table.stored == "f32"
                 and np.prod(table.shape) == form[0].size]
        if found:
            lost = [right for right in form if not any(np.array_equal(one, right.ravel()) for one in found)]
            apart = [f"{min(float(np.abs(one - right.ravel()).max()) for one in found):.3g} off" for right in lost]
            return _answer(seam, apart, "bit for bit the formula's", len(form), f"table of {form[0].size} values")
    return _answer(seam, [], "", 0, "table of it")
