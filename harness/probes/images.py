"""Images of sizes that no case has: off the grid, halfway between two multiples, long, too small and too large.

A host that rounds otherwise, forgets a bound on the area or resamples otherwise is right on every image that already
fits; each of these meets another branch of the resizing rule (HF `smart_resize`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.host import Preprocessing

def sizes(preprocessing: Preprocessing) -> Mapping[str, tuple[int, int]]:
    """Width and height in pixels of each of `harness.plan.SIZES`."""
    factor = preprocessing.patch * preprocessing.merge
    inside = max(1, round(math.sqrt(2 * preprocessing.least) / factor))  # multiples whose area is above the least
    least, most = (math.sqrt(area) for area in (preprocessing.least, preprocessing.most))
    return {"off-grid": ((inside + 9) * factor + 22, (inside + 4) * factor + 13),
            "halves": ((2 * inside + 1) * factor // 2 + 4 * factor, (2 * inside + 3) * factor // 2 + 4 * factor),
            "long": (5 * inside * factor + 3, inside * factor + 5),
            "small": (int(0.55 * least), int(0.4 * least)), "large": (int(1.35 * most), int(0.95 * most))}
