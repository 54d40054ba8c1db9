"""Quantizing a decoder in place with coreai-opt, layer by layer, and refusing what it would silently skip."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from coreai_opt import ExportBackend
from coreai_opt.quantization import Quantizer, QuantizerConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harness.errors import HarnessError
from harness.graph.decoder import Decoder
from harness.graph.norms import cast_weights
from harness.graph.quantize import Recipe, Scheme
from harness.graph.reference import TEXT, checkpoint_name


def quantize(decoder: Decoder, recipe: Recipe) -> int:
    """Quantize an fp16 decoder in place as the recipe says; returns how many Linears now hold codes and scales.

    One layer at a time, which gives the bits of quantizing the whole and bounds the memory of the observers.
    Raises HarnessError naming the first Linear that coreai-opt skipped, or took though the recipe says fp16.
    """
    for group in _groups(decoder):
        by_scheme: dict[Scheme, list[nn.Linear]] = {}
        for name, linear in group.items():
            scheme = recipe.scheme(checkpoint_name(TEXT, f"{name}.weight"))
            if scheme:
                by_scheme.setdefault(scheme, []).append(linear)
        for scheme, linears in by_scheme.items():
            quantize_linears(linears, scheme)
    return _check_census(decoder, recipe)


def _groups(decoder: Decoder) -> Iterator[Mapping[str, nn.Linear]]:
    """Linears by parameter name: those of each layer, then the head."""
    for number, layer in enumerate(decoder.layers):
        yield {f"layers.{number}.{name}": module for name, module in layer.named_modules()
               if isinstance(module, nn.Linear)}
    yield {"lm_head": decoder.lm_head}


class _Bag(nn.Module):
    """Calls every Linear once, which is all that coreai-opt's eager observers ask for."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self) -> list[Tensor]:
        return [linear(torch.zeros(1, linear.in_features, dtype=linear.weight.dtype)) for linear in self.linears]


def quantize_linears(linears: list[nn.Linear], scheme: Scheme) -> None:
    """Replace the weights of fp16 Linears by coreai-opt's codes and scales, in place; what it skips stays as it was."""
    bag, logger = _Bag(linears), logging.getLogger("coreai_opt")
    weight = {"dtype": "int8", "qscheme": scheme.qscheme,
              "granularity": {"type": "per_block", "block_size": scheme.block, "axis": 1}}
    config = {"execution_mode": "eager", "global_config": {
        "op_state_spec": {"weight": weight}, "op_input_spec": None, "op_output_spec": None}}
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warning of a skipped tensor becomes an error of ours
    try:
        quantizer = Quantizer(bag, QuantizerConfig.from_dict({"quantization_config": config}))
        quantizer.finalize(quantizer.prepare(example_inputs=()), backend=ExportBackend.CoreAI)
    finally:
        logger.setLevel(level)


def stored(linear: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """codes [o, i] int8 and scale [o, i / block] of a quantized Linear; None where it holds a plain weight."""
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    state = dict(linear.parametrizations.weight[0].named_buffers())
    return (state["quantized_data"], state["scale"]) if "quantized_data" in state else None


def _check_census(decoder: Decoder, recipe: Recipe) -> int:
    linears = {name: linear for group in _groups(decoder) for name, linear in group.items()}
    count = 0
    for name, linear in linears.items():
        tensor = checkpoint_name(TEXT, f"{name}.weight")
        scheme, held = recipe.scheme(tensor), stored(linear)
        if scheme and held is None:
            why = (f"its {linear.in_features} input features are no multiple of {scheme.block}"
                   if linear.in_features % scheme.block else "for no known reason")
            raise HarnessError(f"coreai-opt left it in fp16 under {recipe.name!r}: {why}", where=tensor,
                               fix="export this checkpoint as fp16")
        if held is not None and not scheme:
            raise HarnessError(f"coreai-opt quantized it, though {recipe.name!r} keeps it in fp16", where=tensor)
        count += held is not None
    return count


class Widened(nn.Module):
    """A quantized Linear whose weight is dequantized in fp16, as shipped, and widened before the product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] float32 -> [..., o] float32."""
        return F.linear(x, self.linear.weight.float())


def widen(tower: nn.Module) -> nn.Module:
    """Make a tower compute in float32 with exactly the numbers of its fp16 weights, codes and scales; returns it.

    Quantizing a float32 model instead would give float32 scales, hence other codes and other weights than are shipped.
    """
    for name, module in list(tower.named_modules()):
        if isinstance(module, nn.Linear) and stored(module) is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(tower.get_submodule(parent), attribute, Widened(module))
    return cast_weights(tower, torch.float32)
