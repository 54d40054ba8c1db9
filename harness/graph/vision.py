"""The vision tower, re-authored for export: one fixed grid, all positional work baked as constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.graph.norms import inverse_frequencies, rotate
from harness.graph.protocol import Tap, untapped

LAYER_NORM_EPS = 1e-6  # HF hard-codes it: `Qwen3VLVisionBlock.norm1`
ROPE_THETA = 10_000.0  # HF `Qwen3VLVisionRotaryEmbedding`


def block_major(height: int, width: int, merge: int) -> Tensor:
    """(row, column) [P, 2] int64 of each patch in the processor's order: merge x merge blocks, row-major inside and out."""
    rows, columns = torch.meshgrid(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1)
    blocks = grid.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.permute(0, 2, 1, 3, 4).reshape(-1, 2)


def interpolate_positions(table: Tensor, height: int, width: int, merge: int) -> Tensor:
    """Learned positions [side^2, C] resampled bilinearly with aligned corners -> [P, C] float32, block-major.

    Row i of `height` reads the table at i * (side - 1) / (height - 1) (HF `fast_pos_embed_interpolate`). The
    coordinates are taken in float64, so that the only rounding is that of the result.
    """
    side = round(table.shape[0]**0.5)

    def axis(count: int) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.arange(count, dtype=torch.float64) * (side - 1) / max(count - 1, 1)
        low = place.floor().long()
        return low, (low + 1).clamp(max=side - 1), place - low

    place = block_major(height, width, merge)
    top, bottom, down = (part[place[:, 0]] for part in axis(height))
    left, right, across = (part[place[:, 1]] for part in axis(width))
    down, across = down[:, None], across[:, None]
    wide = table.double()
    corners = ((1 - down) * (1 - across), wide[top * side + left]), ((1 - down) * across, wide[top * side + right]), (
        down * (1 - across), wide[bottom * side + left]), (down * across, wide[bottom * side + right])
    return sum(weight * value for weight, value in corners).float()


def rotary_tables(height: int, width: int, merge: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [P, head_dim] float32: the first quarter of the lanes turns with the row, the second with the column."""
    frequencies = inverse_frequencies(ROPE_THETA, head_dim // 4)
    angles = (block_major(height, width, merge).float()[:, :, None] * frequencies).reshape(height * width, -1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Full attention over all patches of the image."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (hidden // heads)**-0.5
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, name: str, tap: Tap) -> Tensor:
        """x [P, C] -> [P, C]; cos and sin [P, head_dim] float32."""
        q, k, v = self.qkv(x).reshape(x.shape[0], 3, self.heads, -1).unbind(1)
        q = tap(f"{name}.q_rope", rotate(q, cos[:, None], sin[:, None]))
        k = tap(f"{name}.k_rope", rotate(k, cos[:, None], sin[:, None]))
        v = tap(f"{name}.v", v)
        context = self.attend(*(part.transpose(0, 1) for part in (q, k, v))).transpose(0, 1).reshape(x.shape[0], -1)
        return tap(f"{name}.out", self.proj(tap(f"{name}.context", context)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [heads, P, head_dim] -> [heads, P, head_dim]; softmax in float32."""
        scores = q @ k.transpose(1, 2) * self.scale
        return scores.float().softmax(-1).to(q.dtype) @ v


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU (the blocks; mergers use the exact one)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(hidden, intermediate)
        self.linear_fc2 = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor, name: str, tap: Tap) -> Tensor:
        """x [P, C] -> [P, C]."""
        wide = tap(f"{name}.fc1", self.linear_fc1(x))
        return tap(f"{name}.out", self.linear_fc2(tap(f"{name}.act", F.gelu(wide, approximate="tanh"))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(geometry.vision_hidden, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(geometry.vision_hidden, eps=LAYER_NORM_EPS)
        self.attn = Attention(geometry.vision_hidden, geometry.vision_heads)
        self.mlp = MLP(geometry.vision_hidden, geometry.vision_intermediate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, name: str, tap: Tap) -> Tensor:
        """x [P, C] -> [P, C]."""
        x = x + self.attn(tap(f"{name}.norm1", self.norm1(x)), cos, sin, f"{name}.attn", tap)
        return tap(name, x + self.mlp(tap(f"{name}.norm2", self.norm2(x)), f"{name}.mlp", tap))


class Merger(nn.Module):
    """Joins merge x merge neighbours into one token of the decoder's width.

    The main merger normalises before the join (norm of width C), the DeepStack mergers after it (width 4C).
    """

    def __init__(self, geometry: Geometry, norm_after_join: bool) -> None:
        super().__init__()
        self.joined = geometry.vision_hidden * geometry.merge**2
        self.norm = nn.LayerNorm(self.joined if norm_after_join else geometry.vision_hidden, eps=LAYER_NORM_EPS)
        self.norm_after_join = norm_after_join
        self.linear_fc1 = nn.Linear(self.joined, self.joined)
        self.linear_fc2 = nn.Linear(self.joined, geometry.hidden)

    def forward(self, x: Tensor, name: str, tap: Tap) -> Tensor:
        """x [P, C] -> [N, h]."""
        x = self.norm(x.reshape(-1, self.joined)) if self.norm_after_join else self.norm(x).reshape(-1, self.joined)
        wide = tap(f"{name}.fc1", self.linear_fc1(tap(f"{name}.norm", x)))
        return tap(name, self.linear_fc2(tap(f"{name}.act", F.gelu(wide))))


class PatchEmbed(nn.Module):
    """The Conv3d of HF as a Linear: kernel and stride are equal, so each patch meets each weight once."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.proj = nn.Linear(geometry.patch_features, geometry.vision_hidden)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [P, F] -> [P, C]."""
        return self.proj(patches)


class Vision(nn.Module):
    """patches [P, F] -> image_embeds [N, h], deepstack_embeds [3N, h], for one grid (rows, columns) of patches.

    Raises HarnessError where the grid does not divide into merge x merge blocks.
    """

    def __init__(self, geometry: Geometry, grid: tuple[int, int]) -> None:
        super().__init__()
        if any(side < geometry.merge or side % geometry.merge for side in grid):
            raise HarnessError(f"grid {grid[0]}x{grid[1]} does not divide into {geometry.merge}x{geometry.merge} blocks",
                               where="vision grid", fix="resize the image to multiples of patch x merge")
        self.grid, self.merge, self.taps = grid, geometry.merge, geometry.deepstack_taps
        self.tap: Tap = untapped
        self.patch_embed = PatchEmbed(geometry)
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], geometry.vision_hidden), requires_grad=False)
        self.blocks = nn.ModuleList(Block(geometry) for _ in range(geometry.vision_layers))
        self.merger = Merger(geometry, norm_after_join=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(geometry, True) for _ in self.taps)
        cos, sin = rotary_tables(*grid, geometry.merge, geometry.vision_hidden // geometry.vision_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """patches [P, F] in the dtype of the weights."""
        tap = self.tap
        x = tap("vision.embed", self.patch_embed(patches) + self.positions)
        deepstack = []
        for number, block in enumerate(self.blocks):
            x = block(x, self.cos, self.sin, f"vision.layers.{number:02d}", tap)
            if number in self.taps:
                place = self.taps.index(number)
                deepstack.append(self.deepstack_merger_list[place](x, f"vision.deepstack.{place}", tap))
        return self.merger(x, "vision.merger", tap), torch.cat(deepstack)
