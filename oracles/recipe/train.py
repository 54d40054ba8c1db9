"""Train the checkpoint.

    python train.py CONFIG_DIR OUT_DIR --steps N [--start CHECKPOINT_DIR] [--stream NAME]

CONFIG_DIR holds the configuration and tokenizer files. Every training scene has a seed
of scenes.FIRST_TRAINING_SEED or more. OUT_DIR gets model.safetensors, rounded to
bfloat16. --start continues from earlier weights with a fresh optimizer.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

import batches
import forward

WARM_UP = 300
TEXT_WEIGHT = 0.5
REPORT_EVERY = 250


def initialise(model, seed):
    """Weights by fan-in; norms and biases spread out, so that none is constant."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor, scale):
        return scale * torch.randn(tensor.shape, generator=generator)

    depth = 2 * len(model.model.language_model.layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                value = noise(parameter, 0.05)
            elif parameter.ndim == 1:
                value = 1 + noise(parameter, 0.1)
            elif "embed_tokens" in name or "pos_embed" in name:
                value = noise(parameter, 0.3)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "linear_fc2.weight"))
                fan_in = parameter[0].numel()
                value = noise(parameter, (fan_in * (depth if residual else 1)) ** -0.5)
            parameter.copy_(value)


def save(model, directory):
    """Write the weights rounded to bfloat16, under the hub's names."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to(torch.bfloat16).cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def optimizer_for(model, rate):
    """AdamW; no decay on norms and biases, so that they keep their spread."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=torch.cuda.is_available())


def rate_at(progress, step):
    """Share of the peak rate: a short linear rise, then a cosine to zero."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="end the schedule by then, on a slower machine")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--stream", default="first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(options.config)
    model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    if options.start:
        model.load_state_dict(load_file(options.start / "model.safetensors"))
    else:
        initialise(model, options.seed)
    model.to(device).train()
    optimizer = optimizer_for(model, options.rate)
    loader = torch.utils.data.DataLoader(
        batches.Batches(
            Tokenizer.from_file(str(options.config / "tokenizer.json")), config.image_token_id,
            options.stream, options.steps, options.images, options.texts,
        ),
        batch_size=None, num_workers=options.workers, prefetch_factor=4 if options.workers else None,
        pin_memory=device == "cuda",
    )
    began = time.time()
    for step, batch in enumerate(loader):
        progress = max(step / options.steps, (time.time() - began) / (60 * options.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_at(progress, step)
        batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        with torch.autocast(device, dtype=torch.bfloat16):
            talk, text = forward.losses(model, batch, config.image_token_id)
        optimizer.zero_grad(set_to_none=True)
        (talk + TEXT_WEIGHT * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % REPORT_EVERY == 0:
            print(f"step {step} talk {talk.item():.4f} text {text.item():.4f} {time.time() - began:.0f} s", flush=True)
            save(model, options.out)
    save(model, options.out)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"{step + 1} steps, {time.time() - began:.0f} s, {memory:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
