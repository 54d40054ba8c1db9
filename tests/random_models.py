"""Tiny random Qwen3-VL checkpoints on disk, tied and untied, as the hub writes them; no transformers needed.

Norm weights and biases are not constant, so that a lost or swapped one shows. The special tokens and the tokenizer
files are those of the embedded checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from harness.checkpoint import EMBEDDED

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json",
                   "preprocessor_config.json", "video_preprocessor_config.json")


def write_checkpoint(root: Path, *, tied: bool = False, seed: int = 0, layers: int = 4, dtype: str = "float32",
                     **overrides: int) -> Path:
    """Write config.json, model.safetensors and the tokenizer into `root` and return it.

    `overrides` change keys of text_config (`vocab_size`, `max_position_embeddings`, ...).
    """
    root.mkdir(parents=True, exist_ok=True)
    config = hub_config(tied, layers, **overrides)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _draw(name, shape, generator).to(getattr(torch, dtype)) for name, shape in shapes(config)}
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    (root / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / name, root / name)
    return root


def hub_config(tied: bool, layers: int, **overrides: int) -> dict:
    """config.json in the layout of transformers 4.57, which 5.x reads too."""
    special = {token["content"]: token["id"]
               for token in json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]}
    text = {
        "attention_bias": False, "attention_dropout": 0.0, "dtype": "float32", "head_dim": 32, "hidden_act": "silu",
        "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 2048,
        "model_type": "qwen3_vl_text", "num_attention_heads": 4, "num_hidden_layers": layers,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 5000000, "tie_word_embeddings": tied,
        "use_cache": True, "vocab_size": 512,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"}, **overrides}
    vision = {
        "deepstack_visual_indexes": [0, 1, 2], "depth": 4, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 48, "model_type": "qwen3_vl", "num_heads": 2,
        "num_position_embeddings": 64, "out_hidden_size": text["hidden_size"], "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "text_config": text,
            "vision_config": vision, "tie_word_embeddings": tied, "transformers_version": "4.57.1",
            "image_token_id": special["<|image_pad|>"], "video_token_id": special["<|video_pad|>"],
            "vision_start_token_id": special["<|vision_start|>"], "vision_end_token_id": special["<|vision_end|>"]}


def shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3-VL checkpoint."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, width, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    yield "model.language_model.embed_tokens.weight", (text["vocab_size"], hidden)
    for layer in range(text["num_hidden_layers"]):
        block = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                 "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
                 "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
                 "self_attn.q_norm": (head,), "self_attn.k_norm": (head,), "mlp.gate_proj": (width, hidden),
                 "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
        for name, shape in block.items():
            yield f"model.language_model.layers.{layer}.{name}.weight", shape
    yield "model.language_model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (text["vocab_size"], hidden)
    yield from _vision_shapes(vision)


def _vision_shapes(vision: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels, wide = vision["hidden_size"], vision["intermediate_size"]
    merged = channels * vision["spatial_merge_size"]**2
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield "model.visual.pos_embed.weight", (vision["num_position_embeddings"], channels)
    yield from _biased("model.visual.patch_embed.proj", (channels, *patch))
    for layer in range(vision["depth"]):
        for name, shape in {"norm1": (channels,), "norm2": (channels,), "attn.qkv": (3 * channels, channels),
                            "attn.proj": (channels, channels), "mlp.linear_fc1": (wide, channels),
                            "mlp.linear_fc2": (channels, wide)}.items():
            yield from _biased(f"model.visual.blocks.{layer}.{name}", shape)
    mergers = {"merger": channels}
    mergers |= {f"deepstack_merger_list.{tap}": merged for tap in range(len(vision["deepstack_visual_indexes"]))}
    for name, norm in mergers.items():
        yield from _biased(f"model.visual.{name}.norm", (norm,))
        yield from _biased(f"model.visual.{name}.linear_fc1", (merged, merged))
        yield from _biased(f"model.visual.{name}.linear_fc2", (vision["out_hidden_size"], merged))


def _biased(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.3 * noise
    if "embed_tokens" in name or "pos_embed" in name:
        return noise
    return 1.5 * noise / noise[0].numel()**0.5
