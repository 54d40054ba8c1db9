"""Weights: every tensor of graph and bundle is the checkpoint's after the documented remap; none missing, none invented."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.audit import Each, Finding, audit
from harness.plan import EXTRA
from harness.rungs import constants
from harness.rungs.planned import expected
from harness.subject import Subject
from harness.tables import Expected
from harness.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from torch import Tensor

NAME = "weights"
POSITIONS, PATCH_BIAS = "model.visual.pos_embed.weight", "model.visual.patch_embed.proj.bias"
SUBNORMAL = 2.0**-14
"""Least normal fp16."""
EMBEDDING = "model.language_model.embed_tokens.weight"
BLOCK = 1 << 22
"""Values of the graph compared at a time."""
SAMPLE = 1 << 17
"""Values of a tensor that its quantization error is taken over."""


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
        tensor = held.pop(name)
        if tensor.shape != stored.shape:
            verdicts.append(Verdict(NAME, "graph", name, Outcome.FAIL,
                                    f"shape {tuple(tensor.shape)} where {tuple(stored.shape)} is right"))
            continue
        verdicts.append(_verdict(name, tensor, stored))
    geometry = subject.geometry
    if geometry.tied and torch.equal(held.get("lm_head.weight", torch.empty(0)),
                                     subject.checkpoint.tensor(EMBEDDING).to(torch.float32)):
        held.pop("lm_head.weight")  # a tied head held twice is the same head
    return [*verdicts, extra_verdict("graph", sorted(held))]


def _verdict(name: str, tensor: Tensor, stored: Tensor) -> Verdict:
    """Two tensors of one shape, compared in blocks of rows."""
    import torch

    count, first, rows = 0, None, []
    step = max(1, BLOCK * len(stored) // max(stored.numel(), 1)) if stored.ndim else 1
    for start in range(0, len(stored) if stored.ndim else 1, step):
        part = slice(start, start + step) if stored.ndim else ()
        unlike = tensor[part].to("cpu").float() != stored[part].float()
        if not unlike.any():
            continue
        wrong = torch.nonzero(unlike)
        first = first or [start + int(wrong[0][0]), *wrong[0][1:].tolist()]
        rows += sorted({start + int(place[0]) for place in wrong[:1000]})[:5 - len(rows)]
        count += len(wrong)
    reason = f"{stored.numel()} values equal" if not count else \
        f"{count} of {stored.numel()} values differ, the first at {first}; rows {rows}"
    return Verdict(NAME, "graph", name, Outcome.FAIL if count else Outcome.PASS, reason, "mismatches", float(count), 0.0,
                   figures={"stored": str(tensor.dtype).removeprefix("torch.")})


def _bundle(subject: Subject) -> list[Verdict]:
    tables = [table for program in subject.programs() for table in program.weights]
    wanted = expected(subject)
    with one_thread_each() as each:
        coded = [one for one in wanted if one.quantized]
        price = {one.name: {"quantization": lost} for one, lost in zip(coded, each(_lost, coded))}
        findings, extra = _fold_positions(wanted, tables, each)
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


def _lost(item: Expected) -> float:
    """Relative L2 of what quantization takes from a tensor; of a big one, over rows spread evenly through it."""
    rows, columns = item.shape
    lost = kept = 0.0
    for row in np.unique(np.linspace(0, rows - 1, min(rows, max(1, SAMPLE // columns))).astype(int)):
        right = item.weight(row, row + 1).astype(np.float64)
        lost += float(np.square(item.value(row, row + 1).astype(np.float64) - right).sum())
        kept += float(np.square(right).sum())
    return math.sqrt(lost / kept) if kept else 0.0


def _fold_positions(wanted: list[Expected], tables: list, each: Each) -> tuple[list[Finding], list]:
    """The audit, with the patch bias folded into the baked positions where the converter has done that.

    Both are constants added to every patch, so one table can hold their sum, within the rounding of fp16.
    The converter's addition takes subnormal terms for zero: one in 7 of the tiny model's 37632 sums, both in 2 of the
    903168 of a tower of the 8B's width.
    """
    findings, extra = audit(wanted, tables, each)
    if all(one.at is not None for one in findings if one.name == PATCH_BIAS):
        return findings, extra
    parts = {one.name: one.value(0, one.shape[0]).astype(np.float64) for one in wanted
             if one.name in (POSITIONS, PATCH_BIAS)}
    total = parts[POSITIONS] + parts[PATCH_BIAS]
    # Each term may have been rounded before the sum was: half a unit in the last place of either, not of their sum.
    room = 2.0**-10 * (np.abs(parts[POSITIONS]) + np.abs(parts[PATCH_BIAS])) + 2 * SUBNORMAL
    for table in tables:
        if table.shape == total.shape and (np.abs(table.rows().astype(np.float64) - total) <= room).all():
            reason, at = "positions and patch bias are one table, equal to their rounded sum", table.uses[0].at
            folded = {name: Finding(name, table.stored, 0, (), reason, at) for name in parts}
            return [folded.get(one.name, one) for one in findings], [one for one in extra if one is not table]
    return findings, extra


@contextmanager
def one_thread_each() -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` with as many threads as torch has, each of which computes in one: a block then stays in its cache."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


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


def extra_verdict(part: str, names: Sequence[str]) -> Verdict:
    """What the part holds beyond the checkpoint's tensors."""
    reason = f"{len(names)} without a source in the checkpoint, the first {names[0]}" if names else "none"
    return Verdict(NAME, part, EXTRA, Outcome.FAIL if names else Outcome.PASS, reason, "tensors", float(len(names)), 0.0)
