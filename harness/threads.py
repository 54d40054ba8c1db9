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


def settle(geometry: Geometry) -> None:
    """Choose for this process and its children, unless the user has (OMP_NUM_THREADS)."""
    if geometry.hidden >= SMALL or "OMP_NUM_THREADS" in os.environ:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
