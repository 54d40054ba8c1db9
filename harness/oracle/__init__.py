"""The oracle: the Hugging Face model in true float32, with hooks at every seam; the only importer of transformers.

Works with transformers 4.57 and 5.x. Their hidden-state outputs, rope arguments and mask detection differ, so nothing
here depends on them: seams are read by hooks on modules, positions and an all-ones mask are handed in explicitly.
"""

from __future__ import annotations

import harness.quiet  # noqa: F401  (before transformers is imported)
from harness.oracle.hooks import wanted_seams
from harness.oracle.inputs import freeze
from harness.oracle.model import load_model, true_fp32
from harness.oracle.recording import Progress, record
from harness.oracle.rollout import forward, settle

__all__ = ["Progress", "forward", "freeze", "load_model", "record", "settle", "true_fp32", "wanted_seams"]
