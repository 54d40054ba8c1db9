"""The size of each token's error at a seam, as the report's maps show it."""

from __future__ import annotations

import numpy as np

from harness.sums import sums

FLOOR = 1e-12


def token_errors(reference: np.ndarray, got: np.ndarray) -> list[float | None]:
    """log10 of ||got - reference|| / ||reference|| of every token, to two decimals; None where that is no number."""
    squares = sums(*(array.reshape(len(array), -1) for array in (reference, got)))[0].by_row
    with np.errstate(all="ignore"):
        error = np.sqrt(squares[2]) / np.maximum(np.sqrt(squares[0]), 1e-30)
        return [round(float(value), 2) if np.isfinite(value) else None for value in np.log10(np.maximum(error, FLOOR))]
