"""Greedy rollout with the KV cache, and the one forward that verifies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.cases import FrozenInputs, Rollout
from harness.errors import HarnessError

TIE_FACTOR = 4.0
"""A step is a tie where its margin is at most this times the measured noise. Two runs that each stay within the noise
of the truth differ by twice the noise, and a margin, being a difference of two logits, by twice that."""


@dataclass(frozen=True)
class Draft:
    """What cached decoding chose: tokens [n] int32 and the logits [n, V] float32 they were chosen from."""

    tokens: np.ndarray
    logits: np.ndarray


def extend_positions(planes: np.ndarray, count: int) -> np.ndarray:
    """Planes [3, T] of a prompt -> [3, T + count] int32: text goes on from the largest position, as HF's rope delta."""
    start = int(planes.max()) + 1
    tail = np.broadcast_to(np.arange(start, start + count, dtype=np.int32), (3, count))
    return np.concatenate([planes, tail], axis=1).astype(np.int32)


@torch.no_grad()
def forward(model: nn.Module, inputs: FrozenInputs, tokens: Sequence[int] = ()) -> Any:
    """One HF forward over prompt + tokens, with a fresh cache; returns HF's output (logits [1, T + n, V]).

    Positions and an all-ones mask are explicit: without a mask, transformers 4.57 takes the repeated positions of
    image tokens for packed sequences, and a rope delta kept from an earlier prompt would shift this one.
    """
    device = model.lm_head.weight.device
    ids = torch.from_numpy(np.concatenate([inputs.ids, np.asarray(tokens, dtype=np.int32)]).astype(np.int64))[None]
    planes = torch.from_numpy(extend_positions(inputs.positions, len(tokens)).astype(np.int64))[:, None]
    image = {}
    if inputs.patches is not None:
        image = {"pixel_values": torch.from_numpy(inputs.patches).to(device),
                 "image_grid_thw": torch.tensor([inputs.grid], device=device)}
    model.model.rope_deltas = None
    return model(input_ids=ids.to(device), position_ids=planes.to(device), use_cache=True,
                 attention_mask=torch.ones_like(ids, device=device), **image)


@torch.no_grad()
def greedy(model: nn.Module, inputs: FrozenInputs, count: int) -> Draft:
    """`count` greedy tokens, step by step; an end-of-text token does not stop it, so that 24 tokens are 24."""
    planes = torch.from_numpy(extend_positions(inputs.positions, count).astype(np.int64))[:, None]
    output, rows = forward(model, inputs), []
    device = output.logits.device
    for step in range(count):
        rows.append(output.logits[0, -1])
        length = inputs.length + step + 1
        if step + 1 < count:
            output = model(input_ids=rows[-1].argmax().view(1, 1), use_cache=True,
                           past_key_values=output.past_key_values,
                           position_ids=planes[:, :, length - 1:length].to(device),
                           attention_mask=torch.ones(1, length, dtype=torch.int64, device=device))
    logits = torch.stack(rows).float().cpu().numpy()
    return Draft(logits.argmax(-1).astype(np.int32), logits)


def settle(inputs: FrozenInputs, draft: Draft, logits: np.ndarray, image_token: int) -> tuple[Rollout, float]:
    """The rollout and the reference's noise, from a draft and the logits [T + n, V] of the forward that verifies it.

    If the argmax of row T - 1 + i is token i for every i, the draft is the greedy rollout, by induction. The noise is
    the largest difference between the two ways of computing the same rows. Where the argmax differs from the draft, the
    margin is at most twice the noise, so such a step is always a tie: the draft's token stays, because what follows in
    the trace was computed behind it. Margins are those of the verifying forward.

    Raises HarnessError for logits that are not finite, and where the model itself continues with the image token, which
    no host can tell from an image.
    """
    rows = logits[inputs.length - 1:inputs.length - 1 + len(draft.tokens)]
    if not (np.isfinite(rows).all() and np.isfinite(draft.logits).all()):
        raise HarnessError("the reference's own logits are not finite", where=inputs.case, fix="check the checkpoint")
    if image_token in draft.tokens:
        raise HarnessError("the model continues with <|image_pad|>", where=inputs.case, fix="choose another case")
    noise = float(np.abs(rows - draft.logits).max())
    best = np.partition(rows, -2, axis=-1)[:, -2:]
    margins = (best[:, 1] - best[:, 0]).astype(np.float32)
    ties = np.flatnonzero(margins <= TIE_FACTOR * noise)
    return Rollout(draft.tokens, margins, tuple(int(step) for step in ties)), noise


def cache_arrays(cache: Any) -> dict[str, np.ndarray]:
    """HF `DynamicCache` -> `kv.keys`, `kv.values` [L, kv_heads, T, head_dim] float32."""
    def stack(parts: list[Tensor]) -> np.ndarray:
        return torch.stack([part[0].to("cpu", torch.float32) for part in parts]).numpy()

    return {"kv.keys": stack([layer.keys for layer in cache.layers]),
            "kv.values": stack([layer.values for layer in cache.layers])}
