"""Vision once more: one axis, one colour, one merger, the last patch, grids that are not square, tiles that do not fit."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from harness.faults import fault
from harness.faults.hands import bend_vision, wrap
from harness.graph.norms import inverse_frequencies, rotate
from harness.graph.reference import Reference
from harness.graph.vision import block_major

EMBED, FIRST, TURN = "vision.embed", "vision.layers.00", "attn.q_rope|attn.k_rope"


def _table(graph: Reference) -> torch.Tensor:
    """The learned positions as an image [1, C, side, side]."""
    side = graph.geometry.position_side
    return graph._positions.float().T.reshape(1, -1, side, side)


def _place(graph: Reference) -> torch.Tensor:
    return block_major(*graph.grid, graph.geometry.merge)


def _bake(graph: Reference, image: torch.Tensor) -> None:
    place = _place(graph)
    graph.vision.positions.data = image[0][:, place[:, 0], place[:, 1]].T.contiguous()


@fault("graph", "contract|vision", EMBED, source="V01")
def corners_not_aligned_downwards(graph: Reference) -> None:
    """positions resampled without aligned corners along the rows only"""
    rows, columns = graph.grid
    across = F.interpolate(_table(graph), (graph.geometry.position_side, columns), mode="bilinear", align_corners=True)
    _bake(graph, F.interpolate(across, (rows, columns), mode="bilinear"))


@fault("graph", "contract|vision", EMBED, source="V01")
def positions_of_the_nearest(graph: Reference) -> None:
    """positions taken from the nearest row of the table"""
    rows, columns = graph.grid
    side = graph.geometry.position_side - 1
    pick = (torch.linspace(0, side, rows).round().long()[:, None], torch.linspace(0, side, columns).round().long()[None])
    _bake(graph, _table(graph)[:, :, pick[0], pick[1]])


@fault("graph", "contract|vision", EMBED, source="V12")
def interpolation_in_half(graph: Reference) -> None:
    """positions interpolated in fp16"""
    graph.vision.positions.data = graph.vision.positions.data.half().float()


@fault("graph", "contract|vision", EMBED, source="W13")
def last_position_repeats(graph: Reference) -> None:
    """the last patch takes the position of the patch before it"""
    graph.vision.positions.data[-1] = graph.vision.positions.data[-2].clone()


@fault("graph", "contract|vision", EMBED, source="V03")
def positions_transposed_where_not_square(graph: Reference) -> None:
    """positions baked for columns x rows where the grid is not square"""
    rows, columns = graph.grid
    if rows != columns:
        image = F.interpolate(_table(graph), (columns, rows), mode="bilinear", align_corners=True)
        _bake(graph, image.reshape(1, -1, rows, columns))


@fault("graph", "contract|vision", EMBED)
def positions_upside_down(graph: Reference) -> None:
    """the learned table read from its last row"""
    image = F.interpolate(_table(graph).flip(2), graph.grid, mode="bilinear", align_corners=True)
    _bake(graph, image)


def _turn_by(graph: Reference, place: torch.Tensor, theta: float = 1e4) -> None:
    size = graph.geometry.vision_hidden // graph.geometry.vision_heads
    angles = (place.float()[:, :, None] * inverse_frequencies(theta, size // 4)).flatten(1)
    angles = torch.cat([angles, angles], -1)
    graph.vision.cos, graph.vision.sin = angles.cos(), angles.sin()


@fault("graph", "contract", FIRST, TURN, source="V13")
def vision_theta_nearly_right(graph: Reference) -> None:
    """vision rotary with theta 10001"""
    _turn_by(graph, _place(graph), theta=10001.0)


@fault("graph", "contract", FIRST, TURN, source="V04")
def rotation_by_merged_rows(graph: Reference) -> None:
    """vision rotary turns the row lanes by the row of the 2x2 block"""
    place = _place(graph).clone()
    place[:, 0] //= 2
    _turn_by(graph, place)


@fault("graph", "contract", FIRST, TURN, source="V13")
def vision_lanes_interleaved(graph: Reference) -> None:
    """row and column lanes alternate instead of lying half by half"""
    for name in ("cos", "sin"):
        table = getattr(graph.vision, name)
        quarters = table.shape[1] // 4
        setattr(graph.vision, name, table.reshape(len(table), 2, 2, quarters).transpose(2, 3).reshape(table.shape))


@fault("graph", "contract", FIRST, TURN, source="P12")
def slowest_vision_lane_stands(graph: Reference) -> None:
    """the slowest column lane of the vision rotary stands still"""
    size = graph.vision.cos.shape[1]
    for lane in (size // 2 - 1, size - 1):
        graph.vision.cos[:, lane], graph.vision.sin[:, lane] = 1, 0


@fault("graph", "contract", FIRST, TURN, source="V04")
def last_patch_turned_as_the_first(graph: Reference) -> None:
    """the rotary row of the last patch is that of the first"""
    graph.vision.cos[-1], graph.vision.sin[-1] = graph.vision.cos[0].clone(), graph.vision.sin[0].clone()


@fault("graph", "contract|vision", "vision.layers.03", "attn.k_rope", source="V13")
def keys_not_turned_in_one_block(graph: Reference) -> None:
    """the last vision block rotates queries only"""
    attention = graph.vision.blocks[3].attn

    def forward(x, cos, sin, name, tap):
        q, k, v = attention.qkv(x).reshape(x.shape[0], 3, attention.heads, -1).unbind(1)
        q, k = tap(f"{name}.q_rope", rotate(q, cos[:, None], sin[:, None])), tap(f"{name}.k_rope", k)
        v = tap(f"{name}.v", v)
        context = attention.attend(*(part.transpose(0, 1) for part in (q, k, v))).transpose(0, 1).reshape(x.shape[0], -1)
        return tap(f"{name}.out", attention.proj(tap(f"{name}.context", context)))

    attention.forward = forward


@fault("graph", "contract|vision", EMBED, source="V06")
def blue_patch_transposed(graph: Reference) -> None:
    """x and y of a patch exchanged in one colour"""
    geometry = graph.geometry
    shape = (-1, geometry.channels, geometry.temporal_patch, geometry.patch, geometry.patch)

    def around(plain, patches):
        held = patches.reshape(shape).clone()
        held[:, 2] = held[:, 2].transpose(-1, -2).clone()
        return plain(held.reshape(patches.shape))

    wrap(graph.vision.patch_embed, "forward", around)


@fault("graph", "contract|vision", EMBED, source="V12")
def patches_in_bfloat16(graph: Reference) -> None:
    """patches rounded to bfloat16 before they are embedded"""
    wrap(graph.vision.patch_embed, "forward", lambda plain, patches: plain(patches.bfloat16().float()))


@fault("graph", "vision", "vision.deepstack.1", source="V07")
def neighbours_transposed_in_one_merger(graph: Reference) -> None:
    """one DeepStack merger joins its four patches column by column"""
    wrap(graph.vision.deepstack_merger_list[1], "forward", lambda plain, x, name, tap: plain(
        x.reshape(-1, 2, 2, x.shape[-1]).transpose(1, 2).reshape(x.shape), name, tap))


@fault("graph", "vision", "vision.merger", source="V07")
def neighbours_reversed_in_the_main_merger(graph: Reference) -> None:
    """the main merger joins its four patches from the last"""
    wrap(graph.vision.merger, "forward", lambda plain, x, name, tap: plain(
        x.reshape(-1, 4, x.shape[-1]).flip(1).reshape(x.shape), name, tap))


@fault("graph", "vision", "vision.layers.01")
def blocks_run_in_another_order(graph: Reference) -> None:
    """the second and third vision block run in each other's place"""
    blocks = graph.vision.blocks
    first, second = blocks[1].forward, blocks[2].forward
    blocks[1].forward, blocks[2].forward = second, first


