"""What the quantizer must produce, from its formula alone: recipes, codes and scales, the storage census, the twin.

Source of the formula: coreai-opt 0.3.0, eager mode, symmetric int8 weights in blocks of 32 along the input axis
(`choose_qparams_affine_with_min_max` and `_quantize_int`), with the weights in fp16 as they are when it meets them:

    scale = clamp(fp16(absmax / half), 2^-23)        half = (high - low) / 2, one scale a block
    code  = clamp(round(weight / scale), low, high)  in float32, ties to even

Its "clipping" clips the code -128, not outliers: both schemes are absmax based.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.graph.decoder import Decoder
from harness.graph.reference import EMBEDDING, HEAD, POSITIONS, TEXT, VISION, checkpoint_name
from harness.graph.vision import Vision

FP16 = "fp16"
LEAST_SCALE = 2.0**-23
"""The float32 epsilon: coreai-opt's floor for a scale, so that a block of zeros has one."""
BLOCK = 1 << 18
"""Weights quantized at a time: 1 MiB of float32, which a processor's cache holds."""
_BODY = re.compile(re.escape(TEXT) + r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized: coreai-opt's name, codes low..high, `block` input features to a scale."""

    qscheme: str
    low: int
    high: int
    block: int = 32


CLIPPED = Scheme("symmetric_with_clipping", -127, 127)
PLAIN = Scheme("symmetric", -128, 127)


@dataclass(frozen=True)
class Recipe:
    """A mode: the schemes of the decoder's body and head; None stores fp16. Embedding and vision stay fp16 always."""

    name: str
    body: Scheme | None = None
    head: Scheme | None = None

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of a tensor by checkpoint name, or None for fp16."""
        if name == HEAD:
            return self.head
        return self.body if _BODY.fullmatch(name) else None

    def geometry(self, geometry: Geometry) -> Geometry:
        """The geometry of what this recipe makes: a quantized head is a copy of its own, no longer tied."""
        return replace(geometry, tied=geometry.tied and self.head is None)


RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (
    Recipe("fp16"), Recipe("int8lin", CLIPPED), Recipe("int8hu", CLIPPED, PLAIN))}


def to_fp16(name: str, weight: Tensor) -> Tensor:
    """Round a weight to fp16, as an export does. Raises HarnessError where it holds NaN or leaves fp16's range."""
    rounded = weight.to(torch.float16)
    if not _finite(rounded):
        raise HarnessError("has values that are not finite in fp16 (the largest fp16 is 65504)", where=name,
                           fix="check the checkpoint; nothing is clipped silently")
    return rounded


def _finite(half: Tensor) -> bool:
    """Of fp16: below the bits of infinity, sign apart. An eighth of the time of `isfinite`, which audits wait for."""
    return not half.numel() or int(half.contiguous().view(torch.int16).bitwise_and(0x7FFF).amax()) < 0x7C00


def expected_codes(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """weight [o, i], rounded to fp16 first -> codes [o, i] int8, scale [o, i / block] fp16; formula: see the module.

    Raises HarnessError where i is no multiple of the block: coreai-opt would leave such a weight in fp16.
    """
    if weight.shape[1] % scheme.block:
        raise HarnessError(f"{weight.shape[1]} input features are no multiple of the block {scheme.block}",
                           fix="export this checkpoint as fp16")
    rows = max(1, BLOCK // weight.shape[1])
    parts = [_quantize(part, scheme) for part in weight.split(rows)]
    codes, scales = zip(*parts)
    return torch.cat(codes), torch.cat(scales)


def _quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    blocks = weight.to(torch.float16).float().unflatten(1, (-1, scheme.block))
    half = (scheme.high - scheme.low) / 2
    scale = (blocks.abs().amax(-1) / half).to(torch.float16).clamp(min=LEAST_SCALE)
    codes = blocks.div_(scale.float()[..., None]).round_().clamp_(scheme.low, scheme.high)
    return codes.to(torch.int8).flatten(1), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [o, i] int8, scale [o, b] -> [o, i] in the scale's dtype, as Core AI's `blockwise_shift_scale` computes it.

    Its offsets are zero here: scale * (code - 0) + 0, one product rounded once.
    """
    blocks = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    return (blocks * scale[..., None]).flatten(1)


def twin_weights(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Tensor]:
    """The checkpoint's weights as a bundle of this recipe must compute with them: fp16, by checkpoint name.

    Where the recipe gives a tied checkpoint a head of its own, `lm_head.weight` is there too; hand the result to the
    graph with `recipe.geometry(checkpoint.geometry)`. Raises HarnessError naming a tensor that fits no fp16 or block.
    """
    return {name: dequantize(*_codes(name, weight, scheme)) if scheme else weight
            for name, weight, scheme in planned_weights(checkpoint, recipe)}


def planned_weights(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[tuple[str, Tensor, Scheme | None]]:
    """Name, fp16 weight and scheme of every tensor an export starts from, one at a time."""
    for name, source, scheme in planned_names(checkpoint, recipe):
        yield name, to_fp16(name, checkpoint.tensor(source)), scheme


def planned_names(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[tuple[str, str, Scheme | None]]:
    """Name, the checkpoint tensor that it is made of, and scheme: a head that is quantized is one of its own, though the
    checkpoint ties it to the embedding."""
    for name in checkpoint.names():
        yield name, name, recipe.scheme(name)
    if checkpoint.geometry.tied and recipe.head and HEAD not in checkpoint.names():
        yield HEAD, EMBEDDING, recipe.head


def _codes(name: str, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    try:
        return expected_codes(weight, scheme)
    except HarnessError as error:
        raise error.at(name)


def storage_plan(geometry: Geometry, recipe: Recipe) -> dict[str, Scheme | str]:
    """How a bundle pair of this recipe must store each checkpoint tensor: its Scheme, or "fp16".

    The vision position table is stored resampled to the grid, the patch kernel flattened; a head that stays tied is
    stored once, as the embedding, and is not listed.
    """
    with torch.device("meta"):
        vision = Vision(geometry, (2 * geometry.merge, 2 * geometry.merge))
        decoder = Decoder(recipe.geometry(geometry), (2, 2))
    names = [POSITIONS if name == "positions" else VISION + name for name, _ in vision.named_parameters()]
    names += [checkpoint_name(TEXT, name) for name, _ in decoder.named_parameters()]
    return {name: recipe.scheme(name) or FP16 for name in sorted(names)}
