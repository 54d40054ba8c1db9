"""The size of each token's error at a seam, as the report's maps show it."""

from __future__ import annotations

import numpy as np

FLOOR = 1e-12


def token_errors(reference: np.ndarray, got: np.ndarray) -> list[float | None]:
    """log10 of ||got - reference|| / ||reference|| of every token, to two decimals; None where that is no number."""
    rows, other = (array.astype(np.float64).reshape(len(array), -1) for array in (reference, got))
    with np.errstate(all="ignore"):
        error = np.linalg.norm(other - rows, axis=1) / np.maximum(np.linalg.norm(rows, axis=1), 1e-30)
        return [round(float(value), 2) if np.isfinite(value) else None for value in np.log10(np.maximum(error, FLOOR))]
