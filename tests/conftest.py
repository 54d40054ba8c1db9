"""Fixtures shared by the tests."""

from __future__ import annotations

import os

# One thread: the models are tiny, and two threads beside the runtime's own cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
