"""Write the model's configuration files, in the layout of the hub (transformers 4.57),
which 4.57 and 5.x both read.

    python config.py OUT_DIR [VISION_WIDTH]

Needs the tokenizer files to be in OUT_DIR, for the ids of the special tokens.
"""

import json
import sys
from pathlib import Path

VISION_WIDTH = 48
HEAD = 16  # of the vision tower; a multiple of 4, as its two-axis rotary needs
TEXT_WIDTH = 64


def model_config(ids, vision_width=VISION_WIDTH):
    """config.json: every feature of Qwen3-VL-8B, each width as small as learns."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "dtype": "bfloat16",
            "eos_token_id": ids["<|im_end|>"],
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": TEXT_WIDTH,
            "initializer_range": 0.02,
            "intermediate_size": 192,
            "max_position_embeddings": 4096,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 512,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [0, 1, 2],
            "depth": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_width,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 3 * vision_width,
            "model_type": "qwen3_vl",
            "num_heads": vision_width // HEAD,
            "num_position_embeddings": 2304,
            "out_hidden_size": TEXT_WIDTH,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def generation_config(ids):
    """generation_config.json: greedy, since the checkpoint exists to be compared."""
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "transformers_version": "4.57.1",
    }


def preprocessor_config(kind, smallest, largest):
    """The image (or video) preprocessor's file; sizes are pixel counts."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 16,
        "processor_class": "Qwen3VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": largest, "shortest_edge": smallest},
        "temporal_patch_size": 2,
        **kind,
    }


def write(directory, vision_width=VISION_WIDTH):
    """Write the four files."""
    tokens = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    # 128x128 up to 1024x1024 pass unresized when both sides are multiples of 32.
    files = {
        "config.json": model_config(ids, vision_width),
        "generation_config.json": generation_config(ids),
        "preprocessor_config.json": preprocessor_config(
            # 4.57.1's Pillow processor ignores "size" and reads these two instead.
            {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 1024 * 1024, "min_pixels": 128 * 128},
            128 * 128, 1024 * 1024,
        ),
        "video_preprocessor_config.json": preprocessor_config(
            {"video_processor_type": "Qwen3VLVideoProcessor"}, 128 * 128, 4 * 1024 * 1024
        ),
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), *(int(width) for width in sys.argv[2:]))
