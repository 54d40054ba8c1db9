"""Guessing the tokens cheaply, so that one float32 forward verifies them where without a guess each costs a pass.

The model's own modules decode one token a step for all cases together. Their matrices stay in the 16 bits they are stored
in: half the bytes, nothing widened, and products that are many times faster than float32's where the processor has them.
By autocast, the residual stream and the norms stay float32; the few largest logits are computed again from float32 rows of
the head, because rounding to bfloat16 alone makes ties of them. What comes out is a guess and no more: it decides how many
passes are made and nothing else, except that of two tokens which the reference itself cannot tell apart (a tie, recorded as
such) the guessed one stays, as with a draft that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from harness.oracle.jobs import Bench, Real
from harness.oracle.lanes import Lane
from harness.oracle.rollout import greedy
from harness.streaming.parked import Parked, parking
from harness.streaming.reading import WeightReader
from harness.streaming.stages import Stage
from harness.streaming.sweep import sweep
from harness.streaming.weights import Streamed

BEST = 64
"""Logits that are computed again."""
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def stored_in(reader: WeightReader, stages: Sequence[Stage]) -> torch.dtype:
    """What most of the model's matrices are stored in."""
    count: dict[torch.dtype, int] = {}
    for place in (place for stage in stages for place in stage.places):
        dtype = reader.dtype(place.tensor)
        count[dtype] = count.get(dtype, 0) + torch.Size(place.shape).numel()
    return max(count, key=count.__getitem__)


def why_not(dtype: torch.dtype, device: torch.device) -> str:
    """Why no draft can be made of matrices of this dtype on this device; "" where one can."""
    if dtype == torch.float32:
        return "its weights are stored in float32"
    if device.type == "cuda":
        fast = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # what torch itself asks before it takes oneDNN's products; without them a step is slower than a float32 pass
        kernels = torch.ops.mkldnn
        fast = kernels._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else kernels._is_mkldnn_fp16_supported()
    return "" if fast else f"torch has no fast {NAMES[dtype]} products on this {device.type}"


def draft(lanes: Sequence[Lane], bench: Bench, source: Streamed, dtype: torch.dtype, real: Real,
          tell: Callable[[str, int, int], None]) -> None:
    """Guess the tokens that are not known yet; after each step they are noted, so that a killed run goes on there."""
    reader, head = source.reader, bench.model.lm_head
    matrix = next(stage for stage in bench.stages if stage.rows).places[0].tensor
    bench.hooks.into(None)

    def choose(last: Tensor) -> int:
        logits = head(last)[0]
        logits[bench.geometry.image_token] = -torch.inf
        best = logits.topk(min(BEST, len(logits))).indices
        return int(best[F.linear(last.float(), reader.rows(matrix, best.tolist()).to(last.device))[0].argmax()])

    guesses = [lane.tokens[:lane.known].tolist() for lane in lanes]
    steps = max(lane.case.decode - lane.known for lane in lanes)

    def after(stage: str) -> None:
        for lane, guess in zip(lanes, guesses):
            if stage == "logits" and len(guess) > lane.known:
                lane.guess(guess)
        tell(f"draft: {stage}", steps - max(lane.case.decode - lane.known for lane in lanes), steps)

    with parking([head]), torch.autocast(bench.device.type, dtype=dtype):
        forwards = [Parked(_decoding(lane, guess, choose, bench)) for lane, guess in zip(lanes, guesses)]
        again = [stage for stage in bench.stages if not stage.name.startswith("vision.")]
        sweep(forwards, bench.stages, [head], source.narrow(dtype, again), real, after)


def _decoding(lane: Lane, guess: list[int], choose: Callable[[Tensor], int], bench: Bench) -> Callable[[], list[int]]:
    prompt = _recorded(lane, bench) if lane.passes else None
    return lambda: greedy(bench.model, choose, lane.inputs, guess, lane.case.decode, bench.device, prompt)


def _recorded(lane: Lane, bench: Bench) -> DynamicCache | None:
    """The prompt's keys and values as the recording stored them, without those of its last token."""
    past, cache = lane.inputs.length - 1, DynamicCache()
    for layer in range(bench.geometry.layers if past else 0):
        names = f"kv.keys.{layer:02d}", f"kv.values.{layer:02d}"
        held = lane.out.read(f"decoder.{layer:02d}", names)
        keys, values = (torch.from_numpy(held[name])[None, :, :past].to(bench.device) for name in names)
        cache.update(keys, values, layer)
    return cache if past else None
