"""Export: checkpoint -> quantized towers -> exported programs -> LanguageBundle directories and their seam index.

The only importer of coreai_torch and coreai_opt. What they remark at import (torch 2.13.0+cpu is not 2.13.0, GPU
kernels do not load) says nothing about an export and is not shown.
"""

from __future__ import annotations

import harness.quiet  # noqa: F401  (before coreai_opt is imported)
from harness.export.bundles import ExportResult, export

__all__ = ["ExportResult", "export"]
