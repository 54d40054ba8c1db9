"""All distances of one seam, beside one read of both tensors and beside the same by straightforward numpy float64.

    pytest tests/bench_metrics.py --benchmark-columns=min,median --benchmark-json=reports/bench/metrics.json

Not collected by default. `test_ratios` alternates the ways, so that a busy machine slows all of them, and prints their
ratios; the bars are 3 x the read and 1/5 of numpy. "From cache" one pair is measured again and again (a seam of one layer
fits a server's last cache, and is read there several times as fast as memory), "from memory" it goes round in FAR bytes
and the median stands. The read is one core's; ours takes all cores.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from harness.metrics import by_region, distance

SHAPES = {"8B layer": (235, 4096), "8B vision": (784, 1152), "8B logits": (235, 151936)}
ROUNDS = {"8B layer": 60, "8B vision": 60, "8B logits": 5}
FAR = 512 << 20
"""Bytes to go round in, so that no cache holds what is read."""


def tensors(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    r = rng.standard_normal(SHAPES[name], dtype=np.float32)
    return r, r + 1e-4 * rng.standard_normal(SHAPES[name], dtype=np.float32)


def read(r: np.ndarray, c: np.ndarray) -> int:
    """Every byte of both once, as fast as one core reads memory."""
    return int(r.view(np.uint64).max()) ^ int(c.view(np.uint64).max())


def straightforward(r: np.ndarray, c: np.ndarray) -> tuple[float, ...]:
    """What one would write: the same figures from whole float64 copies."""
    bad = (~np.isfinite(r)).sum() + (~np.isfinite(c)).sum()
    r, c = r.astype(np.float64), c.astype(np.float64)
    d = c - r
    rr, cc, dd, rc = (r * r).sum(1), (c * c).sum(1), (d * d).sum(1), (r * c).sum(1)
    tokens, channels = np.sqrt(dd / rr), np.sqrt((d * d).sum(0) / (r * r).sum(0))
    return (float(rc.sum() / np.sqrt(rr.sum() * cc.sum())), float((rc / np.sqrt(rr * cc)).min()),
            float(np.linalg.norm(d) / np.linalg.norm(r)), float(tokens.max()), float(channels.max()),
            float(np.abs(d).max()), float(np.abs(d).argmax()), float(np.abs(r).max()), float(bad))


@pytest.fixture(params=SHAPES)
def pair(request):
    return tensors(request.param)


def test_distance(benchmark, pair) -> None:
    benchmark(distance, *pair)


def test_read(benchmark, pair) -> None:
    benchmark(read, *pair)


def test_straightforward(benchmark, pair) -> None:
    benchmark(straightforward, *pair)


def test_image_and_text_apart(benchmark, pair) -> None:
    benchmark(regions, *pair)


def regions(r: np.ndarray, c: np.ndarray) -> None:
    """As the ladder asks: over all tokens, and over image and text tokens apart."""
    rows = np.arange(len(r))
    by_region(r, c, {"image": rows[5:201], "text": np.r_[rows[:5], rows[201:]]})


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("where", ["cache", "memory"])
def test_ratios(name: str, where: str, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # tests run on one core
    pairs = [tensors(name)]
    if where == "memory":
        pairs *= -(-FAR // (2 * pairs[0][0].nbytes))
        pairs = [(r.copy(), c.copy()) for r, c in pairs]
    ways = (distance, regions, read, straightforward)
    spent: dict[str, list[float]] = {way.__name__: [] for way in ways}
    distance(*(part[:2] for part in pairs[0]))  # compiles
    for number in range(max(ROUNDS[name], len(pairs))):
        for at, way in enumerate(ways):
            # Each way takes another pair, so that none finds in a cache what the one before it has read; or where a
            # cache is meant, the pair is read before each, because numpy's temporaries have driven it out.
            pair = pairs[(number + at * len(pairs) // len(ways)) % len(pairs)]
            if where == "cache":
                read(*pair)
            started = time.perf_counter()
            way(*pair)
            spent[way.__name__].append(time.perf_counter() - started)
    ours, apart, once, plain = (float(np.median(times) if where == "memory" else min(times)) for times in spent.values())
    speed = 2 * pairs[0][0].nbytes / once / 1e9
    print(f"\n{name} {SHAPES[name]} from {where}: {ours * 1e3:.2f} ms; {ours / once:.1f} x one read ({speed:.0f} GB/s); "
          f"{plain / ours:.1f} x faster than numpy; image and text apart as well {apart * 1e3:.2f} ms, {apart / once:.1f} x")
