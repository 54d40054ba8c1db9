"""Weights: every tensor of graph and bundle is the checkpoint's after the documented remap; none missing, none invented."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from harness.audit import Expected, Finding, audit
from harness.errors import Undecided
from harness.plan import EXTRA
from harness.rungs import constants
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

NAME = "weights"
POSITIONS, PATCH_BIAS = "model.visual.pos_embed.weight", "model.visual.patch_embed.proj.bias"
SUBNORMAL = 2.0**-14
"""Least normal fp16."""
EMBEDDING = "model.language_model.embed_tokens.weight"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Every tensor of the checkpoint, in the graph and in the bundle, one row each for what has no source, and constants."""
    names, head = subject.checkpoint.names(), ()
    if "lm_head.weight" not in names and subject.mode == "int8hu":
        head = ("lm_head.weight",)  # a quantized head is a copy of its own, also where the checkpoint ties it
    return {"graph": (*names, EXTRA), "bundle": (*names, *head, EXTRA), constants.CASE: constants.SEAMS}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """Exact for the float32 graph; for the bundle exact as well, codes and scales against the quantizer's formula."""
    if case == constants.CASE:
        return constants.constants(subject)
    return _graph(subject) if case == "graph" else _bundle(subject)


def _graph(subject: Subject) -> list[Verdict]:
    import torch

    held = dict(subject.conversion(subject.options.grid).tensors())
    verdicts = []
    for name, stored in subject.checkpoint.tensors():
        if name not in held:
            verdicts.append(Verdict(NAME, "graph", name, Outcome.FAIL, "the graph under test does not hold this tensor"))
            continue
        tensor = held.pop(name).to("cpu")
        if tensor.shape != stored.shape:
            verdicts.append(Verdict(NAME, "graph", name, Outcome.FAIL,
                                    f"shape {tuple(tensor.shape)} where {tuple(stored.shape)} is right"))
            continue
        wrong = torch.nonzero(tensor.float() != stored.float())
        verdicts.append(_verdict("graph", name, wrong, tensor.numel(), str(tensor.dtype).removeprefix("torch.")))
    geometry = subject.geometry
    if geometry.tied and torch.equal(held.get("lm_head.weight", torch.empty(0)),
                                     subject.checkpoint.tensor(EMBEDDING).to(torch.float32)):
        held.pop("lm_head.weight")  # a tied head held twice is the same head
    return [*verdicts, extra_verdict("graph", sorted(held))]


def _bundle(subject: Subject) -> list[Verdict]:
    tables = [table for program in subject.programs() for table in program.weights]
    expected = _expected(subject)
    price = {one.name: {"quantization": _lost(one.value, one.weight)} for one in expected if one.step is not None}
    findings, extra = _fold_positions(expected, tables)
    verdicts = [Verdict(NAME, "bundle", one.name, Outcome.FAIL if one.wrong else Outcome.PASS, one.reason, "mismatches",
                        float(one.wrong), 0.0,
                        figures={"stored": one.stored, "rows": list(one.rows)} | price.get(one.name, {}))
                for one in findings]
    known = _tables(subject)
    strange = [table for table in extra if not any(_same(table.rows(), array) for array in known)]
    if not strange:
        return [*verdicts, extra_verdict("bundle", [])]
    shapes = ", ".join(f"{table.stored}{list(table.shape)}" for table in strange[:4])
    return [*verdicts, Verdict(NAME, "bundle", EXTRA, Outcome.SKIP,
                               f"{len(strange)} tables are neither tensors of the checkpoint nor ours: {shapes}")]


def _lost(value: np.ndarray, weight: np.ndarray) -> float:
    """Relative L2 of what quantization takes from a tensor; by rows, so that a head of 152 k rows needs no copy."""
    lost = kept = 0.0
    for start in range(0, len(weight), 4096):
        rows = weight[start:start + 4096].astype(np.float64)
        lost += float(np.square(value[start:start + 4096].astype(np.float64) - rows).sum())
        kept += float(np.square(rows).sum())
    return math.sqrt(lost / kept) if kept else 0.0


