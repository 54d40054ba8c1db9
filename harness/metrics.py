"""Distances between two activations, in float64: never NaN, never broadcast, always with the place of the worst.

Tokens stand on axis 0, all other axes are channels. Of a candidate that is not finite every distance is infinite and
every cosine -1: the worst there is, so that no comparison can pass by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.errors import HarnessError
from harness.sums import Sums, sums

LOW_NORM = 0.01
"""A row or channel whose norm lies below this fraction of the root-mean-square one is measured against that fraction:
relative error of an almost empty row is noise, not evidence."""

TINY = 1e-140
"""Below this squares of float64 values vanish; no float32 value lies there."""


@dataclass(frozen=True)
class Distance:
    """All figures of one comparison; larger is worse unless said otherwise. Units are those of the activation.

    cosine, worst_token_cosine: 1 is equal (larger is better). cosine_gap: 1 - cosine, from the angle, so exact near 0.
    rel_l2: ||c - r|| / ||r||. worst_token, worst_channel: the largest such ratio of a row or channel (see LOW_NORM).
    norm_drift: | ||c|| / ||r|| - 1 |. max_abs: largest |c - r|, at `max_abs_at`. psnr: 20 log10(max|r| / RMSE) in dB
    (larger is better, inf when equal).
    """

    cosine: float
    worst_token_cosine: float
    cosine_gap: float
    rel_l2: float
    worst_token: float
    worst_token_at: int
    worst_channel: float
    worst_channel_at: tuple[int, ...]
    norm_drift: float
    max_abs: float
    max_abs_at: tuple[int, ...]
    psnr: float
    reference_max: float
    reference_nonfinite: int
    candidate_nonfinite: int
    tokens: int

    @property
    def degenerate(self) -> bool:
        """True where the reference is all zero or not finite: nothing can be concluded from it."""
        return self.reference_nonfinite > 0 or self.reference_max == 0.0 or self.tokens == 0

    def figures(self) -> dict[str, Any]:
        """Plain values by name."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def distance(reference: np.ndarray, candidate: np.ndarray) -> Distance:
    """Compare two arrays of equal shape [tokens, ...]. Raises HarnessError where shapes differ or there are no tokens."""
    return by_region(reference, candidate, {})["all"]


def by_region(reference: np.ndarray, candidate: np.ndarray, regions: Mapping[str, np.ndarray]) -> dict[str, Distance]:
    """`distance` over all tokens (key "all") and over each region: index arrays of tokens, empty ones left out.

    Tokens are numbered within the whole, in the regions as well. Raises HarnessError as `distance` does.
    """
    if reference.shape != candidate.shape:
        raise HarnessError(f"shape {candidate.shape} where the reference has {reference.shape}")
    if reference.ndim == 0 or reference.size == 0:
        raise HarnessError(f"nothing to compare: shape {reference.shape}")
    rows = reference.shape[0]
    parts = {name: np.asarray(index) for name, index in regions.items() if 0 < len(index) < rows}
    ref, cand = reference.reshape(rows, -1), candidate.reshape(rows, -1)
    found = dict(zip(("all", *parts), sums(ref, cand, list(parts.values()))))
    largest = float(found["all"].by_row[3:].max())
    if 0 < largest < TINY or not found["all"].finite and not _nonfinite(ref) and not _nonfinite(cand):
        return _rescaled(reference, candidate, parts)
    return {name: _distance(part, ref, cand, reference.shape) for name, part in found.items()}


def _rescaled(reference: np.ndarray, candidate: np.ndarray, regions: Mapping[str, np.ndarray]) -> dict[str, Distance]:
    """Of float64 values whose squares float64 does not hold, or not in full."""
    unit = max(float(np.abs(array).max()) for array in (reference, candidate))
    found = by_region(reference / unit, candidate / unit, regions)
    return {name: replace(part, max_abs=part.max_abs * unit, reference_max=part.reference_max * unit)
            for name, part in found.items()}


def _distance(found: Sums, ref: np.ndarray, cand: np.ndarray, shape: tuple[int, ...]) -> Distance:
    """Of some rows of both [rows, columns]; shape: as they were before that."""
    if not found.finite:
        return _not_finite(found.rows, ref[found.rows], cand[found.rows], shape)
    row = int(found.rows[found.by_row[3].argmax()])
    column = int(np.abs(cand[row].astype(np.float64) - ref[row]).argmax())
    return _figures(found, shape, (row, *_unravel(column, shape[1:])))


