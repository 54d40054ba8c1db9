"""How many threads torch may use: one for a small model, where a second costs more than it gives.

Two OpenMP threads spin for each other beside the engine's process: the tiny model's ladder took 291 s of wall time with
two threads and 78 s with one, on two cores (`time harness gate`, with and without OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import os
import sys

from harness.geometry import Geometry

SMALL = 1024
"""Decoder width below which no matrix product of a prompt is worth a second thread."""
SPINS = "10000"
"""How long a thread of a large model's products waits for the others before it lets go of its core, in turns of a loop, not
the 300000 of libgomp: beside the products another thread reads and widens weights, and it can have the core."""


def settle(geometry: Geometry) -> None:
    """Choose for this process and its children, unless the user has (OMP_NUM_THREADS, GOMP_SPINCOUNT)."""
    if geometry.hidden >= SMALL:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # of no effect where torch is loaded, or on another OpenMP
        return
    if "OMP_NUM_THREADS" in os.environ:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
