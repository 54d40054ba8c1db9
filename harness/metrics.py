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

LOW_NORM = 0.01
"""A row or channel whose norm lies below this fraction of the root-mean-square one is measured against that fraction:
relative error of an almost empty row is noise, not evidence."""
_BLOCK = 1 << 20


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
    if reference.shape != candidate.shape:
        raise HarnessError(f"shape {candidate.shape} where the reference has {reference.shape}")
    if reference.ndim == 0 or reference.size == 0:
        raise HarnessError(f"nothing to compare: shape {reference.shape}")
    rows = reference.shape[0]
    ref, cand = reference.reshape(rows, -1), candidate.reshape(rows, -1)
    bad_ref, bad_cand = _nonfinite(ref), _nonfinite(cand)
    if bad_ref or bad_cand:
        return _not_finite(ref, cand, reference.shape, bad_ref, bad_cand)
    sums = _sums(ref, cand)
    return _figures(sums, reference.shape)


def by_region(reference: np.ndarray, candidate: np.ndarray, regions: Mapping[str, np.ndarray]) -> dict[str, Distance]:
    """`distance` over all tokens (key "all") and over each region: index arrays of tokens, empty ones left out.

    Tokens are numbered within the whole, in the regions as well.
    """
    out = {"all": distance(reference, candidate)}
    for name, index in regions.items():
        if 0 < len(index) < reference.shape[0]:
            part = distance(reference[index], candidate[index])
            out[name] = replace(part, worst_token_at=int(index[part.worst_token_at]),
                                max_abs_at=(int(index[part.max_abs_at[0]]), *part.max_abs_at[1:]))
    return out


@dataclass
class _Sums:
    row_rr: np.ndarray
    row_cc: np.ndarray
    row_rc: np.ndarray
    row_dd: np.ndarray
    col_rr: np.ndarray
    col_dd: np.ndarray
    max_abs: float
    max_abs_at: int
    reference_max: float


def _sums(ref: np.ndarray, cand: np.ndarray) -> _Sums:
    """One pass in blocks of rows: no float64 copy of the whole is ever held."""
    rows, columns = ref.shape
    sums = _Sums(*(np.empty(rows) for _ in range(4)), np.zeros(columns), np.zeros(columns), -1.0, 0, 0.0)
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        r, c = ref[part].astype(np.float64), cand[part].astype(np.float64)
        d = c - r
        sums.row_rr[part] = np.einsum("ij,ij->i", r, r)
        sums.row_cc[part] = np.einsum("ij,ij->i", c, c)
        sums.row_rc[part] = np.einsum("ij,ij->i", r, c)
        sums.row_dd[part] = np.einsum("ij,ij->i", d, d)
        sums.col_rr += np.einsum("ij,ij->j", r, r)
        sums.col_dd += np.einsum("ij,ij->j", d, d)
        at = int(np.abs(d).argmax())
        if abs(d.flat[at]) > sums.max_abs:
            sums.max_abs, sums.max_abs_at = float(abs(d.flat[at])), start * columns + at
        sums.reference_max = max(sums.reference_max, float(np.abs(r).max()))
    return sums


def _figures(sums: _Sums, shape: tuple[int, ...]) -> Distance:
    rr, cc, dd = (float(part.sum()) for part in (sums.row_rr, sums.row_cc, sums.row_dd))
    token, token_at = _worst(sums.row_dd, sums.row_rr)
    channel, channel_at = _worst(sums.col_dd, sums.col_rr)
    cosine = _cosine(float(sums.row_rc.sum()), rr, cc)
    low = sums.row_rr < LOW_NORM**2 * sums.row_rr.mean()
    row_cosines = np.array([_cosine(*row) for row in zip(sums.row_rc, sums.row_rr, sums.row_cc)])
    row_cosines[low & (sums.row_dd <= sums.row_rr.mean() * LOW_NORM**2)] = 1.0
    mse = dd / math.prod(shape)
    return Distance(
        cosine=cosine, worst_token_cosine=float(row_cosines.min()), cosine_gap=_gap(rr, cc, dd), rel_l2=_ratio(dd, rr),
        worst_token=token, worst_token_at=token_at, worst_channel=channel,
        worst_channel_at=_unravel(channel_at, shape[1:]),
        norm_drift=abs(math.sqrt(cc / rr) - 1.0) if rr else (math.inf if cc else 0.0), max_abs=sums.max_abs,
        max_abs_at=_unravel(sums.max_abs_at, shape),
        psnr=math.inf if mse == 0 else 20 * math.log10(max(sums.reference_max, 1e-300)) - 10 * math.log10(mse),
        reference_max=sums.reference_max, reference_nonfinite=0, candidate_nonfinite=0, tokens=shape[0])


def _worst(dd: np.ndarray, rr: np.ndarray) -> tuple[float, int]:
    floor = LOW_NORM**2 * rr.mean()
    scale = np.maximum(rr, floor)
    ratio = np.sqrt(np.divide(dd, scale, out=np.where(dd > 0, np.inf, 0.0), where=scale > 0))
    at = int(ratio.argmax())
    return float(ratio[at]), at


def _cosine(rc: float, rr: float, cc: float) -> float:
    if rr == 0.0 or cc == 0.0:
        return 1.0 if rr == cc else 0.0
    # Rounding may carry the quotient past 1 by an ulp; a cosine of 1.0001 is what float32 accumulation prints.
    return float(min(1.0, max(-1.0, rc / (math.sqrt(rr) * math.sqrt(cc)))))


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


def _not_finite(ref: np.ndarray, cand: np.ndarray, shape: tuple[int, ...], bad_ref: int, bad_cand: int) -> Distance:
    largest = float(np.abs(ref[np.isfinite(ref)]).max(initial=0.0))
    first = int((~np.isfinite(cand)).argmax()) if bad_cand else 0
    at = _unravel(first, shape)
    return Distance(cosine=-1.0, worst_token_cosine=-1.0, cosine_gap=2.0, rel_l2=math.inf, worst_token=math.inf,
                    worst_token_at=at[0], worst_channel=math.inf, worst_channel_at=at[1:], norm_drift=math.inf,
                    max_abs=math.inf, max_abs_at=at, psnr=-math.inf, reference_max=largest, reference_nonfinite=bad_ref,
                    candidate_nonfinite=bad_cand, tokens=shape[0])


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
