"""The greedy rollout by verification: one forward over prompt and draft, and a second way of computing the same rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from harness.cases import FrozenInputs, Rollout
from harness.errors import HarnessError

TIE_FACTOR = 4.0
"""A step is a tie where its margin is at most this times the measured noise. Two runs that each stay within the noise
of the truth differ by twice the noise, and a margin, being a difference of two logits, by twice that."""


@dataclass(frozen=True)
class Draft:
    """Tokens [n] int32; and logits [m, V] float32, the last m of the rows that choose them computed a second way."""

    tokens: np.ndarray
    logits: np.ndarray


def extend_positions(planes: np.ndarray, count: int) -> np.ndarray:
    """Planes [3, T] of a prompt -> [3, T + count] int32: text goes on from the largest position, as HF's rope delta."""
    start = int(planes.max()) + 1
    tail = np.broadcast_to(np.arange(start, start + count, dtype=np.int32), (3, count))
    return np.concatenate([planes, tail], axis=1).astype(np.int32)


def arguments(inputs: FrozenInputs, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What HF's model is called with for prompt + tokens.

    Positions and an all-ones mask are explicit: without a mask, transformers 4.57 takes the repeated positions of
    image tokens for packed sequences, and a rope delta kept from an earlier prompt would shift this one.
    """
    ids = torch.from_numpy(np.concatenate([inputs.ids, np.asarray(tokens, dtype=np.int32)]).astype(np.int64))[None]
    planes = torch.from_numpy(extend_positions(inputs.positions, len(tokens)).astype(np.int64))[:, None]
    image = {}
    if inputs.patches is not None:
        image = {"pixel_values": torch.from_numpy(inputs.patches).to(device),
                 "image_grid_thw": torch.tensor([inputs.grid], device=device)}
    return {"input_ids": ids.to(device), "position_ids": planes.to(device), "use_cache": True,
            "attention_mask": torch.ones_like(ids, device=device), **image}


@torch.no_grad()
def forward(model: nn.Module, inputs: FrozenInputs, tokens: Sequence[int] = ()) -> Any:
    """One HF forward over prompt + tokens, with a fresh cache; returns HF's output (logits [1, T + n, V])."""
    model.model.rope_deltas = None
    return model(**arguments(inputs, tokens, model.lm_head.weight.device))


def behind(inputs: FrozenInputs, tokens: Sequence[int], first: int, device: torch.device) -> dict[str, Any]:
    """What HF's model is called with, behind a cache of prompt and tokens before, to choose tokens first, first + 1, ..

    It is fed the token before each of them; row i of what comes out chooses token first + i, computed another way than
    by `forward`.
    """
    whole = np.concatenate([inputs.ids, np.asarray(tokens, dtype=np.int32)]).astype(np.int64)
    start, end = inputs.length - 1 + first, len(whole) - 1
    planes = extend_positions(inputs.positions, len(tokens))[:, start:end].astype(np.int64)
    return {"input_ids": torch.from_numpy(whole[None, start:end]).to(device), "use_cache": True,
            "position_ids": torch.from_numpy(planes)[:, None].to(device),
            "attention_mask": torch.ones(1, end, dtype=torch.int64, device=device)}


@torch.no_grad()
def greedy(model: nn.Module, choose: Callable[[Tensor], int], inputs: FrozenInputs, tokens: list[int], count: int,
           device: torch.device, prompt: DynamicCache | None = None) -> list[int]:
    """Append greedy tokens until there are `count`, by cached decoding, one a step; returns `tokens`.

    choose: the token for the last hidden state [1, hidden]. prompt: a cache of all of the prompt but its last token. An
    end-of-text token does not stop it, so that 24 tokens are 24.
    """
    cache = DynamicCache() if prompt is None else prompt
    name, model.model.rope_deltas = cache_name(model), None
    call = arguments(inputs, tokens, device) if prompt is None else behind(inputs, [*tokens, 0], 0, device)
    while len(tokens) < count:
        tokens.append(choose(model.model(**call, **{name: cache})[0][:, -1]))
        call = behind(inputs, [*tokens, 0], len(tokens), device)
    return tokens


def best_of(head: Sequence[Tensor], image_token: int) -> Callable[[Tensor], int]:
    """For `greedy`: the largest logit, the image token's excepted. head: its blocks of rows, all in place."""
    def choose(last: Tensor) -> int:
        logits = torch.cat([F.linear(last, rows.to(last.device)) for rows in head], dim=1)
        logits[:, image_token] = -torch.inf
        return int(logits.argmax())

    return choose


def cache_name(model: nn.Module) -> str:
    """What this release of transformers calls the argument that the cache is handed in by."""
    known = inspect.signature(type(model.model.language_model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def settle(case: str, draft: Draft, rows: np.ndarray, image_token: int) -> tuple[Rollout, float]:
    """The rollout and the reference's noise, from a draft and the rows [n, V] of the one forward that choose its tokens.

    If the argmax of row i is token i for every i, the draft is the greedy rollout, by induction. The noise is
    the largest difference between the two ways of computing the same rows: all in one forward, and behind a cache.
    Where the argmax differs from the draft by at most twice the noise (`mismatch`), the margin is as small, so such a
    step is always a tie: the draft's token stays, because what follows in the trace was computed behind it. Margins are
    those of the one forward.

    Raises HarnessError for logits that are not finite, and where the model itself continues with the image token, which
    no host can tell from an image.
    """
    if not (np.isfinite(rows).all() and np.isfinite(draft.logits).all()):
        raise HarnessError("the reference's own logits are not finite", where=case, fix="check the checkpoint")
    refuse_images(case, draft.tokens, image_token)
    noise = _noise(rows, draft.logits)
    margins = _margins(rows)
    ties = np.flatnonzero(margins <= TIE_FACTOR * noise)
    return Rollout(draft.tokens, margins, tuple(int(step) for step in ties)), noise


def refuse_images(case: str, tokens: np.ndarray, image_token: int) -> None:
    """Raises HarnessError where the model itself continues with the image token."""
    if image_token in tokens:
        raise HarnessError("the model continues with <|image_pad|>", where=case, fix="choose another case")


def _margins(rows: np.ndarray) -> np.ndarray:
    """Largest minus second largest of each row; two passes, which take a fifth of what `np.partition` takes."""
    steps, best = np.arange(len(rows)), rows.argmax(-1)
    others = rows.copy()
    others[steps, best] = -np.inf
    return (rows[steps, best] - others.max(-1)).astype(np.float32)


def mismatch(tokens: np.ndarray, rows: np.ndarray, other: np.ndarray) -> int | None:
    """The first step at which the rows [n, V] choose otherwise than the tokens by more than noise explains, or None."""
    gap = rows.max(-1) - rows[np.arange(len(tokens)), tokens]
    broken = np.flatnonzero(~(gap <= 2 * _noise(rows, other)))
    return int(broken[0]) if len(broken) else None


def _noise(rows: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(rows[-len(other):] - other).max())
