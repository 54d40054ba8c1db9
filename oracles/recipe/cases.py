"""Draw the ladder's case images from held-out scenes, and check what the model says of them.

    python cases.py CHECKPOINT_DIR OUT_DIR

Prints one line an image; ends with an error if a caption is not exact.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLForConditionalGeneration

import evaluate
import scenes

CASES = {"scene.png": (5001, 448, 448), "scene_b.png": (5009, 448, 448), "wide.png": (5013, 448, 320)}


def main(checkpoint, out):
    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = Qwen2VLImageProcessor.from_pretrained(checkpoint)
    for name, (seed, width, height) in CASES.items():
        scene = scenes.sample(seed, width, height)
        scenes.picture(scene).save(Path(out) / name)
        inputs = evaluate.caption_inputs(tokenizer, processor, [scenes.picture(scene)])
        ids, margins = evaluate.greedy(model, inputs, 60)
        said = tokenizer.decode(ids[0])
        print(f"{name}: seed {seed}, {width}x{height}, {ids.shape[1]} tokens, margin >= {margins.min():.2f}: {said}")
        if said != scenes.caption(scene) + "<|im_end|>":
            raise SystemExit(f"{name}: the scene is: {scenes.caption(scene)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
