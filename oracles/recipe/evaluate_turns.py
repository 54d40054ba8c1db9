"""Held-out figures of a second turn: the caption, then each kind of question, as JSON.

    python evaluate_turns.py CHECKPOINT_DIR [SCENES]

The first turn's answer is the true caption; the question is about the scene's first thing.
"""

import json
import sys

import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLForConditionalGeneration

import evaluate
import scenes

FIRST_SEED = 6000


def main(checkpoint, count=32):
    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = Qwen2VLImageProcessor.from_pretrained(checkpoint)
    exact, margins = {}, {}
    for seed in range(FIRST_SEED, FIRST_SEED + int(count)):
        scene = scenes.sample(seed)
        first = evaluate.caption_inputs(tokenizer, processor, [scenes.picture(scene)])
        for kind, (question, answer) in scenes.questions(scene, scene.things[0]).items():
            turn = (
                f"{scenes.caption(scene)}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            )
            ids = torch.cat([first["input_ids"], torch.tensor([tokenizer.encode(turn)])], dim=1)
            inputs = {
                **first, "input_ids": ids, "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            }
            said, gaps = evaluate.greedy(model, inputs, 24)
            exact[kind] = exact.get(kind, 0) + (tokenizer.decode(said[0]) == answer + "<|im_end|>")
            margins.setdefault(kind, []).append(gaps[0])
    print(json.dumps({
        kind: {"scenes": int(count), "exact": exact[kind], **evaluate.spread(margins[kind])} for kind in exact
    }, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
