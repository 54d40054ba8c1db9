"""What every engine that runs bundles refuses before it starts, and what the host hands in."""

from __future__ import annotations

import hashlib

import numpy as np

from harness.cases import FrozenInputs
from harness.engines import Request
from harness.errors import HarnessError, within
from harness.geometry import Geometry
from harness.graph.contract import HostInputs, host_inputs


def checked(request: Request, geometry: Geometry, grid: tuple[int, int], context: int | None,
            encodes: bool) -> HostInputs:
    """What the host hands in for a request. Raises HarnessError where a bundle of this grid and context cannot run it.

    encodes: whether there is something that makes embeds of an image.
    """
    with within(request.inputs.case):
        given = request.inputs
        if given.length < 1:
            raise HarnessError("the prompt is empty")
        _check_image(given, geometry, grid, encodes)
        total = given.length + len(request.forced) + request.free
        if context is not None and total > context:
            raise HarnessError(f"needs {total} tokens, the bundle's context is {context}",
                               fix="shorten the case or export with a longer context")
        merged = (grid[0] // geometry.merge, grid[1] // geometry.merge) if given.grid else None
        ids = np.concatenate([given.ids, np.asarray(request.forced, dtype=np.int64)])
        return host_inputs(ids, geometry.image_token, geometry.vocab, merged)


def _check_image(given: FrozenInputs, geometry: Geometry, grid: tuple[int, int], encodes: bool) -> None:
    if given.grid is not None and tuple(given.grid) != (1, *grid):
        raise HarnessError(f"its image has grid {tuple(given.grid)}, the bundle is made for {(1, *grid)}",
                           fix="mark the case engine = false, or export for its grid")
    features = (grid[0] * grid[1], geometry.patch_features)
    if (given.patches is None) != (given.grid is None) or (
            given.patches is not None and given.patches.shape != features):
        shape = None if given.patches is None else list(given.patches.shape)
        raise HarnessError(f"patches have shape {shape}, the grid asks for {list(features)}")
    if given.patches is not None and not encodes:
        raise HarnessError("has an image, but there is no vision asset", fix="give --vision-bundle")


def image_name(given: FrozenInputs) -> str:
    """The same for equal images, which are encoded once."""
    return "image-" + hashlib.sha256(np.ascontiguousarray(given.patches)).hexdigest()[:16]


def promised(context: int | None, held: int | None, where: object) -> None:
    """Raises HarnessError where a bundle's metadata promises more slots than its cache has: a host reads past the end."""
    if context is not None and held is not None and held < context:
        raise HarnessError(f"its metadata promises a context of {context}, its cache has {held} slots", where=where,
                           fix="export the bundle again, or mend max_context_length")
