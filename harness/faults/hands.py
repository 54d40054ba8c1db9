"""What faults take hold of: our graph with its steps as methods, so that one step can be bent and the others stay.

`bend_*` turns a module of a loaded graph into the same arithmetic with more joints; a test holds both to be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.graph import decoder, vision
from harness.graph.decoder import batched, offered
from harness.graph.norms import RMSNorm, rotate
from harness.graph.reference import Reference


class BentAttention(decoder.Attention):
    """The decoder's attention; `turn` rotates q and k, `norm_last` puts the norms behind it."""

    norm_last = False
    turn = staticmethod(rotate)

    def forward(self, x: Tensor, rope: Any, visible: Tensor, cache: tuple[Tensor, Tensor], name: str, tap: Any) -> Tensor:
        """As `decoder.Attention.forward`."""
        heads = (1, x.shape[1], -1, self.head_dim)
        q, k = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads)
        norms = (lambda q: q, lambda k: k) if self.norm_last else (self.q_norm, self.k_norm)
        last = (self.q_norm, self.k_norm) if self.norm_last else (lambda q: q, lambda k: k)
        q, k = batched(tap, f"{name}.q_norm", norms[0](q)), batched(tap, f"{name}.k_norm", norms[1](k))
        v = batched(tap, f"{name}.v", self.v_proj(x).reshape(heads))
        q = batched(tap, f"{name}.q_rope", last[0](self.turn(q, *rope))).transpose(1, 2)
        k = batched(tap, f"{name}.k_rope", last[1](self.turn(k, *rope))).transpose(1, 2)
        keys, values = self.recall(cache, k, v.transpose(1, 2), visible)
        context = self.attend(q, keys, values, visible).transpose(1, 2).reshape(1, x.shape[1], -1)
        return batched(tap, f"{name}.out", self.o_proj(batched(tap, f"{name}.context", context)))

    def recall(self, cache: tuple[Tensor, Tensor], k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Write both states, read both back."""
        return self.remember(cache[0], k, visible), self.remember(cache[1], v, visible)


class BentDecoder(decoder.Decoder):
    """The decoder with its masks, tables and additions as methods."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, image_embeds: Tensor, deepstack_embeds: Tensor,
                rope_shift_start: Tensor, rope_shift_amount: Tensor, keyCache: Tensor, valueCache: Tensor) -> Tensor:
        """As `decoder.Decoder.forward`."""
        tap, ids = self.tap, input_ids[0]
        total = position_ids.shape[1]
        place = position_ids[0, total - ids.shape[0]:]
        planes = self.rope.planes(ids, place, rope_shift_start, rope_shift_amount)
        planes = offered(tap, "decoder.positions", planes, lambda whole: whole.T, lambda given: given.T)
        rope, seen = self.rope(planes), self.seen(planes, place, total)
        is_image, slot = ids >= self.vocab, (ids - self.vocab).clamp(0, self.slots - 1)
        x = batched(tap, "decoder.embed", self.mix(self.embed_tokens(ids.clamp(0, self.vocab - 1)), image_embeds, slot,
                                                   is_image)[None])
        for number, layer in enumerate(self.layers):
            name = f"decoder.layers.{number:02d}"
            x = layer(x, self.angles(number, rope, planes), seen, (keyCache, valueCache), name, tap)
            if number < self.deepstack:
                extra = self.extra(number, slot, is_image, deepstack_embeds, place)
                x = batched(tap, f"{name}.deepstack", x + extra[None])
        return batched(tap, "logits", self.lm_head(batched(tap, "decoder.norm", self.norm(x))))

    def seen(self, planes: Tensor, place: Tensor, total: int) -> Tensor:
        """planes [3, S], place [S] -> [S, T] bool: the slots each query sees."""
        return torch.arange(total, dtype=torch.int32)[None] <= place[:, None]

    def mix(self, text: Tensor, image: Tensor, slot: Tensor, is_image: Tensor) -> Tensor:
        """Text rows [S, h] and image rows [N, h] -> [S, h]."""
        return torch.where(is_image[:, None], image[slot], text)

    def angles(self, number: int, rope: tuple[Tensor, Tensor], planes: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin that layer `number` turns by."""
        return rope

    def extra(self, number: int, slot: Tensor, is_image: Tensor, deepstack: Tensor, place: Tensor) -> Tensor:
        """What DeepStack adds after layer `number`, [S, h]."""
        rows = deepstack[slot + number * self.slots]
        return torch.where(is_image[:, None], rows, torch.zeros_like(rows))


class BentVision(vision.Vision):
    """The vision tower with the sources of its mergers as a method."""

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """As `vision.Vision.forward`."""
        tap, streams = self.tap, []
        x = tap("vision.embed", self.patch_embed(patches) + self.positions)
        for number, block in enumerate(self.blocks):
            x = block(x, self.cos, self.sin, f"vision.layers.{number:02d}", tap)
            streams.append(x)
        found = [merger(self.source(streams, number), f"vision.deepstack.{place}", tap)
                 for place, (number, merger) in enumerate(zip(self.taps, self.deepstack_merger_list))]
        return self.finish(self.merger(self.source(streams, len(streams) - 1), "vision.merger", tap), torch.cat(found))

    def source(self, streams: list[Tensor], number: int) -> Tensor:
        """The stream that a merger after block `number` reads."""
        return streams[number]

    def finish(self, image: Tensor, deepstack: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves the tower."""
        return image, deepstack


def bend_attention(graph: Reference, layer: int) -> BentAttention:
    """Attention of one decoder layer, with joints."""
    return _bend(graph.decoder.layers[layer].self_attn, BentAttention)


def bend_decoder(graph: Reference) -> BentDecoder:
    """The decoder, with joints."""
    return _bend(graph.decoder, BentDecoder)


def bend_vision(graph: Reference) -> BentVision:
    """The vision tower, with joints."""
    return _bend(graph.vision, BentVision)


def wrap(thing: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of one object: `around(plain, *arguments)` computes in its place."""
    plain = getattr(thing, name)
    setattr(thing, name, lambda *arguments: around(plain, *arguments))


def rms(graph: Reference, which: str) -> list[RMSNorm]:
    """The decoder's norms whose name ends in `which`."""
    return [module for name, module in graph.decoder.named_modules()
            if isinstance(module, RMSNorm) and name.endswith(which)]


def layer_norms(graph: Reference, which: str = "") -> list[nn.LayerNorm]:
    """The vision tower's norms whose name contains `which`."""
    return [module for name, module in graph.vision.named_modules()
            if isinstance(module, nn.LayerNorm) and which in name]


def _bend(module: nn.Module, kind: type) -> Any:
    module.__class__ = kind
    return module
