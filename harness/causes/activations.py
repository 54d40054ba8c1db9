"""Activations: another function, the other flavour of GELU, gate and up exchanged."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from harness.causes import Guess, Scene
from harness.probes import formulas


def guesses(scene: Scene) -> Iterator[Guess]:
    """For the seam behind an activation."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.mlp\.act", scene.seam)
    if match:
        name = scene.seam.removesuffix(".act")
        gate, up = scene.held(f"{name}.gate"), scene.held(f"{name}.up")
        if gate is not None and up is not None:
            yield Guess("gate and up are exchanged", formulas.silu(up) * gate)
            yield Guess("GELU stands in the place of SiLU", formulas.gelu_exact(gate) * up)
            yield Guess("tanh GELU stands in the place of SiLU", formulas.gelu_tanh(gate) * up)
            yield Guess("the product with up is left out", formulas.silu(gate))
            yield Guess("the activation is left out", gate * up)
        return
    match = re.fullmatch(r"vision\.(layers\.\d+\.mlp|merger|deepstack\.\d+)\.act", scene.seam)
    x = scene.held(scene.seam.removesuffix(".act") + ".fc1") if match else None
    if x is None:
        return
    if "mlp" in scene.seam:
        yield Guess("exact GELU stands in the place of the tanh one", formulas.gelu_exact(x))
    else:
        yield Guess("tanh GELU stands in the place of the exact one", formulas.gelu_tanh(x))
    yield Guess("SiLU stands in the place of GELU", formulas.silu(x))
    yield Guess("quick GELU, x sigmoid(1.702 x), stands in its place", formulas.silu(1.702 * x) / 1.702)
    yield Guess("ReLU stands in the place of GELU", np.maximum(x, 0))
    yield Guess("the activation is left out", x)
