"""Held-out figures of a checkpoint, as JSON: greedy captions through the stock model.

    python evaluate.py CHECKPOINT_DIR [--scenes 512] [--width 448 --height 448]

The stored weights are used in float32. A margin is the difference between the two
largest logits of a generated position, <|im_end|> included.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLForConditionalGeneration

import corpus
import scenes
from batches import PROMPT

CHUNK = 64


def greedy(model, inputs, limit):
    """Generated ids (N, T) and the margin of each."""
    output = model.generate(
        **inputs, max_new_tokens=limit, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    top = torch.stack(output.logits, 1).topk(2).values
    return output.sequences[:, inputs["input_ids"].shape[1]:], top[..., 0] - top[..., 1]


def caption_inputs(tokenizer, processor, pictures):
    """Model inputs of the caption prompt for pictures of one size."""
    pixels = processor(images=pictures, return_tensors="pt")
    count = int(pixels["image_grid_thw"][0].prod()) // 4
    text = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count
        + f"<|vision_end|>{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer.encode(text)] * len(pictures))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
        **pixels,
    }


def spread(margins):
    """Figures of a list of margin tensors."""
    values = torch.cat(margins)
    return {
        "positions": values.numel(),
        "margin_median": round(values.median().item(), 3),
        "margin_1st_percentile": round(values.quantile(0.01).item(), 3),
        "margin_smallest": round(values.min().item(), 3),
    }


def captions(model, tokenizer, processor, options):
    """Exact captions and margins over held-out scenes (seeds 0, 1, ...)."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    exact, lengths, margins, wrong = 0, [], [], []
    for first in range(0, options.scenes, CHUNK):
        seeds = range(first, min(first + CHUNK, options.scenes))
        shown = [scenes.sample(seed, options.width, options.height) for seed in seeds]
        inputs = caption_inputs(tokenizer, processor, [scenes.picture(scene) for scene in shown])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        ids, gaps = greedy(model, inputs, 60)
        for seed, scene, row, gap in zip(seeds, shown, ids.tolist(), gaps.cpu()):
            length = row.index(end) if end in row else len(row)
            said = tokenizer.decode(row[:length])
            lengths.append(length)
            margins.append(gap[: length + 1])
            exact += said == scenes.caption(scene)
            if said != scenes.caption(scene):
                wrong.append({"seed": seed, "said": said, "truth": scenes.caption(scene)})
    lengths.sort()
    return {
        "scenes": options.scenes, "size": [options.width, options.height],
        "exact": exact, "exact_percent": round(100 * exact / options.scenes, 2),
        "tokens_smallest": lengths[0], "tokens_median": lengths[len(lengths) // 2], "tokens_largest": lengths[-1],
        **spread(margins), "wrong": wrong[:5],
    }


def continuations(model, tokenizer, count=64, limit=32):
    """Continuing held-out texts (a generator seed apart from training) past 300 tokens of prompt."""
    rng = random.Random("held-out text")
    exact, margins = 0, []
    while len(margins) < count:
        ids = tokenizer.encode(corpus.document(rng))
        if not 300 + limit < len(ids) <= 416:
            continue
        prompt = torch.tensor([ids[:300]], device=model.device)
        said, gap = greedy(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, limit)
        exact += said[0].tolist() == ids[300 : 300 + limit]
        margins.append(gap[0].cpu())
    return {"texts": count, "prompt_tokens": 300, "new_tokens": limit, "exact": exact, **spread(margins)}


def spreads(directory):
    """The smallest standard deviation among norm weights and biases, and the tensor that has it."""
    with safe_open(Path(directory) / "model.safetensors", "pt") as tensors:
        vectors = {name: tensors.get_tensor(name) for name in tensors.keys()}
    deviations = {name: value.float().std().item() for name, value in vectors.items() if value.ndim == 1}
    name = min(deviations, key=deviations.get)
    return {"vectors": len(deviations), "smallest_std": round(deviations[name], 4), "of": name}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--height", type=int, default=448)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3VLForConditionalGeneration.from_pretrained(options.checkpoint, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    processor = Qwen2VLImageProcessor.from_pretrained(options.checkpoint)
    print(json.dumps({
        "captions": captions(model, tokenizer, processor, options),
        "continuations": continuations(model, tokenizer),
        "norms_and_biases": spreads(options.checkpoint),
    }, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
