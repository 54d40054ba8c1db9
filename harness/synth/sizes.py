"""Geometry of the published sizes, as `config.json` in the hub's layout, and the tensors that such a config has.

Sources: config.json of Qwen/Qwen3-VL-{2B,4B,8B}-Instruct. The ids of special tokens are those of the embedded tiny
checkpoint, whose tokenizer a synthetic checkpoint carries: all its ids lie inside each of these vocabularies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from harness.checkpoint import EMBEDDED, read_json
from harness.errors import HarnessError

LANGUAGE, VISUAL = "model.language_model.", "model.visual."
REAL_TEXT = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
             "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}}
TOWER_24 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "deepstack_visual_indexes": [5, 11, 17]}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "2b": {"text": {"num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 6144},
           "vision": TOWER_24, "tied": True},
    "4b": {"text": {"num_hidden_layers": 36, "hidden_size": 2560, "num_attention_heads": 32, "intermediate_size": 9728},
           "vision": TOWER_24, "tied": True},
    "8b": {"text": {"num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 12288},
           "vision": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                      "deepstack_visual_indexes": [8, 16, 24]}, "tied": False},
}


def config_of(size: str, layers: int | None = None, vision_layers: int | None = None) -> dict[str, Any]:
    """config.json of a size, or of the same widths with fewer layers.

    Where DeepStack's taps do not fit a shortened tower, its first blocks are tapped, at most one for each decoder layer.
    Raises HarnessError for an unknown size or a count below 1.
    """
    if size not in SIZES:
        raise HarnessError(f"no size {size!r}", where="--size", fix=f"known are {', '.join(SIZES)}")
    for name, count in (("--layers", layers), ("--vision-layers", vision_layers)):
        if count is not None and count < 1:
            raise HarnessError(f"{count} layers", where=name, fix="give 1 or more")
    config, of = copy.deepcopy(read_json(EMBEDDED / "config.json")), SIZES[size]
    text, vision = config["text_config"], config["vision_config"]
    if of:
        text |= REAL_TEXT | of["text"]
        vision |= of["vision"] | {"out_hidden_size": text["hidden_size"]}
        config["tie_word_embeddings"] = of["tied"]
        text |= {"tie_word_embeddings": True} if of["tied"] else {}  # transformers 4.57 reads it here
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    vision["depth"] = vision_layers or vision["depth"]
    taps = list(vision["deepstack_visual_indexes"])
    if taps[-1] >= vision["depth"] or len(taps) > text["num_hidden_layers"]:
        vision["deepstack_visual_indexes"] = list(range(min(len(taps), vision["depth"], text["num_hidden_layers"])))
    return config


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order in which they are written and first used."""
    text = config["text_config"]
    yield f"{LANGUAGE}embed_tokens.weight", (text["vocab_size"], text["hidden_size"])
    yield from _vision(config["vision_config"])
    for layer in range(text["num_hidden_layers"]):
        yield from ((f"{LANGUAGE}layers.{layer}.{name}.weight", shape) for name, shape in _layer(text))
    yield f"{LANGUAGE}norm.weight", (text["hidden_size"],)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (text["vocab_size"], text["hidden_size"])


def _layer(text: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    yield "input_layernorm", (hidden,)
    yield from {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
                "self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}.items()
    yield "post_attention_layernorm", (hidden,)
    yield from {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}.items()


def _vision(vision: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels, wide = vision["hidden_size"], vision["intermediate_size"]
    joined = channels * vision["spatial_merge_size"]**2
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield from _biased("patch_embed.proj", (channels, *patch))
    yield f"{VISUAL}pos_embed.weight", (vision["num_position_embeddings"], channels)
    for layer in range(vision["depth"]):
        for name, shape in {"norm1": (channels,), "attn.qkv": (3 * channels, channels), "attn.proj": (channels, channels),
                            "norm2": (channels,), "mlp.linear_fc1": (wide, channels),
                            "mlp.linear_fc2": (channels, wide)}.items():
            yield from _biased(f"blocks.{layer}.{name}", shape)
    mergers = {f"deepstack_merger_list.{tap}": joined for tap in range(len(vision["deepstack_visual_indexes"]))}
    for name, norm in (mergers | {"merger": channels}).items():
        yield from _biased(f"{name}.norm", (norm,))
        yield from _biased(f"{name}.linear_fc1", (joined, joined))
        yield from _biased(f"{name}.linear_fc2", (vision["out_hidden_size"], joined))


def _biased(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{VISUAL}{name}.weight", shape
    yield f"{VISUAL}{name}.bias", shape[:1]