@fault("graph", "vision", "vision.layers.00", "output|attn.out|norm2")
def residual_of_the_normed(graph: Reference) -> None:
    """the first vision block adds its attention to the normed input"""
    block = graph.vision.blocks[0]

    def forward(x, cos, sin, name, tap):
        x = tap(f"{name}.norm1", block.norm1(x))
        x = x + block.attn(x, cos, sin, f"{name}.attn", tap)
        return tap(name, x + block.mlp(tap(f"{name}.norm2", block.norm2(x)), f"{name}.mlp", tap))

    block.forward = forward


@fault("graph", "vision", "vision.deepstack.2", source="V15")
def last_tap_one_block_early(graph: Reference) -> None:
    """the last DeepStack merger reads the block before its own"""
    tower = bend_vision(graph)
    tower.source = lambda streams, number: streams[number - (number == 2)]


@fault("graph", "vision", "vision.layers.02", TURN + "|attn.context")
def queries_and_keys_exchanged(graph: Reference) -> None:
    """the fused projection of one block read as k, q, v"""
    attention = graph.vision.blocks[2].attn
    wrap(attention.qkv, "forward", lambda plain, x: torch.cat([plain(x).chunk(3, -1)[part] for part in (1, 0, 2)], -1))


@fault("graph", "vision|contract", "vision.layers.01", "attn.context", source="A18")
def queries_behind_the_last_whole_tile(graph: Reference) -> None:
    """a vision kernel in tiles of 256 queries leaves the remainder zero"""
    def attend(plain, q, k, v):
        made = plain(q, k, v).clone()
        made[:, q.shape[1] // 256 * 256:] *= q.shape[1] < 256
        return made

    wrap(graph.vision.blocks[1].attn, "attend", attend)


@fault("graph", "vision", "vision.deepstack.0", "output", source="E07")
def merger_bias_not_added(graph: Reference) -> None:
    """one DeepStack merger holds its output bias and does not add it"""
    linear = graph.vision.deepstack_merger_list[0].linear_fc2
    linear.forward = lambda x: F.linear(x, linear.weight)
