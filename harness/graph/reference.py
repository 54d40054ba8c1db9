"""Our own conversion of a checkpoint: both towers, loaded strictly; the default of `--graph`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.checkpoint import Checkpoint, open_checkpoint
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.graph.decoder import Decoder
from harness.graph.norms import cast_weights
from harness.graph.protocol import Tap, untapped
from harness.graph.vision import Vision, interpolate_positions
from harness.trace import decoder_seams, vision_seams

TEXT, VISION = "model.language_model.", "model.visual."
HEAD, EMBEDDING = "lm_head.weight", TEXT + "embed_tokens.weight"
PATCH, POSITIONS = VISION + "patch_embed.proj.weight", VISION + "pos_embed.weight"
LARGE = 4 << 30
"""Bytes of weights in float32 from which on they are not held in memory."""


class Reference:
    """Satisfies `harness.graph.protocol.Conversion`; computes in float32 with the weights given, by checkpoint name.

    Weights in fp16 are rounded where an export rounds them (baked positions included) and then widened: that is a twin.
    Raises HarnessError where a tensor is missing, left over, or of another shape than the config says.
    """

    injectable = True
    streams = False
    """Whether calls are best made together: each reads all weights."""

    def __init__(self, geometry: Geometry, grid: tuple[int, int], weights: Mapping[str, Tensor]) -> None:
        self.geometry, self.grid = geometry, grid
        self._positions = weights.get(POSITIONS)
        towers = build_towers(geometry, grid, weights)
        self.vision, self.decoder = (cast_weights(tower, torch.float32) for tower in towers)
        self.slots = self.decoder.slots

    def seams(self) -> tuple[str, ...]:
        """All seams, the inside of every layer included, and the integer planes `decoder.positions` [S, 3]."""
        return (*vision_seams(self.geometry, inside=True), "decoder.positions",
                *decoder_seams(self.geometry, inside=True))

    def tensors(self) -> Mapping[str, Tensor]:
        """Weights by checkpoint name, in the checkpoint's shapes."""
        held = {checkpoint_name(TEXT, name): value for name, value in self.decoder.named_parameters()}
        held |= {VISION + name: value for name, value in self.vision.named_parameters() if name != "positions"}
        geometry = self.geometry
        held[PATCH] = held[PATCH].reshape(-1, geometry.channels, geometry.temporal_patch, geometry.patch, geometry.patch)
        held[POSITIONS] = self._positions
        return {name: value.detach() for name, value in held.items()}

    @torch.no_grad()
    def encode(self, patches: Tensor, tap: Tap = untapped) -> tuple[Tensor, Tensor]:
        """See the protocol."""
        self.vision.tap = tap
        return self.vision(patches)

    @torch.no_grad()
    def decode(self, input_ids: Tensor, position_ids: Tensor, image_embeds: Tensor, deepstack_embeds: Tensor,
               rope_shift_start: Tensor, rope_shift_amount: Tensor, cache: tuple[Tensor, Tensor],
               tap: Tap = untapped) -> Tensor:
        """See the protocol."""
        self.decoder.tap = tap
        return self.decoder(input_ids, position_ids, image_embeds, deepstack_embeds, rope_shift_start,
                            rope_shift_amount, *cache)


def factory(checkpoint: Path, grid: tuple[int, int]) -> Reference:
    """What `--graph harness.graph.reference:factory` calls; a checkpoint too large for that is not held in memory."""
    source = open_checkpoint(checkpoint)
    if large(source):
        from harness.graph.streamed import StreamedReference  # which is made of this module

        return StreamedReference(source, grid)
    return Reference(source.geometry, grid, {name: tensor.float() for name, tensor in source.tensors()})


def large(checkpoint: Checkpoint) -> bool:
    """Whether its weights are too large to be held in float32."""
    return checkpoint.weight_bytes() > LARGE


def checkpoint_name(prefix: str, name: str) -> str:
    """Parameter name of a tower -> checkpoint name; the head stands at the root."""
    return name if name == HEAD else prefix + name


def build_towers(geometry: Geometry, grid: tuple[int, int], weights: Mapping[str, Tensor]) -> tuple[Vision, Decoder]:
    """Both towers with the checkpoint's weights, by checkpoint name; every tensor is consumed, none invented."""
    weights = _resolve_head(dict(weights), geometry)
    expect_names(weights, geometry)
    with torch.device("meta"):
        vision, decoder = Vision(geometry, grid), Decoder(geometry, (grid[0] // geometry.merge, grid[1] // geometry.merge))
    patch = weights.pop(PATCH)
    weights[PATCH] = patch.reshape(patch.shape[0], -1)
    table = weights.pop(POSITIONS)
    weights[VISION + "positions"] = interpolate_positions(table, *grid, geometry.merge).to(table.dtype)
    _fill(vision, {name.removeprefix(VISION): value for name, value in weights.items() if name.startswith(VISION)})
    _fill(decoder, {name.removeprefix(TEXT): value for name, value in weights.items() if not name.startswith(VISION)})
    if geometry.tied:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return vision.eval(), decoder.eval()


def _resolve_head(weights: dict[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """A tied head may be stored again if it equals the embedding; an untied one must be there."""
    if geometry.tied and EMBEDDING in weights:
        same_head(weights.setdefault(HEAD, weights[EMBEDDING]), weights[EMBEDDING])
    return weights


def same_head(head: Tensor, embedding: Tensor) -> None:
    """Raises HarnessError where the head that a tied checkpoint stores is not its embedding."""
    if not torch.equal(head, embedding):
        raise HarnessError("differs from the embedding, though the config says tie_word_embeddings", where=HEAD)


def expect_names(names: Collection[str], geometry: Geometry) -> None:
    """Raises HarnessError where a tensor is missing, or has no place in the towers. `names` holds the head in any case."""
    with torch.device("meta"):
        side = 2 * geometry.merge
        vision, decoder = Vision(geometry, (side, side)), Decoder(geometry, (2, 2))
    expected = {VISION + name for name in vision.state_dict() if name != "positions"} | {POSITIONS, HEAD}
    expected |= {checkpoint_name(TEXT, name) for name in decoder.state_dict()}
    missing, extra = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing:
        raise HarnessError(f"{len(missing)} tensors are missing from the checkpoint", where=missing[0])
    if extra:
        raise HarnessError(f"{len(extra)} tensors of the checkpoint have no place in the graph", where=extra[0])


def _fill(tower: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in tower.named_parameters(remove_duplicate=False):
        if weights[name].shape != parameter.shape:
            raise HarnessError(f"has shape {tuple(weights[name].shape)}, the config asks for {tuple(parameter.shape)}",
                               where=name)
    tower.load_state_dict(weights, strict=True, assign=True)
