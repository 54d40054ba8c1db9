"""Vision: patches, interpolated positions, 2-D rotation, the order of patches and what the mergers read."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from harness.faults import fault
from harness.faults.hands import bend_vision, wrap
from harness.graph.norms import inverse_frequencies
from harness.graph.reference import Reference
from harness.graph.vision import block_major

EMBED, FIRST, TURN = "vision.embed", "vision.layers.00", "attn.q_rope|attn.k_rope"


def _table(graph: Reference) -> torch.Tensor:
    """The learned positions as an image [1, C, side, side]."""
    table = graph._positions.float()
    side = round(len(table) ** 0.5)
    return table.T.reshape(1, -1, side, side)


def _ordered(graph: Reference, image: torch.Tensor) -> torch.Tensor:
    """[1, C, rows, columns] -> [P, C], block-major."""
    place = block_major(*graph.grid, graph.geometry.merge)
    return image[0][:, place[:, 0], place[:, 1]].T.contiguous()


@fault("graph", "contract|vision", EMBED, source="V01")
def corners_not_aligned(graph: Reference) -> None:
    """positions resampled with align_corners=False"""
    graph.vision.positions.data = _ordered(graph, F.interpolate(_table(graph), graph.grid, mode="bilinear"))


@fault("graph", "contract|vision", EMBED)
def positions_resampled_bicubic(graph: Reference) -> None:
    """positions resampled by cubic convolution"""
    graph.vision.positions.data = _ordered(graph, F.interpolate(_table(graph), graph.grid, mode="bicubic",
                                                                align_corners=True))


@fault("graph", "contract|vision", EMBED, source="V03")
def positions_in_raster_order(graph: Reference) -> None:
    """positions row by row where the tower works block by block"""
    image = F.interpolate(_table(graph), graph.grid, mode="bilinear", align_corners=True)
    graph.vision.positions.data = image[0].flatten(1).T.contiguous()


@fault("graph", "contract|vision", EMBED, source="V12")
def learned_positions_in_bfloat16(graph: Reference) -> None:
    """interpolated positions rounded to bfloat16"""
    graph.vision.positions.data = graph.vision.positions.data.bfloat16().float()


@fault("graph", "contract|vision", EMBED)
def positions_transposed(graph: Reference) -> None:
    """the learned table read with rows and columns exchanged"""
    image = F.interpolate(_table(graph).transpose(2, 3), graph.grid, mode="bilinear", align_corners=True)
    graph.vision.positions.data = _ordered(graph, image)


@fault("graph", "contract", FIRST, TURN, source="V04")
def rotation_in_raster_order(graph: Reference) -> None:
    """vision rotary coordinates row by row, not block by block"""
    rows, columns = graph.grid
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    _turn_by(graph, place)


@fault("graph", "contract", FIRST, TURN, source="V04")
def rotation_axes_exchanged(graph: Reference) -> None:
    """vision rotary turns the row lanes by the column"""
    _turn_by(graph, block_major(*graph.grid, graph.geometry.merge).flip(1))


@fault("graph", "contract", FIRST, TURN, source="V13")
def vision_theta_wrong(graph: Reference) -> None:
    """vision rotary with theta 1e6"""
    _turn_by(graph, block_major(*graph.grid, graph.geometry.merge), theta=1e6)


@fault("graph", "contract", FIRST, TURN, source="V13")
def vision_rotation_missing(graph: Reference) -> None:
    """no rotation in the vision tower"""
    graph.vision.cos, graph.vision.sin = torch.ones_like(graph.vision.cos), torch.zeros_like(graph.vision.sin)


@fault("graph", "contract", FIRST, TURN)
def vision_rotation_in_half(graph: Reference) -> None:
    """vision rotary tables stored in fp16"""
    graph.vision.cos, graph.vision.sin = graph.vision.cos.half().float(), graph.vision.sin.half().float()


def _turn_by(graph: Reference, place: torch.Tensor, theta: float = 1e4) -> None:
    size = graph.geometry.vision_hidden // graph.geometry.vision_heads
    angles = (place.float()[:, :, None] * inverse_frequencies(theta, size // 4)).flatten(1)
    angles = torch.cat([angles, angles], -1)
    graph.vision.cos, graph.vision.sin = angles.cos(), angles.sin()


@fault("graph", "contract|vision", EMBED, source="V06")
def patch_channels_last(graph: Reference) -> None:
    """patch features taken as (time, y, x, colour)"""
    geometry = graph.geometry
    shape = (-1, geometry.temporal_patch, geometry.patch, geometry.patch, geometry.channels)
    wrap(graph.vision.patch_embed, "forward",
         lambda plain, patches: plain(patches.reshape(shape).permute(0, 4, 1, 2, 3).reshape(patches.shape)))


@fault("graph", "contract|vision", EMBED)
def colours_reversed(graph: Reference) -> None:
    """blue, green, red inside the tower"""
    geometry = graph.geometry
    wrap(graph.vision.patch_embed, "forward",
         lambda plain, patches: plain(patches.reshape(len(patches), geometry.channels, -1).flip(1).reshape(patches.shape)))


@fault("graph", "vision", "vision.merger|vision.deepstack.0", source="V07")
def neighbours_transposed(graph: Reference) -> None:
    """the four patches of a block joined column by column"""
    for merger in (graph.vision.merger, *graph.vision.deepstack_merger_list):
        wrap(merger, "forward", lambda plain, x, name, tap: plain(
            x.reshape(-1, 2, 2, x.shape[-1]).transpose(1, 2).reshape(x.shape), name, tap))


@fault("graph", "vision", "vision.merger", source="V15")
def merger_reads_the_block_before(graph: Reference) -> None:
    """the main merger reads the last block but one"""
    tower = bend_vision(graph)
    last = len(tower.blocks) - 1
    tower.source = lambda streams, number: streams[number - 1 if number == last else number]


@fault("graph", "vision", "vision.layers.02", "output|attn.out|mlp.out")
def residual_lost(graph: Reference) -> None:
    """one vision block forgets its second residual addition"""
    block = graph.vision.blocks[2]

    def forward(x, cos, sin, name, tap):
        x = x + block.attn(tap(f"{name}.norm1", block.norm1(x)), cos, sin, f"{name}.attn", tap)
        return tap(name, block.mlp(tap(f"{name}.norm2", block.norm2(x)), f"{name}.mlp", tap))

    block.forward = forward


@fault("graph", "vision", "vision.layers.01", "attn.q_rope|attn.k_rope|attn.v", source="V13")
def fused_projection_by_head(graph: Reference) -> None:
    """q, k and v taken head by head out of a matrix that holds them one after the other"""
    attention = graph.vision.blocks[1].attn
    size, heads = attention.proj.in_features // attention.heads, attention.heads
    wrap(attention.qkv, "forward", lambda plain, x: plain(x).reshape(-1, heads, 3, size).transpose(1, 2).flatten(1))


@fault("graph", "contract|vision", EMBED, source="V15")
def embedding_normalised_first(graph: Reference) -> None:
    """patch embeddings scaled before the positions are added"""
    wrap(graph.vision.patch_embed, "forward", lambda plain, patches: plain(patches) * 1.02)


@fault("graph", "none", "none", equivalent=True, source="B12")
def vision_coordinates_from_one(graph: Reference) -> None:
    """rows and columns of the vision rotation counted from one"""
    _turn_by(graph, block_major(*graph.grid, graph.geometry.merge) + 1)


@fault("graph", "none", "none", equivalent=True, source="B07")
def patch_kernel_folded(graph: Reference) -> None:
    """both temporal slices of the kernel summed at run time, for a still image"""
    geometry, linear = graph.geometry, graph.vision.patch_embed.proj
    shape = (-1, geometry.channels, geometry.temporal_patch, geometry.patch**2)
    linear.forward = lambda x: F.linear(x.reshape(shape)[:, :, 0].flatten(1),
                                        linear.weight.reshape(shape).sum(2).flatten(1), linear.bias)
