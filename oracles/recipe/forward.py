"""The training forward: the stock model's own weights, with a vision tower that is
batched over images of one size (the stock tower loops over images in Python).

evaluate.py uses the stock forward, so a mistake here would show there.
"""

import torch
from torch.nn import functional

import scenes

PATCH = 16


def _merge_order(tensor):
    """(N, D, h, w) to (N, h*w, D) in the 2x2 block order of the processor."""
    n, d, h, w = tensor.shape
    return tensor.view(n, d, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, d)


def _resampled(tower, h, w):
    """The learned position grid at h x w, bilinear with aligned corners, as the stock tower does."""
    side = tower.num_grid_per_side
    grid = tower.pos_embed.weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    return _merge_order(functional.interpolate(grid, (h, w), mode="bilinear", align_corners=True))


def _rotary(h, w, head, device):
    lanes = torch.arange(0, head // 2, 2, device=device).float() / (head // 2)
    frequency = 10000.0**-lanes
    ys = torch.arange(h, device=device).view(1, 1, h, 1).expand(1, 1, h, w)
    xs = torch.arange(w, device=device).view(1, 1, 1, w).expand(1, 1, h, w)
    angles = torch.cat([_merge_order(axis).float() * frequency for axis in (ys, xs)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _working_type(device):
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def vision(tower, image):
    """Image tokens and the deepstack taps of (N, 3, H, W) uint8 pictures."""
    embed = tower.patch_embed.proj
    # A still image is its frame twice, so the two temporal halves of the kernel add up.
    kernel = embed.weight.sum(2).flatten(1)
    n, h, w = image.shape[0], image.shape[2] // PATCH, image.shape[3] // PATCH
    patches = image.view(n, 3, h // 2, 2, PATCH, w // 2, 2, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = patches.reshape(n, h * w, 3 * PATCH * PATCH).to(_working_type(image.device.type))
    hidden = functional.linear(patches / 127.5 - 1, kernel, embed.bias).float() + _resampled(tower, h, w)
    heads = tower.blocks[0].attn.num_heads
    cos, sin = _rotary(h, w, hidden.shape[-1] // heads, image.device)
    taps = []
    for index, block in enumerate(tower.blocks):
        qkv = block.attn.qkv(block.norm1(hidden)).view(n, h * w, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (_rotate(part, cos, sin).to(qkv.dtype) for part in qkv[:2])
        mixed = functional.scaled_dot_product_attention(q, k, qkv[2])
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(n, h * w, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
        if index in tower.deepstack_visual_indexes:
            taps.append(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)](hidden))
    return tower.merger(hidden), taps


def _add_tap(hidden, shown, tap):
    """The stock _deepstack_process without its indexed assignment, whose backward is slow."""
    return hidden + torch.zeros_like(hidden).masked_scatter(shown[..., None], tap.to(hidden.dtype))


def losses(model, batch, image_id):
    """Mean cross-entropy over the learned tokens of the conversations, and of the texts."""
    image = scenes.draw(batch["scenes"], batch["width"], batch["height"])
    merged, taps = vision(model.model.visual, image)
    text = model.model.language_model
    text._deepstack_process = _add_tap
    shown = batch["ids"] == image_id
    embedded = text.embed_tokens(batch["ids"])
    embedded = embedded.masked_scatter(shown[..., None], merged.to(embedded.dtype))
    hidden = text(
        inputs_embeds=embedded,
        position_ids=batch["positions"],
        visual_pos_masks=shown,
        deepstack_visual_embeds=[tap.reshape(-1, tap.shape[-1]) for tap in taps],
        use_cache=False,
    ).last_hidden_state[:, :-1]
    results = []
    for rows in (slice(None, batch["talks"]), slice(batch["talks"], None)):
        labels = batch["labels"][rows, 1:]
        learned = labels >= 0
        logits = model.lm_head(hidden[rows][learned]).float()
        results.append(functional.cross_entropy(logits, labels[learned]))
    return results
