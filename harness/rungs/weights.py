"""Weights: every tensor of graph and bundle is the checkpoint's after the documented remap; none missing, none invented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.subject import Subject
from harness.verdict import Outcome, Verdict

NAME = "weights"
EXTRA = "tensors nobody accounts for"


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Every tensor of the checkpoint, in the graph and in the bundle, and one row each for what has no source."""
    return {part: (*subject.checkpoint.names(), EXTRA) for part in ("graph", "bundle")}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """Exact for the float32 graph; for the bundle exact as well, codes and scales against the quantizer's formula."""
    if case == "graph":
        return _graph(subject)
    return bundle_verdicts(subject)


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


EMBEDDING = "model.language_model.embed_tokens.weight"


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
