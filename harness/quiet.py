"""Keep import-time remarks of third parties off a user's screen: they concern GPU kernels that nothing here calls.

Importing transformers or coreai_opt imports torchao, which reports each kernel library that it could not load.
"""

from __future__ import annotations

import logging
import warnings

for _name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="coreai-torch has only been validated", category=UserWarning)
