"""The compiled loop: what the same lines give uncompiled and what numpy gives, and no cache that could stop it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from harness import fused, sums

ROOT = Path(__file__).resolve().parent.parent
CODE = "import numpy as np\nfrom harness.metrics import distance\n" \
       "print(distance(np.ones((3, 4)), np.full((3, 4), 3.0)).rel_l2)"
KINDS = (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint16, bool)
NAMES = ("row_rr", "row_cc", "row_dd", "row_max_d", "row_max_r", "col_rr", "col_dd")


def straightforward(r: np.ndarray, c: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    r, c = r[rows].astype(np.float64), c[rows].astype(np.float64)
    d = c - r
    return [(r * r).sum(1), (c * c).sum(1), (d * d).sum(1), np.abs(d).max(1), np.abs(r).max(1), (r * r).sum(0),
            (d * d).sum(0)]


def check(r: np.ndarray, c: np.ndarray, regions: list[np.ndarray]) -> None:
    for found, rows in zip(sums.sums(r, c, regions), [np.arange(len(r)), *regions], strict=True):
        assert np.array_equal(found.rows, rows) and found.finite
        for name, one, right in zip(NAMES, [*found.by_row, *found.by_column], straightforward(r, c, rows), strict=True):
            np.testing.assert_allclose(one, right, rtol=1e-12, atol=0, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (40, 700), (3, fused.WIDE + 77)])
def test_every_dtype_and_layout_gives_what_numpy_gives(kind, shape):
    rng = np.random.default_rng(1)
    r, c = (rng.integers(0, 2 if kind is bool else 90, shape).astype(kind) for _ in range(2))
    if np.issubdtype(kind, np.floating):
        r, c = (array + rng.standard_normal(shape).astype(kind) for array in (r, c))
    regions = [np.arange(shape[0] // 2), np.arange(shape[0] // 3, shape[0])]
    check(r, c, regions)
    check(r, c.astype(np.float32), regions)
    check(r.T, c.T, [])
    check(r[::2, ::-1], c[::2, ::-1], [])
    check(r.astype(r.dtype.newbyteorder(">")), c, regions)
    odd = np.zeros(r.nbytes + 1, np.uint8)[1:].view(r.dtype).reshape(shape)
    odd[...] = r
    odd.flags.writeable = False
    check(odd, c, regions)


def test_rows_are_shared_among_cores_and_nothing_is_counted_twice(monkeypatch):
    rng = np.random.default_rng(2)
    r, c = (rng.standard_normal((11, 3000)).astype(np.float32) for _ in range(2))
    monkeypatch.setattr(sums, "MANY", 1)
    for cores in (1, 2, 3, 64):
        monkeypatch.setattr(sums, "_cores", lambda cores=cores: cores)
        check(r, c, [np.arange(4), np.arange(4, 11)])


ANY = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(width=32))


@settings(max_examples=100, deadline=None)
@given(ANY, st.integers(0, 2**32))
def test_compiled_as_written(r, seed):
    c = np.random.default_rng(seed).permutation(r.ravel()).reshape(r.shape)
    groups = np.arange(len(r)) % 2
    shapes = (len(r), 5), (2, 2, r.shape[1])
    ours, plain = ([np.zeros(shape) for shape in shapes] for _ in range(2))
    fused.kernel()(sums._plain(r, np.float32), sums._plain(c, np.float32), groups, *ours)
    with np.errstate(all="ignore"):
        fused.add_up(r, c, groups, *plain)
    for one, other in zip(ours, plain):
        bad = ~np.isfinite(other)
        assert np.array_equal(bad[..., :3], ~np.isfinite(one)[..., :3])
        np.testing.assert_allclose(one[~bad], other[~bad], rtol=1e-13)


def run(cache: Path) -> subprocess.Popen:
    where = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CODE], env=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def test_no_cache_a_damaged_one_and_many_writers_at_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    started = [run(tmp_path / "file" / "below"), run(tmp_path / "cache"), run(tmp_path / "cache")]
    assert [one.communicate() for one in started] == [("2.0\n", "")] * 3
    held = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in held} == {".nbi", ".nbc"}, "nothing half-written is left"
    for path in held:
        path.write_bytes(path.read_bytes()[:100])
    assert run(tmp_path / "cache").communicate() == ("2.0\n", "")
