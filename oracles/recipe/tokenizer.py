"""Build the tokenizer files: Qwen's byte-level BPE with a 512-row vocabulary.

    python tokenizer.py OUT_DIR

Writes tokenizer.json, vocab.json, merges.txt, tokenizer_config.json and
chat_template.json. Rows 0..485 are the 256 bytes and the merges, 486..511 are
Qwen's special tokens in Qwen's order.
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import corpus
import scenes

VOCABULARY = 512
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
# Added tokens that Qwen does not flag as special (they are kept when decoding).
PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# 'Describe' is only ever shown in these two halves, so it stays two tokens and the
# 448x448 prompt of the README is 196 + 15 tokens.
CHAT_WORDS = ("user", "assistant", "system", "Des", "cribe", "A this image. A story.")
CHAT_WORDS_WEIGHT = 1500

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif item.type == 'video' or 'video' in item -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in item -%}
{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def _training_lines():
    rng = random.Random(20261123)
    for seed in range(scenes.FIRST_TRAINING_SEED, scenes.FIRST_TRAINING_SEED + 4000):
        scene = scenes.sample(seed)
        yield scenes.caption(scene)
        yield " ".join(scenes.question(scene, rng))
    for _ in range(150):
        yield corpus.document(rng, 12)
    for word in CHAT_WORDS:
        yield from [word] * CHAT_WORDS_WEIGHT


def build():
    """Train the BPE and add the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(PLAIN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_lines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"vocabulary has {tokenizer.get_vocab_size()} rows, not {VOCABULARY}")
    return tokenizer


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write(directory):
    """Write every tokenizer file, in the layout that the hub uses for Qwen3-VL."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    _write_json(directory / "tokenizer_config.json", {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token, "lstrip": False, "normalized": False, "rstrip": False,
                "single_word": False, "special": token in SPECIAL,
            }
            for token in SPECIAL + PLAIN
        },
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    })
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
