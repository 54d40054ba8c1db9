"""A small stand-in for a big activation, and distances to it with a stated error: seeded random projections and norms.

Of a reference r [T, C] (tokens, channels) three things are kept. A candidate c is projected with the same seed, and
because projections are linear, R c - R r = R d of the difference d = c - r: nothing is said of ||c|| and ||r|| apart.

1. `squares` [T] float64: ||r_t||^2. With the candidate's own they give the change of norm exactly.
2. `tokens` [T, k] float32: k sums of each row with signs +-1 (Achlioptas 2003), divided by sqrt(k), the same signs for
   every row. For any row difference d_t, ||R d_t||^2 has mean ||d_t||^2 and variance at most 2/k ||d_t||^4, and its tails
   are no heavier than those of ||d_t||^2 chi^2_k / k. So the largest error of a token is known within the chi^2 quantiles
   at a confidence shared among the T tokens (union bound; rows may depend on each other).
   Sums over a region of tokens have relative variance at most 2/k as well: rows that err alike (rank one) average nothing.
3. `whole` [K] float32: a sparse projection of all T C values at once (Kane and Nelson 2014: SPARSE tables of K / SPARSE
   sums; each value goes with a random sign into one sum of each table). ||S d||^2 has mean ||d||^2 and variance at most
   2/K ||d||^4 whatever d looks like, one token or one channel included.
   Relative L2 within 10 % means ||S d||^2 / ||d||^2 within 0.81 .. 1.21. At K = 8192 Chebyshev's inequality alone gives
   (2 / 8192) / 0.19^2 = 0.7 % outside, for every d; at the least K = 1024 it is 4.3 standard deviations of a sum of many
   independent terms (property tests: tests/test_sketch.py).

Projections are computed in float64 and kept in float32, because what is measured may be 1e-6 of the reference: rounding
them adds noise of at most 2^-24 ||r||, the floor; float16 would put it at 5e-4. The floor is part of every interval, and
a distance below it is given as "at most".

Sizes: K = T C / 128 to a power of two within 1024 .. 8192; k is what a 1/52 of the reference then has room for, within
12 .. 64, and 64 where T C < 2^17. At the prompt of the port, 211 tokens and 24 more, k is 59 at 8B's width, 13 for keys.
A worst token is known within a factor that k alone decides: at 235 tokens 1/1.7 .. 1.8 at k = 59, 1/2.1 .. 5.2 at 13.
What no sketch of this kind holds: single values, hence the largest difference and the worst channel; and the values to
feed a layer with, hence local error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from harness.errors import HarnessError
from harness.fused import scatterer
from harness.metrics import LOW_NORM

SPARSE = 8
"""Tables of the whole-tensor projection: two values that fall together in one do not in the others, so that a difference
of two values is off by 1/16, not by 1/8 as with 4 tables (found by the property tests)."""
FLOOR = 2.0**-24
"""Relative rounding of float32 projections."""
DOUBT = 1e-4
"""Probability that a figure lies outside its interval: a gate judges hundreds of figures at once."""
SHARE = 128
"""One value in so many is kept of the whole."""
SMALL = 1 << 17
"""Values below which a sketch need not be small."""
SMALLER = 52
"""Times that a sketch is smaller than a reference of SMALL values or more; 50 with the headers of files and all else."""
BESIDE = 256
"""Bytes that a seam's name, shape and place in the file take, and then some."""
LEAST, MOST = 12, 64
"""Of k."""
_SLAB = 1 << 22


@dataclass(frozen=True)
class Sketch:
    """Of one activation; shape as it was recorded. largest: max |r|. See the module."""

    shape: tuple[int, ...]
    seed: int
    squares: np.ndarray
    tokens: np.ndarray
    whole: np.ndarray
    largest: float


@dataclass(frozen=True)
class Estimate:
    """Distances to a Sketch, named as in `metrics.Distance`; `low` and `high`: where each truly lies, at DOUBT.

    Larger is worse, cosine apart. What a sketch cannot say (max_abs, worst_channel, psnr) is not there.
    """

    rel_l2: float
    worst_token: float
    worst_token_at: int
    norm_drift: float
    cosine_gap: float
    low: Mapping[str, float]
    high: Mapping[str, float]
    candidate_nonfinite: int
    tokens: int
    degenerate: bool

    def figures(self) -> dict[str, Any]:
        """Plain values by name, `by` among them."""
        return {"by": "sketch", "rel_l2": self.rel_l2, "worst_token": self.worst_token,
                "worst_token_at": self.worst_token_at, "norm_drift": self.norm_drift, "cosine_gap": self.cosine_gap,
                "low": dict(self.low), "high": dict(self.high), "candidate_nonfinite": self.candidate_nonfinite,
                "tokens": self.tokens}


