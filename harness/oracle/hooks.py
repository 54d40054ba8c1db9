"""Hooks that read every seam of the Hugging Face model during one forward.

During the forward they keep references only (one copy where transformers 4.57 adds DeepStack rows in place); shapes,
rotation and the way to numpy come afterwards. `output_hidden_states` is not used: 4.57 gives the stream after the
DeepStack addition, 5.x before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision

from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.trace import decoder_seams, layer_of, vision_seams

Inside = frozenset[int] | Literal["all"] | None
"""Layers whose inside is recorded: numbers (of both towers, with the mergers fed by those layers), all, or none."""
Read = Callable[[nn.Module, Callable[[Any], None]], Any]
_RELEASES = "use transformers 4.57 or 5.x as tested"


def wanted_seams(geometry: Geometry, inside: Inside = None, image: bool = True) -> tuple[str, ...]:
    """Seams to record, in the order of computation; a text-only case has no vision seams."""
    deep = inside is not None
    names = (*(vision_seams(geometry, deep) if image else ()), *decoder_seams(geometry, deep))
    if inside is None or inside == "all":
        return names
    plain = {*vision_seams(geometry), *decoder_seams(geometry)}
    return tuple(name for name in names if name in plain or _layer(name, geometry) in inside)


def _layer(seam: str, geometry: Geometry) -> int | None:
    if seam.startswith("vision.deepstack."):
        return geometry.deepstack_taps[int(seam.split(".")[2])]
    return geometry.vision_layers - 1 if seam.startswith("vision.merger") else layer_of(seam)


class SeamHooks:
    """`with SeamHooks(model, geometry, seams) as hooks: model(...)`, then `hooks.arrays()`.

    Where several forwards take turns, `into` says whose values come next.
    """

    def __init__(self, model: nn.Module, geometry: Geometry, seams: tuple[str, ...]) -> None:
        self.seams, self.geometry = seams, geometry
        self._model, self._handles = model, []
        self._raw: dict[str, Any] | None = {}

    def __enter__(self) -> SeamHooks:
        wanted = set(self.seams)
        wanted |= {f"{seam.split('.attn.')[0]}.attn.{part}" for seam in self.seams if ".attn." in seam
                   for part in ("angles", "qkv", "q_norm", "k_norm")}
        taps = {f"decoder.layers.{layer:02d}" for layer in range(len(self.geometry.deepstack_taps))}
        for name, module, read in self._points():
            if name in wanted:
                self._handles.append(read(module, self._keep(name, copy=name in taps)))
        return self

    def _points(self) -> list[tuple[str, nn.Module, Read]]:
        try:
            return list(_points(self._model, self.geometry))
        except AttributeError as error:
            raise HarnessError(f"the model of this transformers release is built otherwise ({error})",
                               fix=_RELEASES) from error

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str, copy: bool) -> Callable[[Any], None]:
        def keep(value: Any) -> None:
            if self._raw is not None:
                self._raw[name] = value.detach().clone() if copy else value

        return keep

    def into(self, raw: dict[str, Any] | None) -> None:
        """Values go here from now on; None: they are let go."""
        self._raw = raw

    def arrays(self) -> dict[str, np.ndarray]:
        """The seams, float32, tokens on axis 0, in order; references are let go."""
        raw, self._raw = self._raw, {}
        return {name: to_numpy(value) for name, value in plain(raw, self.seams, self.geometry).items()}


@torch.no_grad()
def plain(raw: dict[str, Any], seams: Sequence[str], geometry: Geometry) -> dict[str, Tensor]:
    """Values of these seams, taken out of what the hooks kept: tokens on axis 0, heads split, queries and keys turned."""
    for name in [name.removesuffix(".angles") for name in raw if name.endswith(".angles")]:
        (_rotate_vision if name.startswith("vision.") else _rotate_text)(raw, name, geometry)
    silent = [seam for seam in seams if seam not in raw]
    if silent:
        raise HarnessError("the model passed no value there", where=silent[0], fix=_RELEASES)
    return {seam: _plain(raw.pop(seam), seam, geometry) for seam in seams}


def to_numpy(value: Tensor) -> np.ndarray:
    """float32 on the CPU, in C order."""
    return value.detach().to("cpu", torch.float32).contiguous().numpy()


def _plain(value: Tensor, seam: str, geometry: Geometry) -> Tensor:
    """Without the batch axis of the decoder; values of attention split into heads."""
    if not seam.startswith("vision."):
        value = value[0]
    if seam.endswith("attn.v"):
        value = value.reshape(value.shape[0], -1, _head_dim(seam, geometry))
    return value


def _head_dim(seam: str, geometry: Geometry) -> int:
    return geometry.vision_hidden // geometry.vision_heads if seam.startswith("vision.") else geometry.head_dim


def _rotate_vision(raw: dict[str, Any], name: str, geometry: Geometry) -> None:
    """qkv [P, 3C] -> q_rope, k_rope, v [P, heads, head_dim], with HF's own rotation."""
    fused = raw.pop(f"{name}.qkv")
    query, key, raw[f"{name}.v"] = fused.reshape(fused.shape[0], 3, geometry.vision_heads, -1).unbind(1)
    raw[f"{name}.q_rope"], raw[f"{name}.k_rope"] = apply_rotary_pos_emb_vision(query, key, *raw.pop(f"{name}.angles"))