def _fold_positions(expected: list[Expected], tables: list) -> tuple[list[Finding], list]:
    """The audit, with the patch bias folded into the baked positions where the converter has done that.

    Both are constants added to every patch, so one table can hold their sum, within the rounding of fp16.
    The converter's addition takes subnormal terms for zero (seen in 7 of the tiny model's 37632 sums).
    """
    findings, extra = audit(expected, tables)
    if all(one.at is not None for one in findings if one.name == PATCH_BIAS):
        return findings, extra
    parts = {one.name: one.value.astype(np.float64) for one in expected if one.name in (POSITIONS, PATCH_BIAS)}
    total = parts[POSITIONS] + parts[PATCH_BIAS]
    # Each term may have been rounded before the sum was: half a unit in the last place of either, not of their sum.
    room = 2.0**-10 * (np.abs(parts[POSITIONS]) + np.abs(parts[PATCH_BIAS])) + SUBNORMAL
    for table in tables:
        if table.shape == total.shape and (np.abs(table.rows().astype(np.float64) - total) <= room).all():
            reason, at = "positions and patch bias are one table, equal to their rounded sum", table.uses[0].at
            folded = {name: Finding(name, table.stored, 0, (), reason, at) for name in parts}
            return [folded.get(one.name, one) for one in findings], [one for one in extra if one is not table]
    return findings, extra


def _expected(subject: Subject) -> list[Expected]:
    """What the bundle must hold, by the recipe of its mode: fp16, or codes and scales by the quantizer's formula."""
    import torch

    from harness.graph.quantize import RECIPES, dequantize, expected_codes, planned_weights
    from harness.graph.vision import interpolate_positions

    if subject.mode not in RECIPES:
        raise Undecided(f"quantization mode {subject.mode!r} is not known", fix=f"known are {', '.join(RECIPES)}")
    made = []
    for name, weight, scheme in planned_weights(subject.checkpoint, RECIPES[subject.mode]):
        if name == POSITIONS:
            weight = interpolate_positions(weight, *subject.options.grid, subject.geometry.merge).to(torch.float16)
        flat = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight
        if scheme is None:
            made.append(Expected(name, flat.numpy(), flat.numpy()))
            continue
        codes, scale = expected_codes(flat, scheme)
        step = scale.float().repeat_interleave(scheme.block, dim=1)
        made.append(Expected(name, dequantize(codes, scale).numpy(), flat.numpy(), step.numpy()))
    return made


def _tables(subject: Subject) -> list[np.ndarray]:
    """Constants of our own graph that no checkpoint holds: rotary frequencies and the vision tower's rotary tables."""
    from harness.graph.norms import inverse_frequencies
    from harness.graph.vision import rotary_tables

    geometry = subject.geometry
    cos, sin = rotary_tables(*subject.options.grid, geometry.merge, geometry.vision_hidden // geometry.vision_heads)
    return [inverse_frequencies(geometry.rope_theta, geometry.head_dim // 2).numpy(), cos.numpy(), sin.numpy()]


def _same(table: np.ndarray, known: np.ndarray) -> bool:
    """Equal values, or half of the known table's columns (a converter folds the chunk of a constant)."""
    if table.size not in (known.size, known.size // 2):
        return False
    parts = [known, *(np.split(known, 2, axis=-1) if known.ndim > 1 else ())]
    return any(part.size == table.size and np.array_equal(part.reshape(-1), table.astype(known.dtype).reshape(-1))
               for part in parts)


def _verdict(part: str, name: str, wrong: Sequence, count: int, stored: str) -> Verdict:
    good = len(wrong) == 0
    reason = f"{count} values equal" if good else (
        f"{len(wrong)} of {count} values differ, the first at {wrong[0].tolist()}; rows "
        f"{sorted({int(place[0]) for place in wrong[:1000]})[:5]}")
    return Verdict(NAME, part, name, Outcome.PASS if good else Outcome.FAIL, reason, "mismatches", float(len(wrong)), 0.0,
                   figures={"stored": stored})


def extra_verdict(part: str, names: Sequence[str]) -> Verdict:
    """What the part holds beyond the checkpoint's tensors."""
    reason = f"{len(names)} without a source in the checkpoint, the first {names[0]}" if names else "none"
    return Verdict(NAME, part, EXTRA, Outcome.FAIL if names else Outcome.PASS, reason, "tensors", float(len(names)), 0.0)
