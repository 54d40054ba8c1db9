"""Inputs: what the host makes of text and image, from the bundle's own tokenizer, is what the HF processor makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.ladder import exact
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

NAME = "inputs"
LEVEL = 2 / 255
"""One of 256 pixel levels after normalisation with mean and std 0.5: what another resize or rounding may cost."""


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Ids always; grid and patches where there is an image."""
    return {name: ("ids", *(("grid", "patches") if case.images else ())) for name, case in subject.cases.items()}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """The reference host against the frozen inputs."""
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


def _patches(case: str, frozen: np.ndarray, made: np.ndarray) -> Verdict:
    if frozen.shape != made.shape:
        return Verdict(NAME, case, "patches", Outcome.FAIL, f"shape {made.shape} where {frozen.shape} is right")
    difference = np.abs(frozen.astype(np.float64) - made)
    value = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    at = [int(part) for part in np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), frozen.shape)]
    return Verdict(NAME, case, "patches", Outcome.PASS if value <= LEVEL else Outcome.FAIL,
                   f"largest difference {value:.3g} at {at}; one pixel level is {LEVEL:.3g}", "max_abs", value, LEVEL)
