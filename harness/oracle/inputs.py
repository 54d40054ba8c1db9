"""Processed inputs of a case, made once by Hugging Face's tokenizer, chat template, image processor, rope index."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from harness.cases import Case, FrozenInputs
from harness.checkpoint import Checkpoint, read_json
from harness.errors import HarnessError, within
from harness.host import load_image, render
from harness.oracle.model import one_line

IMAGE_PAD = "<|image_pad|>"


def freeze(case: Case, checkpoint: Checkpoint) -> FrozenInputs:
    """Ids, patches, grid and position planes of one case.

    Raises HarnessError for a lost or unreadable image, a prompt with stray image tokens, a prompt that with its rollout
    is longer than `max_position_embeddings`, or a checkpoint without tokenizer files.
    """
    with within(case.name):
        patches, grid = _pixels(case, checkpoint)
        ids = _tokens(case, checkpoint, grid)
        limit = checkpoint.geometry.max_positions
        if len(ids) + case.decode > limit:
            raise HarnessError(f"the prompt has {len(ids)} tokens, with {case.decode} to decode more than the "
                               f"{limit} positions of the model", fix="shorten the case")
        return FrozenInputs(case.name, ids, rope_index(checkpoint, ids, grid), patches, grid)


def rope_index(checkpoint: Checkpoint, ids: np.ndarray, grid: tuple[int, int, int] | None) -> np.ndarray:
    """HF `Qwen3VLModel.get_rope_index` of ids [T] -> planes t, h, w [3, T] int32.

    The method needs the config and no weights, so it is called on a model that has none.
    """
    model = Qwen3VLModel.__new__(Qwen3VLModel)
    nn.Module.__init__(model)
    model.config = Qwen3VLConfig.from_pretrained(checkpoint.root, local_files_only=True)
    batch = torch.from_numpy(ids.astype(np.int64))[None]
    arguments = {"input_ids": batch, "attention_mask": torch.ones_like(batch),
                 "image_grid_thw": None if grid is None else torch.tensor([grid])}
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:  # transformers 5
        arguments["mm_token_type_ids"] = (batch == checkpoint.geometry.image_token).int()
    planes, _ = model.get_rope_index(**arguments)
    return planes[:, 0].numpy().astype(np.int32)


def _pixels(case: Case, checkpoint: Checkpoint) -> tuple[np.ndarray | None, tuple[int, int, int] | None]:
    if not case.images:
        return None, None
    return pixels(load_image(case.images[0], case.root), checkpoint)


def pixels(image: Any, checkpoint: Checkpoint) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches [P, F] float32 and grid of an RGB image, by HF's processor."""
    processor = image_processor(checkpoint)
    # transformers 4.57 reads `size` from the config and then forgets it, so it is handed in.
    held = processor(images=[image], size=_size(checkpoint), return_tensors="np")
    grid = tuple(int(part) for part in held["image_grid_thw"][0])
    return np.ascontiguousarray(held["pixel_values"], dtype=np.float32), grid


def image_processor(checkpoint: Checkpoint) -> Any:
    """The processor of preprocessor_config.json on Pillow and numpy; torchvision resizes otherwise, if it is there."""
    try:  # transformers 5
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    config = read_json(checkpoint.root / "preprocessor_config.json")
    with within("preprocessor_config.json"):
        kind = str(config.get("image_processor_type"))
        if not kind.startswith("Qwen2VLImageProcessor"):
            raise HarnessError(f"image_processor_type {kind} is not supported, only Qwen2VLImageProcessor")
        merge, patch = config.get("merge_size"), config.get("patch_size")
        if (merge, patch) != (checkpoint.geometry.merge, checkpoint.geometry.patch):
            raise HarnessError(f"merge_size {merge} and patch_size {patch} are not those of config.json")
    return Processor.from_pretrained(checkpoint.root, local_files_only=True)


def _size(checkpoint: Checkpoint) -> dict[str, int]:
    size = read_json(checkpoint.root / "preprocessor_config.json").get("size")
    if not isinstance(size, dict) or not {"shortest_edge", "longest_edge"} <= set(size):
        raise HarnessError("lacks size with shortest_edge and longest_edge", where="preprocessor_config.json",
                           fix="add it; no default is assumed")
    return size


def _tokens(case: Case, checkpoint: Checkpoint, grid: tuple[int, int, int] | None) -> np.ndarray:
    tokenizer = _tokenizer(checkpoint)
    count = 0 if grid is None else grid[0] * grid[1] * grid[2] // checkpoint.geometry.merge**2
    text = _prompt(case, tokenizer)
    if text.count(IMAGE_PAD) != len(case.images):
        places = text.count(IMAGE_PAD)
        raise HarnessError(f"the rendered prompt has {places} image places for {len(case.images)} images",
                           fix=f"do not write {IMAGE_PAD} in a text; check the chat template")
    ids = np.asarray(tokenizer(text.replace(IMAGE_PAD, IMAGE_PAD * count))["input_ids"], dtype=np.int32)
    if ids.size == 0:
        raise HarnessError("the prompt is empty", fix="write some text")
    if ids.max() >= checkpoint.geometry.vocab:
        raise HarnessError(f"token id {ids.max()} is outside the vocabulary of {checkpoint.geometry.vocab}",
                           fix="tokenizer and config.json do not belong together")
    if int((ids == checkpoint.geometry.image_token).sum()) != count:
        raise HarnessError(f"the tokenizer does not make {count} ids {checkpoint.geometry.image_token} of {IMAGE_PAD}",
                           fix="tokenizer and config.json do not belong together")
    return ids


def _tokenizer(checkpoint: Checkpoint) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return AutoTokenizer.from_pretrained(checkpoint.root, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HarnessError(f"transformers cannot load its tokenizer ({one_line(error)})",
                               where=checkpoint.root, fix="download the checkpoint whole") from error


def _prompt(case: Case, tokenizer: Any) -> str:
    """The chat template of the checkpoint; raw text, and a checkpoint without a template, by our own rendering."""
    if not tokenizer.chat_template or not all(turn.role for turn in case.turns):
        return render(case)
    messages = []
    for turn in case.turns:
        parts = [{"type": "text", "text": turn.text}]
        if turn.image:
            parts.insert(1 if turn.image_after_text else 0, {"type": "image"})
        messages.append({"role": turn.role, "content": parts})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
