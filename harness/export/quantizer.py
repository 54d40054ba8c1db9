"""Quantizing with coreai-opt in blocks of rows, and refusing what it would silently skip.

Scales belong to blocks along the input axis, so rows are independent of each other, and blocks of rows give the bits of
quantizing the whole model at once (tests/test_export_stream.py) in the memory of one block's observers.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F
from coreai_opt import ExportBackend
from coreai_opt.quantization import Quantizer, QuantizerConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harness.errors import HarnessError
from harness.graph.quantize import Scheme

PARTS = "quantized_data", "scale"
"""The buffers of a Linear that coreai-opt has quantized; besides it holds zero points, all zero."""


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
    logger.setLevel(logging.ERROR)  # its warning of a skipped tensor becomes an error of ours
    quantizer = Quantizer(bag, QuantizerConfig.from_dict({"quantization_config": config}))
    quantizer.finalize(quantizer.prepare(example_inputs=()), backend=ExportBackend.CoreAI)


def stored(linear: nn.Linear) -> dict[str, Tensor] | None:
    """codes [o, i] int8 and scale [o, i / block] by PARTS of a quantized Linear; None where it holds a plain weight.

    Raises HarnessError for a zero point that is not zero: every scheme of ours is symmetric.
    """
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    state = dict(linear.parametrizations.weight[0].named_buffers())
    if "zero_point" in state and state["zero_point"].any():
        raise HarnessError("coreai-opt gave it zero points that are not zero", fix="export this checkpoint as fp16")
    return {part: state[part] for part in PARTS} if PARTS[0] in state else None


def quantize_rows(blocks: Iterable[Tensor], rows: int, scheme: Scheme,
                  rounded: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """coreai-opt's codes and scales of a weight [rows, i] that comes in blocks of its rows; `rounded` makes them fp16.

    Raises HarnessError where coreai-opt leaves a block as it is.
    """
    whole: dict[str, Tensor] = {}
    start = 0
    for made in _in_order(lambda block: _quantize_block(rounded(block), scheme), blocks):
        for part, values in made.items():
            whole.setdefault(part, torch.empty((rows, values.shape[1]), dtype=values.dtype))
            whole[part][start:start + len(values)] = values
        start += len(values)
    if start != rows:
        raise HarnessError(f"{start} rows came where {rows} were announced")
    return whole


def _quantize_block(block: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    linear = nn.Linear(block.shape[1], block.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(block, requires_grad=False)
    quantize_linears([linear], scheme)
    made = stored(linear)
    if made is None:
        raise HarnessError("coreai-opt left it in fp16, for no known reason", fix="export this checkpoint as fp16")
    return made


def _in_order(work: Callable[[Tensor], dict[str, Tensor]], blocks: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
    """`work` of each block, as many at a time as torch has threads, each in one: blocks fit a cache, and threads that
    share one wait for each other at every operation (on two busy cores 4.6 s instead of 0.9 s for 50 M weights)."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, blocks)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running: deque[Future] = deque()
            for block in blocks:
                running.append(pool.submit(work, block))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
    finally:
        torch.set_num_threads(threads)


class Widened(nn.Module):
    """A quantized Linear whose weight is dequantized in fp16, as shipped, and widened before the product.

    Quantizing a float32 model instead would give float32 scales, hence other codes and other weights than are shipped.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] float32 -> [..., o] float32."""
        return F.linear(x, self.linear.weight.float())
