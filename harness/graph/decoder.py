"""The decoder, re-authored for export: extension ids, in-graph interleaved M-RoPE, DeepStack adds, KV states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.geometry import Geometry
from harness.graph.contract import rope_axis
from harness.graph.norms import RMSNorm, inverse_frequencies, rotate
from harness.graph.protocol import Tap, untapped

MASKED = -1e4
"""Replaces a hidden score: finite in fp16, and exp(MASKED - max) is exactly 0 for any score of a sane model."""


def offered(tap: Tap, name: str, x: Tensor, view: Callable[[Tensor], Tensor],
            back: Callable[[Tensor], Tensor]) -> Tensor:
    """Offer view(x) to a tap and go on with back(what it returns).

    A tap that returns the very value it was given adds no operation to the path of x, nor does an ordinary run: so a
    program traced with a collecting tap is the shipped one.
    """
    if tap is untapped:
        return x
    value = view(x)
    given = tap(name, value)
    return x if given is value else back(given)


def batched(tap: Tap, name: str, x: Tensor) -> Tensor:
    """Offer x [1, S, ...] to a tap, whose tokens stand on axis 0."""
    return offered(tap, name, x, lambda whole: whole[0], lambda given: given.unsqueeze(0))


class Rope(nn.Module):
    """Interleaved multimodal rotary embedding from (id, position) alone.

    Formulas: `harness.graph.contract.positions` and `rope_axis`, in operations that the converter knows.
    """

    def __init__(self, geometry: Geometry, width: int) -> None:
        super().__init__()
        lanes = geometry.head_dim // 2
        self.vocab, self.width = geometry.vocab, width
        self.register_buffer("inv_freq", inverse_frequencies(geometry.rope_theta, lanes), persistent=False)
        self.register_buffer("axis", torch.from_numpy(rope_axis(geometry.mrope_section, lanes)), persistent=False)

    def planes(self, ids: Tensor, place: Tensor, start: Tensor, amount: Tensor) -> Tensor:
        """ids, place [S] int32; start, amount [1] int32 -> t, h, w [3, S] int32."""
        text = place - torch.where(place >= start, amount, torch.zeros_like(amount))
        slot = (ids - self.vocab).clamp(min=0)
        first = place - slot
        row = torch.div(slot, self.width, rounding_mode="floor")
        image = torch.stack([first, first + row, first + slot - row * self.width])
        return torch.where(ids >= self.vocab, image, text)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """planes [3, S] int32 -> cos, sin [1, S, 1, head_dim] float32."""
        t, h, w = planes.float()[:, :, None]
        place = torch.where(self.axis == 1, h, torch.where(self.axis == 2, w, t))
        angles = place * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)[None, :, None]
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Grouped-query attention over the cache, with q and k normalised per head before rotation."""

    def __init__(self, geometry: Geometry, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.groups = layer, geometry.head_dim, geometry.heads // geometry.kv_heads
        self.scale = geometry.head_dim**-0.5
        # Which key-value head each query head reads. An index, because torch 2.11 cannot export repeat_interleave of a
        # slice: it asks for a proof that head_dim * T is at most groups * head_dim * T.
        self.register_buffer("shared", torch.arange(geometry.heads, device="cpu") // self.groups, persistent=False)
        self.q_proj = nn.Linear(geometry.hidden, geometry.heads * geometry.head_dim, bias=False)
        self.k_proj = nn.Linear(geometry.hidden, geometry.kv_heads * geometry.head_dim, bias=False)
        self.v_proj = nn.Linear(geometry.hidden, geometry.kv_heads * geometry.head_dim, bias=False)
        self.o_proj = nn.Linear(geometry.heads * geometry.head_dim, geometry.hidden, bias=False)
        self.q_norm = RMSNorm(geometry.head_dim, geometry.rms_eps)
        self.k_norm = RMSNorm(geometry.head_dim, geometry.rms_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor, cache: tuple[Tensor, Tensor],
                name: str, tap: Tap) -> Tensor:
        """x [1, S, h]; visible [S, T] bool; cache keys and values [L, 1, kv_heads, context, head_dim] -> [1, S, h]."""
        heads = (1, x.shape[1], -1, self.head_dim)
        q = batched(tap, f"{name}.q_norm", self.q_norm(self.q_proj(x).reshape(heads)))
        k = batched(tap, f"{name}.k_norm", self.k_norm(self.k_proj(x).reshape(heads)))
        v = batched(tap, f"{name}.v", self.v_proj(x).reshape(heads))
        q = batched(tap, f"{name}.q_rope", rotate(q, *rope)).transpose(1, 2)
        k = batched(tap, f"{name}.k_rope", rotate(k, *rope)).transpose(1, 2)
        keys, values = (self.remember(state, new, visible) for state, new in zip(cache, (k, v.transpose(1, 2))))
        context = self.attend(q, keys, values, visible).transpose(1, 2).reshape(1, x.shape[1], -1)
        return batched(tap, f"{name}.out", self.o_proj(batched(tap, f"{name}.context", context)))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """q [1, heads, S, head_dim]; keys, values [1, heads, T, head_dim] -> [1, heads, S, head_dim]; softmax in float32."""
        scores = q @ keys.transpose(2, 3) * self.scale
        scores = torch.where(visible, scores, torch.full_like(scores, MASKED))
        return scores.float().softmax(-1).to(q.dtype) @ values

    def remember(self, state: Tensor, new: Tensor, visible: Tensor) -> Tensor:
        """Write `new` [1, kv_heads, S, head_dim] at slots T-S .. T-1 of this layer; read slots 0 .. T-1 for every head.

        `slice_scatter` rather than slice assignment: the runtime refuses the latter where S is dynamic.
        """
        total, layer = visible.shape[1], self.layer
        state[layer:layer + 1] = torch.slice_scatter(state[layer:layer + 1], new.unsqueeze(0), 3,
                                                     total - new.shape[2], total)
        return state[layer, :, :, :total].index_select(1, self.shared)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(geometry.hidden, geometry.intermediate, bias=False)
        self.up_proj = nn.Linear(geometry.hidden, geometry.intermediate, bias=False)
        self.down_proj = nn.Linear(geometry.intermediate, geometry.hidden, bias=False)

    def forward(self, x: Tensor, name: str, tap: Tap) -> Tensor:
        """x [1, S, h] -> [1, S, h]."""
        gate = batched(tap, f"{name}.gate", self.gate_proj(x))
        up = batched(tap, f"{name}.up", self.up_proj(x))
        return batched(tap, f"{name}.out", self.down_proj(batched(tap, f"{name}.act", F.silu(gate) * up)))


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, geometry: Geometry, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(geometry.hidden, geometry.rms_eps)
        self.self_attn = Attention(geometry, layer)
        self.post_attention_layernorm = RMSNorm(geometry.hidden, geometry.rms_eps)
        self.mlp = MLP(geometry)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor, cache: tuple[Tensor, Tensor],
                name: str, tap: Tap) -> Tensor:
        """x [1, S, h] -> [1, S, h]."""
        normed = batched(tap, f"{name}.input_norm", self.input_layernorm(x))
        x = x + self.self_attn(normed, rope, visible, cache, f"{name}.attn", tap)
        normed = batched(tap, f"{name}.post_norm", self.post_attention_layernorm(x))
        return batched(tap, name, x + self.mlp(normed, f"{name}.mlp", tap))


class Decoder(nn.Module):
    """One call on S tokens at offset T - S. `slots` = N image rows, `width` = columns of the merged grid.

    The weights keep HF's names below `model.language_model`; a tied head shares the embedding's parameter.
    """

    def __init__(self, geometry: Geometry, merged_grid: tuple[int, int]) -> None:
        super().__init__()
        self.vocab, self.slots = geometry.vocab, merged_grid[0] * merged_grid[1]
        self.deepstack = len(geometry.deepstack_taps)
        self.tap: Tap = untapped
        self.embed_tokens = nn.Embedding(geometry.vocab, geometry.hidden)
        self.rope = Rope(geometry, merged_grid[1])
        self.layers = nn.ModuleList(Layer(geometry, number) for number in range(geometry.layers))
        self.norm = RMSNorm(geometry.hidden, geometry.rms_eps)
        self.lm_head = nn.Linear(geometry.hidden, geometry.vocab, bias=False)
        if geometry.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor, image_embeds: Tensor, deepstack_embeds: Tensor,
                rope_shift_start: Tensor, rope_shift_amount: Tensor, keyCache: Tensor, valueCache: Tensor) -> Tensor:
        """Shapes and dtypes: `harness.graph.protocol.Conversion.decode`; returns logits [1, S, V]."""
        tap, ids = self.tap, input_ids[0]
        place = position_ids[0, position_ids.shape[1] - ids.shape[0]:]
        planes = self.rope.planes(ids, place, rope_shift_start, rope_shift_amount)
        rope = self.rope(offered(tap, "decoder.positions", planes, lambda whole: whole.T, lambda given: given.T))
        # The ramp counts slots, so a query at place p sees the keys at 0..p whatever its rope position is.
        slots = torch.arange(position_ids.shape[1], dtype=torch.int32, device=ids.device)
        visible = slots[None, :] <= place[:, None]
        is_image = (ids >= self.vocab)[None, :, None]
        slot = (ids - self.vocab).clamp(0, self.slots - 1)
        text = self.embed_tokens(ids.clamp(0, self.vocab - 1))
        x = batched(tap, "decoder.embed", torch.where(is_image, image_embeds[slot][None], text[None]))
        for number, layer in enumerate(self.layers):
            name = f"decoder.layers.{number:02d}"
            x = layer(x, rope, visible, (keyCache, valueCache), name, tap)
            if number < self.deepstack:
                rows = deepstack_embeds[slot + number * self.slots][None]
                x = batched(tap, f"{name}.deepstack", x + torch.where(is_image, rows, torch.zeros_like(rows)))
        return batched(tap, "logits", self.lm_head(batched(tap, "decoder.norm", self.norm(x))))
