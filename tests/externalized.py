"""A decoder converted as the published flow does: its norms as private graphs that declare a composite operation."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from coreai_torch import TorchConverter, get_decomp_table
from coreai_torch.externalize import ExternalizeSpec
from torch.export import Dim

from harness.checkpoint import Checkpoint
from harness.export.hollow import linears
from harness.export.program import DECODER_INPUTS, DECODER_STATES
from harness.export.quantizer import Widened, quantize_linears, stored
from harness.graph.decoder import Decoder
from harness.graph.norms import RMSNorm, cast_weights
from harness.graph.quantize import RECIPES, Recipe, planned_weights
from harness.graph.reference import TEXT, build_towers, checkpoint_name


def _quantize(decoder: Decoder, recipe: Recipe) -> None:
    for name, linear in list(linears(decoder)):
        scheme = recipe.scheme(checkpoint_name(TEXT, f"{name}.weight"))
        if scheme:
            quantize_linears([linear], scheme)


def _widened(decoder: Decoder) -> Decoder:
    """Float32 activations and plain weights; codes and scales as they are."""
    for name, linear in list(linears(decoder)):
        if stored(linear) is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(decoder.get_submodule(parent), attribute, Widened(linear))
    return cast_weights(decoder, torch.float32)


def save_externalized(checkpoint: Checkpoint, path: Path, mode: str, *, grid: tuple[int, int], context: int,
                      activations: str = "fp16") -> Path:
    """Write an S = 1 decoder's `.aimodel`; parameters as of `harness.export.export`."""
    recipe, geometry = RECIPES[mode], checkpoint.geometry
    _, decoder = build_towers(recipe.geometry(geometry), grid,
                              {name: weight for name, weight, _ in planned_weights(checkpoint, recipe)})
    _quantize(decoder, recipe)
    decoder = _widened(decoder) if activations == "fp32" else decoder
    dtype = torch.float32 if activations == "fp32" else torch.float16
    cache = (geometry.layers, 1, geometry.kv_heads, context, geometry.head_dim)
    rows = decoder.slots, decoder.deepstack * decoder.slots
    example = (torch.zeros(1, 1, dtype=torch.int32), torch.arange(8, dtype=torch.int32)[None],
               *(torch.zeros(count, geometry.hidden, dtype=dtype) for count in rows),
               torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32),
               torch.zeros(cache, dtype=dtype), torch.zeros(cache, dtype=dtype))
    shapes = (None, {1: Dim("T", min=2, max=context - 1)}, *[None] * 6)

    def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
        return torch.export.export(model, example, dynamic_shapes=shapes).run_decompositions(get_decomp_table())

    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        norm = ExternalizeSpec(RMSNorm, composite_op_name="rms_norm", composite_attrs=["eps"])
        converter.add_pytorch_module(decoder.requires_grad_(False), export_fn=exported, externalize_modules=[norm],
                                     input_names=DECODER_INPUTS, state_names=DECODER_STATES, output_names=("logits",))
        converter.to_coreai().save_asset(path)
    return path
