"""Loading the Hugging Face model strictly, in float32 that is float32."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.utils import logging

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError


def true_fp32() -> dict[str, str]:
    """From here on this process computes float32 in float32: no TF32 and no bfloat16 inside float32 kernels.

    Returns the switches as they stand. `set_float32_matmul_precision` and the `allow_tf32` flags alone do not do it:
    where `torch.backends.fp32_precision` was set, cuDNN convolutions (the patch embedding is one) stay in TF32. That
    switch goes first: while it says TF32, whatever restores the legacy flags brings TF32 back.
    """
    backends = torch.backends
    for parent in (backends, backends.cudnn, backends.mkldnn):
        parent.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    switches = {"cuda.matmul": backends.cuda.matmul, "cudnn.conv": backends.cudnn.conv, "cudnn.rnn": backends.cudnn.rnn,
                "mkldnn.matmul": backends.mkldnn.matmul, "mkldnn.conv": backends.mkldnn.conv,
                "mkldnn.rnn": backends.mkldnn.rnn}
    for switch in switches.values():
        switch.fp32_precision = "ieee"
    return {name: switch.fp32_precision for name, switch in switches.items()}


def load_model(checkpoint: Checkpoint, device: str = "cpu",
               attention: str = "sdpa") -> Qwen3VLForConditionalGeneration:
    """The whole checkpoint as `Qwen3VLForConditionalGeneration`, float32, in evaluation mode, on `device`.

    device "auto": spread over the GPUs that are there by Hugging Face's own device map (needs accelerate).

    Raises HarnessError where transformers cannot load it, misses or ignores a tensor, or reads another geometry from
    its config than the config says (a default that slipped in).
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(
            checkpoint.root, dtype=torch.float32, attn_implementation=attention, local_files_only=True,
            use_safetensors=True, output_loading_info=True, **({"device_map": "auto"} if device == "auto" else {}))
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise HarnessError(f"transformers cannot load it ({one_line(error)})",
                           where=checkpoint.root) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise HarnessError(f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}",
                               where=checkpoint.root, fix="the oracle needs each tensor of the model, and no other")
    model = model.eval() if device == "auto" else model.eval().to(device)
    misread(model, checkpoint)
    if any(value.dtype != torch.float32 for value in model.parameters()):
        raise HarnessError("transformers does not load it in float32", where=checkpoint.root)
    return model


def misread(model: Qwen3VLForConditionalGeneration, checkpoint: Checkpoint) -> None:
    """Raises HarnessError where the model was built for another geometry than the config says."""
    text, geometry = model.model.language_model, checkpoint.geometry
    rope, norm = text.rotary_emb, text.norm
    lanes = torch.arange(0, geometry.head_dim, 2, dtype=torch.float64)
    theta = (geometry.rope_theta ** -(lanes / geometry.head_dim)).float()
    wrong = {"rope theta": not _close(rope.inv_freq.cpu(), theta),
             "mrope_section": tuple(rope.mrope_section) != geometry.mrope_section,
             "rms_norm_eps": norm.variance_epsilon != geometry.rms_eps,
             "number of layers": len(text.layers) != geometry.layers,
             "tie_word_embeddings": (model.lm_head.weight is text.embed_tokens.weight) != geometry.tied}
    for what in (name for name, differs in wrong.items() if differs):
        raise HarnessError(f"transformers reads another {what} than config.json says", where=checkpoint.root,
                           fix="write the config in the layout of the hub (rope_theta and rope_scaling)")


def one_line(error: Exception) -> str:
    """A library's message, often many lines, as the part of one sentence."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(torch.allclose(left, right, rtol=1e-6, atol=0.0))
