"""The operation table: what each operation of the dialect becomes; one file a family.

Calls, constants, tokens and states are no lines of torch: `reader` follows calls, `states` knows states, and `get_shape`
and what is computed from it are folded by `folding`.
"""

from __future__ import annotations

from harness.engines.replay.ops import elementwise, gather, products, shape
from harness.engines.replay.rules import Table

TABLE: Table = {**elementwise.RULES, **shape.RULES, **products.RULES, **gather.RULES}
STATES = ("read_handle", "write_handle")
KNOWN = frozenset({*TABLE, *STATES, "get_shape"})