def seed_of(*names: str) -> int:
    """A seed of 64 bits from what the sketch belongs to, so that no two seams share their signs."""
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:8], "little")


def fingerprint() -> str:
    """sha256 of the projections of fixed whole numbers: a sketch is judged only by the arithmetic that it was made by,
    whatever version of numpy or of this file that was."""
    ramp = (np.arange(3 * 640) % 251 - 125.0).reshape(3, 640)
    _, tokens, whole = _project(ramp, 1, 16, 1024)
    return hashlib.sha256(np.concatenate([tokens.ravel(), whole]).astype("<f4").tobytes()).hexdigest()


def sizes(tokens: int, channels: int) -> tuple[int, int]:
    """k and K for an activation of this size: K for the error of the whole, k as large as the rest of the room allows."""
    values = tokens * channels
    total = min(max(1 << max(values // SHARE, 1).bit_length() - 1, 1024), 8192)
    if values < SMALL:
        return MOST, total
    room = (4 * values / SMALLER - 4 * total - BESIDE) / tokens
    return min(max(int(room - 8) // 4, LEAST), MOST), total


def make(reference: np.ndarray, seed: int, sharp: bool = False) -> Sketch:
    """Sketch an activation [T, ...]; sharp: with the largest k, whatever its size.

    Raises HarnessError where it is empty or not finite: there is nothing to stand for.
    """
    if reference.ndim == 0 or reference.size == 0:
        raise HarnessError(f"nothing to sketch: shape {reference.shape}")
    if not np.isfinite(reference).all():
        raise HarnessError("holds values that are not finite, so no sketch can stand for it")
    rows = reference.reshape(len(reference), -1)
    k, total = sizes(*rows.shape)
    squares, tokens, whole = _project(rows, seed, MOST if sharp else k, total)
    return Sketch(reference.shape, seed, squares, tokens.astype(np.float32), whole.astype(np.float32),
                  float(np.abs(rows).max()))


def _project(rows: np.ndarray, seed: int, k: int, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """||row||^2 [T], R row [T, k], S rows [K], all float64, in slabs of rows."""
    count, columns = rows.shape
    signs = _signs(seed, columns, k)
    stream = np.random.Philox(key=[seed, 1])
    squares, tokens = np.empty(count), np.empty((count, k))
    tables = np.zeros((SPARSE, total // SPARSE))
    step = max(1, _SLAB // columns)
    for start in range(0, count, step):
        part = slice(start, start + step)
        wide = rows[part].astype(np.float64)
        squares[part] = np.einsum("ij,ij->i", wide, wide)
        tokens[part] = wide @ signs
        for first in range(0, SPARSE, 4):
            bits = stream.random_raw(wide.size).astype("<u8").view("<u2").reshape(-1, 4)
            scatterer()(wide.ravel(), bits, tables[first:first + 4])
    return squares, tokens / math.sqrt(k), tables.ravel() / math.sqrt(SPARSE)


def _signs(seed: int, columns: int, k: int) -> np.ndarray:
    """+-1 float64 [columns, k]: raw bits of a counter-based generator, so the same on every machine and version."""
    words = np.random.Philox(key=[seed, 0]).random_raw(-(-columns * k // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[:columns * k]
    return 1.0 - 2.0 * bits.reshape(columns, k)


def by_region(sketch: Sketch, candidate: np.ndarray, regions: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """`metrics.by_region` against a sketch: "all", and each region (index arrays of tokens), empty ones left out.

    Raises HarnessError where the candidate has another shape.
    """
    if candidate.shape != tuple(sketch.shape):
        raise HarnessError(f"shape {candidate.shape} where the reference has {tuple(sketch.shape)}")
    rows = candidate.reshape(len(candidate), -1)
    bad = int(rows.size - np.isfinite(rows).sum())
    regions = {name: index for name, index in regions.items() if 0 < len(index) < len(rows)}
    if bad:
        return {name: _not_finite(len(index), bad) for name, index in {"all": np.arange(len(rows)), **regions}.items()}
    squares, tokens, whole = _project(rows, sketch.seed, sketch.tokens.shape[1], len(sketch.whole))
    apart = np.square(tokens - sketch.tokens).sum(axis=1)
    out = {"all": _estimate(sketch, squares, apart, np.arange(len(rows)), float(np.square(whole - sketch.whole).sum()))}
    return out | {name: _estimate(sketch, squares, apart, index, None) for name, index in regions.items()}


def _not_finite(tokens: int, bad: int) -> Estimate:
    worst = dict.fromkeys(("rel_l2", "worst_token", "norm_drift", "cosine_gap"), math.inf)
    return Estimate(**worst, worst_token_at=0, low=worst, high=worst, candidate_nonfinite=bad, tokens=tokens,
                    degenerate=False)


def _estimate(sketch: Sketch, squares: np.ndarray, apart: np.ndarray, index: np.ndarray, whole: float | None) -> Estimate:
    """One region; `whole` is ||S d||^2 where the region is all."""
    rr, cc = float(sketch.squares[index].sum()), float(squares[index].sum())
    if rr == 0.0:
        return Estimate(0.0, 0.0, 0, 0.0, 0.0, {}, {}, 0, len(index), degenerate=True)
    freedom = sketch.tokens.shape[1]
    # The whole projection is a sum of many terms, hence normal; a region's is at worst as wide as one token's.
    width = -NormalDist().inv_cdf(DOUBT / 2) * math.sqrt(2 / len(sketch.whole))
    spread = (1 - width, 1 + width) if whole is not None else _chi(freedom, DOUBT)
    dd = whole if whole is not None else float(apart[index].sum())
    error, low, high = _interval(dd, rr, spread)
    token, token_low, token_high, at = _worst_token(sketch.squares[index], apart[index], _chi(freedom, DOUBT / len(index)))
    drift = abs(math.sqrt(cc / rr) - 1.0)
    gaps = [_gap(value**2 * rr, rr, cc) for value in (low, error, high)]
    return Estimate(error, token, int(index[at]), drift, gaps[1],
                    {"rel_l2": low, "worst_token": token_low, "norm_drift": drift, "cosine_gap": gaps[0]},
                    {"rel_l2": high, "worst_token": token_high, "norm_drift": drift, "cosine_gap": gaps[2]},
                    0, len(index), degenerate=False)


def _interval(dd: float, rr: float, spread: tuple[float, float]) -> tuple[float, float, float]:
    """sqrt(dd / rr), and where it truly lies given the spread of the projection and the rounding of what was kept."""
    error = math.sqrt(dd / rr)
    return error, max(0.0, error - FLOOR) / math.sqrt(spread[1]), (error + FLOOR) / math.sqrt(spread[0])


def _worst_token(rr: np.ndarray, dd: np.ndarray, spread: tuple[float, float]) -> tuple[float, float, float, int]:
    """The largest error of a row, against at least LOW_NORM of the usual norm, as `metrics` has it."""
    scale = np.maximum(rr, LOW_NORM**2 * rr.mean())
    error, floor = np.sqrt(dd / scale), FLOOR * np.sqrt(rr / scale)
    at = int(error.argmax())
    low = float(np.maximum(error - floor, 0.0).max()) / math.sqrt(spread[1])
    return float(error[at]), low, float((error + floor).max()) / math.sqrt(spread[0]), at


def _gap(dd: float, rr: float, cc: float) -> float:
    """1 - cosine, from the sides of the triangle: `metrics` has the formula."""
    r, c = math.sqrt(rr), math.sqrt(cc)
    return max(0.0, (dd - (c - r) ** 2) / (2 * r * c)) if c else 1.0


def _chi(freedom: int, doubt: float) -> tuple[float, float]:
    """Quantiles of chi^2 / freedom that leave `doubt` outside, half on each side (Wilson and Hilferty 1931)."""
    normal, ninth = -NormalDist().inv_cdf(doubt / 2), 2 / (9 * freedom)
    low, high = (max(1 - ninth + sign * normal * math.sqrt(ninth), 0.05)**3 for sign in (-1, 1))
    return low, high
