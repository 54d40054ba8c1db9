"""From names that rungs use to the block and the op they speak of: a tensor, an inside seam and a cache row are one place."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

_TENSORS = (
    (r"model\.language_model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(.*?)(?:\.weight|\.bias)?", "decoder.layers.{:02d}"),
    (r"model\.visual\.blocks\.(\d+)\.(?:attn\.|mlp\.)?(.*?)(?:\.weight|\.bias)?", "vision.layers.{:02d}"),
    (r"model\.visual\.deepstack_merger_list\.(\d+)\.(.*?)(?:\.weight|\.bias)?", "vision.deepstack.{:d}"),
    (r"kv\.(?:keys|values)\.(\d+)()", "decoder.layers.{:02d}"),
    (r"(?:decoder\.layers\.(\d+)\.deepstack|deepstack\.(\d+))", "decoder.deepstack.{:d}"),
    (r"(?:decoder|vision)\.layers\.(\d+)(?:\.(.*))?", None),
    (r"vision\.deepstack\.(\d+)(?:\.(.*))?", "vision.deepstack.{:d}"))
_NAMED = {"model.visual.merger": "vision.merger", "vision.merger": "vision.merger",
          "model.visual.patch_embed": "vision.embed", "model.visual.pos_embed": "vision.embed",
          "model.language_model.embed_tokens": "decoder.embed", "model.language_model.norm": "decoder.norm",
          "lm_head": "logits"}


def block(seam: str) -> str:
    """The block that a tensor, seam or cache row belongs to; any other name is its own block."""
    for pattern, name in _TENSORS:
        match = re.fullmatch(pattern, seam)
        if match:
            number = int(next(group for group in match.groups() if group and group.isdigit()))
            return name.format(number) if name else f"{seam.split('.')[0]}.layers.{number:02d}"
    return next((name for prefix, name in _NAMED.items() if seam.startswith(prefix + ".") or seam == prefix), seam)


def op(seam: str) -> str:
    """What of its block a name speaks of: `q_proj`, `attn.q_rope`, `keys`; the whole name where it has no block."""
    for pattern, _ in _TENSORS:
        match = re.fullmatch(pattern, seam)
        if match and seam.startswith("kv."):
            return seam.split(".")[1]
        if match:
            return next((group for group in match.groups()[1:] if group and not group.isdigit()), "") or "output"
    prefix = next((prefix for prefix in _NAMED if seam.startswith(prefix + ".")), None)
    return seam.removeprefix(prefix + ".").removesuffix(".weight").removesuffix(".bias") if prefix else seam


def matches(name: str, patterns: str) -> bool:
    """Whether a name fits one of the patterns, parted by "|"."""
    return any(fnmatchcase(name, pattern) for pattern in patterns.split("|"))


def same_block(named: str, patterns: str) -> bool:
    """Whether a named seam lies in the block of one of the expected seams."""
    return any(fnmatchcase(block(named), block(pattern)) for pattern in patterns.split("|"))
