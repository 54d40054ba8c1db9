"""The Hugging Face model without weights, and the stages in which it gets them: one block or layer at a time.

A stage is, here, a vision block with the merger fed by it, a decoder layer, a block of rows of the
head. Its seams make one part of the store, so a stage is also what a killed run does not do again. Stages follow from
the geometry alone, never from the memory at hand: the bytes of an oracle do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.oracle.model import misread, one_line
from harness.streaming.stages import Stage, head_stages, tower_stages

TEXT, VISUAL, HEAD = "model.language_model.", "model.visual.", "lm_head.weight"
EMBEDDING = TEXT + "embed_tokens.weight"


def skeleton(checkpoint: Checkpoint, attention: str) -> Qwen3VLForConditionalGeneration:
    """The model of `config.json` with its constants and without weights (on the meta device), in evaluation mode.

    Raises HarnessError where transformers cannot build it, or reads another geometry from the config than it says.
    """
    try:
        config = Qwen3VLConfig.from_pretrained(checkpoint.root, local_files_only=True)
        config._attn_implementation = attention
        with _weightless():
            model = Qwen3VLForConditionalGeneration(config)
        model.tie_weights()
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise HarnessError(f"transformers cannot build it ({one_line(error)})", where=checkpoint.root) from error
    misread(model, checkpoint)
    return model.eval()


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters go to the meta device as they are registered; buffers (frequencies) are computed as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def stages_of(model: Any, geometry: Geometry, shapes: Mapping[str, Sequence[int]]) -> list[Stage]:
    """All stages in the order of computation, the rows of the head last. shapes: of the checkpoint's tensors.

    Raises HarnessError where the checkpoint lacks a tensor, has one too many, or one of another shape.
    """
    names = {id(module): path for path, module in model.named_modules()}
    stages = tower_stages(geometry, model.model.visual, model.model.language_model, names)
    _check(stages, geometry, shapes)
    return stages + head_stages(geometry, EMBEDDING if geometry.tied else HEAD)


def _check(stages: Sequence[Stage], geometry: Geometry, shapes: Mapping[str, Sequence[int]]) -> None:
    table = (geometry.vocab, geometry.hidden)
    wanted = {place.tensor: place.shape for stage in stages for place in stage.places} | {EMBEDDING: table}
    if not geometry.tied or HEAD in shapes:
        wanted[HEAD] = table
    fix = "the oracle needs each tensor of the model, and no other"
    for kind, names in (("missing", set(wanted) - set(shapes)), ("unexpected", set(shapes) - set(wanted))):
        if names:
            raise HarnessError(f"transformers reports {kind} keys: {sorted(names)[0]}", fix=fix)
    for name, shape in wanted.items():
        if tuple(shapes[name]) != tuple(shape):
            raise HarnessError(f"has shape {list(shapes[name])}, the model's is {list(shape)}", where=name, fix=fix)
