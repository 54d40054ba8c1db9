"""One small bundle of a random checkpoint, exported once a test run: three layers, a 4 x 6 grid, 48 tokens of context.

Its activations are float32, so that the runtime must agree with torch to the last bits but a few.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from random_models import write_checkpoint

from harness.cases import FrozenInputs
from harness.checkpoint import Checkpoint, open_checkpoint
from harness.engines.coreai import CoreAIEngine
from harness.engines.torch_graph import TorchGraph

GRID, CONTEXT = (4, 6), 48


@dataclass(frozen=True)
class Small:
    """A checkpoint, the bundles made of it, and what they should compute."""

    checkpoint: Checkpoint
    decoder: Path
    dynamic: Path
    vision: Path
    seams: Path
    twin: TorchGraph

    def engine(self, decoder: Path | None = None, **settings: object) -> CoreAIEngine:
        """The engine on the S = 1 decoder with its seam index, or on another decoder without one."""
        settings = {"seam_index": None if decoder else self.seams, "context": CONTEXT, **settings}
        return CoreAIEngine(decoder or self.decoder, self.vision, geometry=self.checkpoint.geometry, grid=GRID,
                            **settings)

    def image_case(self, seed: int = 0) -> FrozenInputs:
        """Twelve tokens, six of them an image's."""
        image = self.checkpoint.geometry.image_token
        ids = np.array([5, 6, image - 1, *[image] * 6, 7, 8, 9], dtype=np.int32)
        patches = np.random.default_rng(seed).standard_normal((24, 1536)).astype(np.float32)
        return FrozenInputs(f"image-{seed}", ids, np.zeros((3, 12), np.int32), patches, (1, *GRID))

    def text_case(self, length: int = 10) -> FrozenInputs:
        """Text only."""
        return FrozenInputs("text", np.arange(20, 20 + length, dtype=np.int32), np.zeros((3, length), np.int32))


@functools.cache
def small_bundle(mode: str = "int8hu") -> Small:
    """Export, or what was exported before."""
    from harness.export import export
    from harness.export.seams import index_path
    from harness.graph.quantize import RECIPES, twin_weights
    from harness.graph.reference import Reference

    root = Path(tempfile.mkdtemp(prefix="small-bundle-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    checkpoint, recipe = open_checkpoint(write_checkpoint(root / "small", layers=3)), RECIPES[mode]
    made = export(checkpoint, root / "out", mode, grid=GRID, context=CONTEXT, activations="fp32", dynamic=True)
    decoder, dynamic, vision = (path / f"{path.name}.aimodel" for path in (made.decoder, made.dynamic, made.vision))
    twin = Reference(recipe.geometry(checkpoint.geometry), GRID, twin_weights(checkpoint, recipe))
    return Small(checkpoint, decoder, dynamic, vision, index_path(made.decoder),
                 TorchGraph(twin, checkpoint.geometry, name="twin-fp32"))
