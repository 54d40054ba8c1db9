"""Inputs: what the host makes of text and image, from the bundle's own tokenizer, is what the HF processor makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.checkpoint import read_json
from harness.host import load_tokenizer
from harness.ladder import exact
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

NAME, TOKENIZER = "inputs", "tokenizer"
LEVEL = 2 / 255 * (1 + 1e-4)
"""One of 256 pixel levels after normalisation with mean and std 0.5: what another resize or rounding may cost."""


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Ids always; grid and patches where there is an image; once, the whole vocabulary."""
    cases = {name: ("ids", *(("grid", "patches") if case.images else ())) for name, case in subject.cases.items()}
    return {**cases, TOKENIZER: ("vocabulary", "merges")}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """The reference host against the frozen inputs."""
    if case == TOKENIZER:
        return _tokenizer(subject)
    frozen = subject.recorded(case).inputs
    made = subject.made_inputs(case)
    verdicts = [exact(NAME, case, "ids", frozen.ids, made.ids, "token ids")]
    if frozen.patches is None:
        return verdicts
    if made.patches is None:
        return [*verdicts, *(Verdict(NAME, case, seam, Outcome.FAIL, "the host made no patches")
                             for seam in ("grid", "patches"))]
    return [*verdicts, exact(NAME, case, "grid", np.array(frozen.grid), np.array(made.grid), "patch grid (t, h, w)"),
            _patches(case, frozen.patches, made.patches)]


def _tokenizer(subject: Subject) -> list[Verdict]:
    """Entries that no prompt holds: the host's tokenizer against the checkpoint's, id by id and merge by merge."""
    def parts(folder: Path) -> tuple[dict[str, int], list[str]]:
        tokenizer = load_tokenizer(folder)
        merges = read_json(folder / "tokenizer.json").get("model", {}).get("merges", [])
        return tokenizer.get_vocab(with_added_tokens=True), [one if isinstance(one, str) else " ".join(one)
                                                              for one in merges]

    (vocabulary, merges), (ours, our_merges) = parts(subject.checkpoint.root), parts(Path(subject.tokenizer))
    moved = sorted(token for token in {*vocabulary, *ours} if vocabulary.get(token) != ours.get(token))
    first = next((at for at, (one, other) in enumerate(zip(merges, our_merges)) if one != other), None)
    apart = abs(len(merges) - len(our_merges)) + (first is not None)
    where = f"the first {moved[0]!r}" if moved else ""
    return [_count("vocabulary", len(moved), f"{len(vocabulary)} tokens, {len(moved)} with another id {where}".rstrip()),
            _count("merges", apart, f"{len(merges)} merges" + (f", differing from merge {first} on" if apart else ""))]


def _count(seam: str, wrong: int, reason: str) -> Verdict:
    return Verdict(NAME, TOKENIZER, seam, Outcome.FAIL if wrong else Outcome.PASS, reason, "mismatches", float(wrong), 0.0)


def _patches(case: str, frozen: np.ndarray, made: np.ndarray) -> Verdict:
    if frozen.shape != made.shape:
        return Verdict(NAME, case, "patches", Outcome.FAIL, f"shape {made.shape} where {frozen.shape} is right")
    difference = np.abs(frozen.astype(np.float64) - made)
    value = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    at = [int(part) for part in np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), frozen.shape)]
    return Verdict(NAME, case, "patches", Outcome.PASS if value <= LEVEL else Outcome.FAIL,
                   f"largest difference {value:.3g} at {at}; one pixel level is {LEVEL:.3g}", "max_abs", value, LEVEL)
