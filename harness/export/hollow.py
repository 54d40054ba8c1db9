"""Towers whose weights are not there yet: a trace needs shapes and dtypes only, values come when the converter asks.

A hollow tensor is allocated and never touched, so it costs address space and no memory. So an 8B decoder is traced in
the memory of its graph, and one weight at a time is made while the program is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.export.quantizer import PARTS, Widened, quantize_linears
from harness.geometry import Geometry
from harness.graph.decoder import Decoder
from harness.graph.quantize import Recipe, Scheme
from harness.graph.reference import TEXT, VISION, checkpoint_name
from harness.graph.vision import Vision


class Values(Protocol):
    """Where the numbers come from: `harness.export.values`."""

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises HarnessError where the tensor of this checkpoint name has another shape than a tower asks for."""
        ...

    def plain(self, name: str, like: Tensor) -> Tensor:
        """The values of an unquantized tensor by checkpoint name, in `like`'s shape and dtype."""
        ...

    def codes(self, name: str, scheme: Scheme, part: str, like: Tensor) -> Tensor:
        """quantized_data or scale of a quantized tensor, in `like`'s shape and dtype."""
        ...


class Pending:
    """Hollow tensors by address, and how the value of each is made. The tower must outlive it: addresses are reused."""

    def __init__(self) -> None:
        self._makers: dict[int, tuple[str, Callable[[], Tensor]]] = {}
        self._asked: set[int] = set()
        self._known: set[int] = set()

    def hollow(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[Tensor], Tensor],
               known: bool = False) -> Tensor:
        """A tensor without memory behind it, whose value `make` gives (of the same shape and dtype).

        known: its value is part of the program's structure, so that a twin without weights has it too.
        """
        tensor = torch.empty(shape, dtype=dtype)
        if known:
            self._known.add(tensor.data_ptr())
        self._makers[tensor.data_ptr()] = name, partial(make, torch.empty(shape, dtype=dtype, device="meta"))
        return tensor

    def value(self, tensor: Tensor) -> Tensor:
        """The value of a hollow tensor, made now; any other tensor as it is."""
        place = tensor.data_ptr()
        if place not in self._makers:
            return tensor
        self._asked.add(place)
        name, make = self._makers[place]
        made = make()
        if made.shape != tensor.shape or made.dtype != tensor.dtype:
            raise HarnessError(f"came as {made.dtype} {tuple(made.shape)}, planned was {tensor.dtype} "
                               f"{tuple(tensor.shape)}", where=name)
        return made

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it is hollow, and its value no part of the program's structure."""
        return tensor.data_ptr() in self._makers and tensor.data_ptr() not in self._known

    def check_all_made(self) -> None:
        """Raises HarnessError naming a tensor that was never asked for: the program has lost it."""
        lost = [name for place, (name, _) in self._makers.items() if place not in self._asked]
        if lost:
            raise HarnessError(f"the converted program does not hold it, nor {len(lost) - 1} others", where=lost[0])


def hollow_vision(geometry: Geometry, grid: tuple[int, int], values: Values, dtype: torch.dtype) -> tuple[Vision, Pending]:
    """The vision tower with hollow weights in `dtype`."""
    with torch.device("meta"):
        tower = Vision(geometry, grid)
    pending = Pending()
    _fill(tower, VISION, values, pending, dtype)
    return tower.eval(), pending


def hollow_decoder(geometry: Geometry, merged: tuple[int, int], recipe: Recipe, values: Values,
                   dtype: torch.dtype) -> tuple[Decoder, Pending, int]:
    """The decoder with hollow weights, and how many Linears hold codes and scales.

    Raises HarnessError naming the first Linear that coreai-opt would leave in fp16 though the recipe quantizes it.
    """
    with torch.device("meta"):
        tower = Decoder(geometry, merged)
    pending, count = Pending(), 0
    for name, linear in linears(tower):
        scheme = recipe.scheme(checkpoint_name(TEXT, f"{name}.weight"))
        if scheme:
            quantized = _quantized(linear, checkpoint_name(TEXT, f"{name}.weight"), scheme, values, pending)
            parent, _, attribute = name.rpartition(".")
            setattr(tower.get_submodule(parent), attribute, quantized if dtype == torch.float16 else Widened(quantized))
            count += 1
    _fill(tower, TEXT, values, pending, dtype)
    if geometry.tied:
        tower.lm_head.weight = tower.embed_tokens.weight
    return tower.eval(), pending, count


def linears(decoder: Decoder) -> Iterator[tuple[str, nn.Linear]]:
    """Linears by name: those of each layer, then the head."""
    yield from ((name, module) for name, module in list(decoder.named_modules()) if isinstance(module, nn.Linear))


def _fill(tower: nn.Module, prefix: str, values: Values, pending: Pending, dtype: torch.dtype) -> None:
    """Hollow parameters in the place of those on the meta device; a tied one once."""
    for name, parameter in list(tower.named_parameters()):
        if parameter.device.type != "meta":
            continue
        source = checkpoint_name(prefix, name)
        values.expect(source, tuple(parameter.shape))
        hollow = pending.hollow(source, tuple(parameter.shape), dtype, partial(values.plain, source))
        parent, _, attribute = name.rpartition(".")
        setattr(tower.get_submodule(parent), attribute, nn.Parameter(hollow, requires_grad=False))


def _quantized(linear: nn.Linear, name: str, scheme: Scheme, values: Values, pending: Pending) -> nn.Linear:
    """What coreai-opt makes of a Linear, with hollow codes: it quantizes one block here, to give the module its shape."""
    check_blocks(name, linear.in_features, scheme)
    values.expect(name, (linear.out_features, linear.in_features))
    made = nn.Linear(scheme.block, 1, bias=False, dtype=torch.float16)
    quantize_linears([made], scheme)
    made.in_features, made.out_features = linear.in_features, linear.out_features
    blocks = linear.in_features // scheme.block
    module = made.parametrizations.weight[0]
    module.zero_point = pending.hollow(f"{name} (zero_point)", (linear.out_features, blocks), module.zero_point.dtype,
                                       _zeros, known=True)
    for part, columns in zip(PARTS, (linear.in_features, blocks)):
        held = getattr(module, part)
        hollow = pending.hollow(f"{name} ({part})", (linear.out_features, columns), held.dtype,
                                partial(values.codes, name, scheme, part))
        setattr(module, part, hollow)
    return made


def _zeros(like: Tensor) -> Tensor:
    """The zero points of a symmetric scheme."""
    return torch.zeros(like.shape, dtype=like.dtype)


def check_blocks(name: str, columns: int, scheme: Scheme) -> None:
    """Raises HarnessError where coreai-opt would skip a weight, which it does without a word."""
    if columns % scheme.block:
        raise HarnessError(f"coreai-opt would leave it in fp16: its {columns} input features are no multiple of "
                           f"{scheme.block}", where=name, fix="export this checkpoint as fp16")
