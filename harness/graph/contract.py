"""The integers of the Qwen3-VL port, and nothing else: extension ids, rope shift, positions, DeepStack rows.

The host rewrites the i-th `<|image_pad|>` id to V + slot; everything about an image token follows from (id, position).
The formulas restate HF `Qwen3VLModel.get_rope_index` for one image of a (h, w) merged grid, without its loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.errors import HarnessError

NO_SHIFT = 1 << 30
"""`rope_shift_start` of a text-only run: no position ever reaches it."""


@dataclass(frozen=True)
class HostInputs:
    """What the host hands to the decoder besides embeddings: ids [T] int32 (extension ids), shift start and amount."""

    ids: np.ndarray
    shift_start: int
    shift_amount: int


def host_inputs(ids: np.ndarray, image_token: int, vocab: int, merged_grid: tuple[int, int] | None) -> HostInputs:
    """HF ids [T] -> extension ids and rope shift for the merged grid (rows, columns), or None without an image.

    Raises HarnessError for ids out of range, an image split in two, or a count of image tokens that is not rows x columns.
    """
    ids = np.array(ids, dtype=np.int64)  # a copy: the image ids are rewritten below
    bad = np.flatnonzero((ids < 0) | (ids >= vocab))
    if bad.size:
        raise HarnessError(f"id {ids[bad[0]]} at position {bad[0]} is outside the vocabulary 0..{vocab - 1}",
                           where="input ids", fix="tokenize with the checkpoint's own tokenizer")
    places = np.flatnonzero(ids == image_token)
    count = 0 if merged_grid is None else merged_grid[0] * merged_grid[1]
    if places.size != count:
        raise HarnessError(f"{places.size} image tokens, the grid asks for {count}", where="input ids")
    if merged_grid is None:
        return HostInputs(ids.astype(np.int32), NO_SHIFT, 0)
    if places[-1] - places[0] + 1 != count:
        raise HarnessError("the image tokens are not contiguous", where="input ids",
                           fix="one image a conversation: split the case")
    ids[places] = vocab + np.arange(count)
    return HostInputs(ids.astype(np.int32), int(places[0]) + count, count - max(merged_grid))


def positions(ids: np.ndarray, vocab: int, shift_start: int, shift_amount: int, width: int,
              offset: int = 0) -> np.ndarray:
    """Planes t, h, w [3, S] int32 of extension ids [S] that stand at positions offset, offset + 1, ...

    Image token: slot = id - V, s0 = position - slot; t = s0, h = s0 + slot // width, w = s0 + slot % width. Text token:
    position - amount from `shift_start` on, the position itself before.
    """
    place = offset + np.arange(len(ids), dtype=np.int64)
    slot = np.asarray(ids, dtype=np.int64) - vocab
    text = place - np.where(place >= shift_start, shift_amount, 0)
    first = place - slot
    image = np.stack([first, first + slot // width, first + slot % width])
    return np.where(slot >= 0, image, text).astype(np.int32)


def deepstack_rows(ids: np.ndarray, vocab: int, tap: int, slots: int) -> np.ndarray:
    """Row of `deepstack_embeds` [3N, h] added to each token after decoder layer `tap`; -1 for text tokens."""
    slot = np.asarray(ids, dtype=np.int64) - vocab
    return np.where(slot >= 0, tap * slots + slot, -1).astype(np.int32)


def rope_axis(section: tuple[int, int, int], lanes: int) -> np.ndarray:
    """Which plane (0 t, 1 h, 2 w) rotates each of the head_dim / 2 frequency lanes, interleaved M-RoPE.

    Source: HF `Qwen3VLTextRotaryEmbedding.recomposition_frequencies`: lanes 1::3 below 3*section[1] take h, lanes 2::3
    below 3*section[2] take w, the rest t.
    """
    lane = np.arange(lanes)
    axis = np.zeros(lanes, dtype=np.int32)
    axis[(lane % 3 == 1) & (lane < 3 * section[1])] = 1
    axis[(lane % 3 == 2) & (lane < 3 * section[2])] = 2
    return axis