def _figures(sums: Sums, shape: tuple[int, ...], max_abs_at: tuple[int, ...]) -> Distance:
    whole = sums.by_row[:3].sum(axis=1)
    rr, cc, dd = whole.tolist()
    max_abs, largest = sums.by_row[3:].max(axis=1).tolist()
    row_rr, _, row_dd = sums.by_row[:3]
    token, token_at = _worst(row_dd, row_rr, rr)
    channel, channel_at = _worst(sums.by_column[1], sums.by_column[0], rr)
    tokens, low = len(sums.rows), LOW_NORM**2 * rr / len(sums.rows)
    cosine, cosines = _cosines(np.append(sums.by_row[:3], whole[:, None], axis=1))
    if (row_rr < low).any():
        cosines[(row_rr < low) & (row_dd <= low)] = 1.0
    mse = dd / (tokens * math.prod(shape[1:]))
    return Distance(
        cosine=cosine, worst_token_cosine=float(cosines.min()), cosine_gap=_gap(rr, cc, dd), rel_l2=_ratio(dd, rr),
        worst_token=token, worst_token_at=int(sums.rows[token_at]),
        worst_channel=channel, worst_channel_at=_unravel(channel_at, shape[1:]),
        norm_drift=abs(math.sqrt(cc / rr) - 1.0) if rr else (math.inf if cc else 0.0),
        max_abs=max_abs, max_abs_at=max_abs_at,
        psnr=math.inf if mse == 0 else 20 * math.log10(max(largest, 1e-300)) - 10 * math.log10(mse),
        reference_max=largest, reference_nonfinite=0, candidate_nonfinite=0, tokens=tokens)


def _worst(dd: np.ndarray, rr: np.ndarray, total: float) -> tuple[float, int]:
    """Largest sqrt(dd / rr) and where; total: the sum of rr."""
    floor = LOW_NORM**2 * total / len(rr)
    if not floor:
        return (math.inf, int(dd.argmax())) if dd.any() else (0.0, 0)
    ratio = dd / np.maximum(rr, floor)
    at = int(ratio.argmax())
    return math.sqrt(ratio[at]), at


def _cosines(squares: np.ndarray) -> tuple[float, np.ndarray]:
    """squares [3, rows + 1]: of r, c and c - r, the whole last; cosine of the whole and of the rows: 1 where both are
    zero, 0 where one is."""
    rr, cc, dd = squares
    rc, norms = (rr + cc - dd) / 2, np.sqrt(rr) * np.sqrt(cc)  # ||c - r||^2 = ||c||^2 + ||r||^2 - 2 r.c
    zero = norms == 0
    if zero.any():
        rc, norms = np.where(zero, rr == cc, rc), np.where(zero, 1.0, norms)
    # Rounding may carry the quotient past 1 by an ulp; a cosine of 1.0001 is what float32 accumulation prints.
    found = np.clip(rc / norms, -1.0, 1.0)
    return float(found[-1]), found[:-1]


def _gap(rr: float, cc: float, dd: float) -> float:
    """1 - cos = (||d||^2 - (||c|| - ||r||)^2) / (2 ||r|| ||c||): no cancellation near 1, where 1 - cosine has nothing left."""
    if rr == 0.0 or cc == 0.0:
        return 0.0 if rr == cc else 1.0
    r, c = math.sqrt(rr), math.sqrt(cc)
    return max(0.0, (dd - (c - r) ** 2) / (2 * r * c))


def _ratio(dd: float, rr: float) -> float:
    if rr == 0.0:
        return math.inf if dd else 0.0
    return math.sqrt(dd / rr)


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(part) for part in np.unravel_index(index, shape)) if shape else ()


def _nonfinite(array: np.ndarray) -> int:
    if not np.issubdtype(array.dtype, np.floating):
        return 0
    return int(array.size - np.isfinite(array).sum())


def _not_finite(rows: np.ndarray, ref: np.ndarray, cand: np.ndarray, shape: tuple[int, ...]) -> Distance:
    bad_ref, bad_cand = _nonfinite(ref), _nonfinite(cand)
    largest = float(np.abs(ref[np.isfinite(ref)]).max(initial=0.0))
    row, column = divmod(int((~np.isfinite(cand)).argmax()) if bad_cand else 0, ref.shape[1])
    at = (int(rows[row]), *_unravel(column, shape[1:]))
    return Distance(cosine=-1.0, worst_token_cosine=-1.0, cosine_gap=2.0, rel_l2=math.inf, worst_token=math.inf,
                    worst_token_at=at[0], worst_channel=math.inf, worst_channel_at=at[1:], norm_drift=math.inf,
                    max_abs=math.inf, max_abs_at=at, psnr=-math.inf, reference_max=largest, reference_nonfinite=bad_ref,
                    candidate_nonfinite=bad_cand, tokens=len(rows))


def kl_divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(candidate)) in nats for each row of logits [T, V]; float64 [T], inf if not finite."""
    if reference.shape != candidate.shape:
        raise HarnessError(f"shape {candidate.shape} where the reference has {reference.shape}")
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    with np.errstate(invalid="ignore"):
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return np.where(np.isfinite(kl), np.maximum(kl, 0.0), np.inf)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide = wide - wide.max(-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def top2_margin(logits: np.ndarray) -> np.ndarray:
    """Largest minus second largest logit of each row [T, V] -> float64 [T]."""
    top = np.partition(logits.astype(np.float64), -2, axis=-1)[..., -2:]
    return top[..., 1] - top[..., 0]