def _rotate_text(raw: dict[str, Any], name: str, geometry: Geometry) -> None:
    """q_norm, k_norm [1, T, heads, head_dim] -> q_rope, k_rope of the same shape, with HF's own rotation."""
    query, key = (raw[f"{name}.{part}"].transpose(1, 2) for part in ("q_norm", "k_norm"))
    turned = apply_rotary_pos_emb(query, key, *raw.pop(f"{name}.angles"))
    raw[f"{name}.q_rope"], raw[f"{name}.k_rope"] = (value.transpose(1, 2) for value in turned)


def _output(module: nn.Module, keep: Callable[[Any], None]) -> Any:
    return module.register_forward_hook(lambda _, __, value: keep(value[0] if isinstance(value, tuple) else value))


def _input(module: nn.Module, keep: Callable[[Any], None]) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _angles(module: nn.Module, keep: Callable[[Any], None]) -> Any:
    return module.register_forward_pre_hook(lambda _, __, kwargs: keep(kwargs["position_embeddings"]), with_kwargs=True)


def _points(model: nn.Module, geometry: Geometry) -> Iterator[tuple[str, nn.Module, Read]]:
    """Where each seam is read; `attn.angles` and `attn.qkv` are what rotated queries and keys are made of."""
    visual, text = model.model.visual, model.model.language_model
    yield "vision.embed", visual.blocks[0], _input
    for number, block in enumerate(visual.blocks):
        yield from _vision_block(f"vision.layers.{number:02d}", block)
    for number, merger in enumerate(visual.deepstack_merger_list):
        yield from _merger(f"vision.deepstack.{number}", merger)
    yield from _merger("vision.merger", visual.merger)
    yield "decoder.embed", text.layers[0], _input
    for number, layer in enumerate(text.layers):
        yield from _decoder_layer(f"decoder.layers.{number:02d}", layer)
    after = (*text.layers[1:], text.norm)
    for number in range(len(geometry.deepstack_taps)):
        yield f"decoder.layers.{number:02d}.deepstack", after[number], _input
    yield "decoder.norm", text.norm, _output
    yield "logits", model.lm_head, _output


def _vision_block(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module, Read]]:
    yield f"{name}.norm1", block.norm1, _output
    yield f"{name}.attn.angles", block.attn, _angles
    yield f"{name}.attn.qkv", block.attn.qkv, _output
    yield f"{name}.attn.context", block.attn.proj, _input
    yield f"{name}.attn.out", block.attn.proj, _output
    yield f"{name}.norm2", block.norm2, _output
    yield f"{name}.mlp.fc1", block.mlp.linear_fc1, _output
    yield f"{name}.mlp.act", block.mlp.linear_fc2, _input
    yield f"{name}.mlp.out", block.mlp.linear_fc2, _output
    yield name, block, _output


def _merger(name: str, merger: nn.Module) -> Iterator[tuple[str, nn.Module, Read]]:
    yield f"{name}.norm", merger.linear_fc1, _input
    yield f"{name}.fc1", merger.linear_fc1, _output
    yield f"{name}.act", merger.linear_fc2, _input
    yield name, merger, _output


def _decoder_layer(name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module, Read]]:
    yield f"{name}.input_norm", layer.input_layernorm, _output
    yield f"{name}.attn.angles", layer.self_attn, _angles
    yield f"{name}.attn.q_norm", layer.self_attn.q_norm, _output
    yield f"{name}.attn.k_norm", layer.self_attn.k_norm, _output
    yield f"{name}.attn.v", layer.self_attn.v_proj, _output
    yield f"{name}.attn.context", layer.self_attn.o_proj, _input
    yield f"{name}.attn.out", layer.self_attn.o_proj, _output
    yield f"{name}.post_norm", layer.post_attention_layernorm, _output
    yield f"{name}.mlp.gate", layer.mlp.gate_proj, _output
    yield f"{name}.mlp.up", layer.mlp.up_proj, _output
    yield f"{name}.mlp.act", layer.mlp.down_proj, _input
    yield f"{name}.mlp.out", layer.mlp.down_proj, _output
    yield name, layer, _output
