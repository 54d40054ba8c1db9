"""Geometry: what a Qwen3-VL config says, read strictly.

Nothing has a silent default: a missing or unknown config value that changes arithmetic is an error, because a reader
that falls back on a default (rope theta, eps, sections) is one of the commonest conversion bugs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from harness.errors import HarnessError, within

SHAPE = ("hidden", "layers", "heads", "head_dim", "intermediate", "vision_hidden", "vision_layers", "vision_intermediate")
"""Sizes that rounding depends on: how long the sums are and how many follow each other."""
_MISSING = object()
MOST_LAYERS = 1000
"""A record that says more was not written by us, and planning its seams would take all memory."""


@dataclass(frozen=True)
class Geometry:
    """What a Qwen3-VL config says (source: HF `configuration_qwen3_vl.py`); sizes in elements, positions in patches."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tied: bool
    max_positions: int
    image_token: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_intermediate: int
    vision_act: str
    patch: int
    temporal_patch: int
    merge: int
    channels: int
    position_rows: int
    deepstack_taps: tuple[int, ...]

    @property
    def patch_features(self) -> int:
        """Values of one flattened patch: channels x temporal x height x width."""
        return self.channels * self.temporal_patch * self.patch * self.patch

    @property
    def position_side(self) -> int:
        """Side of the square table of learned vision positions."""
        return round(self.position_rows**0.5)

    @property
    def shape(self) -> dict[str, int]:
        """The sizes of `SHAPE` by name."""
        return {name: getattr(self, name) for name in SHAPE}

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Geometry:
        """Inverse of `record`. Raises HarnessError where a value is missing, unknown, of another type or contradictory."""
        with within("geometry"):
            unknown = sorted(set(record) - set(cls.__dataclass_fields__))
            if unknown:
                raise HarnessError("no geometry has such a key", where=unknown[0])
            kinds = {"int": int, "float": float, "bool": bool, "str": str}
            found = {name: _need(record, name, kinds.get(str(field.type), list))
                     for name, field in cls.__dataclass_fields__.items()}
            lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
            if not all(type(part) is int for value in lists.values() for part in value):
                raise HarnessError("holds something else than whole numbers")
            geometry = cls(**{**found, **lists})
            if not (0 < geometry.layers <= MOST_LAYERS and 0 < geometry.vision_layers <= MOST_LAYERS):
                raise HarnessError(f"{geometry.layers} and {geometry.vision_layers} layers are no model's")
            geometry._check(geometry.hidden)
        return geometry

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Read an HF `config.json`. Raises HarnessError naming the key that is missing or not supported."""
        if config.get("model_type") != "qwen3_vl":
            raise HarnessError(f"model_type is {config.get('model_type')!r}, only 'qwen3_vl' is supported",
                               fix="give a Qwen3-VL checkpoint")
        text, vision = _section(config, "text_config"), _section(config, "vision_config")
        with within("text_config"):
            rope = _rope(text)
            heads, hidden = _need(text, "num_attention_heads", int), _need(text, "hidden_size", int)
            _expect(text, "hidden_act", "silu")
            _expect(text, "attention_bias", False)
            text_part = dict(
                vocab=_need(text, "vocab_size", int), hidden=hidden, heads=heads,
                layers=_need(text, "num_hidden_layers", int), kv_heads=_need(text, "num_key_value_heads", int),
                head_dim=_need(text, "head_dim", int), intermediate=_need(text, "intermediate_size", int),
                rms_eps=_need(text, "rms_norm_eps", float), max_positions=_need(text, "max_position_embeddings", int),
                rope_theta=rope[0], mrope_section=rope[1])
        with within("vision_config"):
            act = _need(vision, "hidden_act", str)
            if act != "gelu_pytorch_tanh":
                raise HarnessError(f"hidden_act is {act!r}, only 'gelu_pytorch_tanh' is supported")
            out = _need(vision, "out_hidden_size", int)
            vision_part = dict(
                vision_layers=_need(vision, "depth", int), vision_hidden=_need(vision, "hidden_size", int),
                vision_heads=_need(vision, "num_heads", int), vision_act=act,
                vision_intermediate=_need(vision, "intermediate_size", int), patch=_need(vision, "patch_size", int),
                temporal_patch=_need(vision, "temporal_patch_size", int),
                merge=_need(vision, "spatial_merge_size", int), channels=_need(vision, "in_channels", int),
                position_rows=_need(vision, "num_position_embeddings", int),
                deepstack_taps=tuple(_need(vision, "deepstack_visual_indexes", list)))
        geometry = cls(**text_part, **vision_part, tied=_need(config, "tie_word_embeddings", bool),
                       image_token=_need(config, "image_token_id", int))
        geometry._check(out)
        return geometry

    def _check(self, vision_out: int) -> None:
        checks = {
            f"out_hidden_size {vision_out} differs from hidden_size {self.hidden}": vision_out != self.hidden,
            f"mrope_section {self.mrope_section} does not sum to head_dim / 2 = {self.head_dim // 2}":
                sum(self.mrope_section) != self.head_dim // 2,
            f"num_attention_heads {self.heads} is no multiple of num_key_value_heads {self.kv_heads}":
                self.heads % self.kv_heads != 0,
            f"num_position_embeddings {self.position_rows} is no square": self.position_side**2 != self.position_rows,
            f"deepstack_visual_indexes {self.deepstack_taps} are not increasing block numbers below depth":
                list(self.deepstack_taps) != sorted(set(self.deepstack_taps))
                or not all(0 <= tap < self.vision_layers for tap in self.deepstack_taps),
            f"more DeepStack taps than decoder layers ({self.layers})": len(self.deepstack_taps) > self.layers,
            f"vision hidden {self.vision_hidden} is no multiple of 4 x heads {self.vision_heads}":
                self.vision_hidden % (4 * self.vision_heads) != 0,
        }
        for sentence, wrong in checks.items():
            if wrong:
                raise HarnessError(sentence, where="config.json", fix="mend the config; nothing is guessed")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _need(config, name, dict)


def _need(section: Mapping[str, Any], key: str, kind: type) -> Any:
    value = section.get(key, _MISSING)
    if value is _MISSING or value is None:
        raise HarnessError("the key is missing", where=key, fix="add it to config.json; no default is assumed")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise HarnessError(f"{value!r} is not of type {kind.__name__}", where=key, fix="mend config.json")
    return value


def _expect(section: Mapping[str, Any], key: str, value: object) -> None:
    if _need(section, key, type(value)) != value:
        raise HarnessError(f"{section[key]!r} is not supported, only {value!r}", where=key)


def _rope(text: Mapping[str, Any]) -> tuple[float, tuple[int, int, int]]:
    """Theta and sections from the 5.x spelling (`rope_parameters`) or the 4.57 one (`rope_theta`, `rope_scaling`)."""
    new, old = text.get("rope_parameters"), text.get("rope_scaling")
    key, rope = ("rope_parameters", new) if new else ("rope_scaling", old)
    if not rope:
        raise HarnessError("the key is missing", where="rope_scaling", fix="add it to config.json; it holds M-RoPE")
    theta = rope.get("rope_theta", text.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type"))
    with within(key):
        if kind != "default":
            raise HarnessError(f"rope_type {kind!r} is not supported, only 'default'", where="rope_type")
        if rope.get("mrope_interleaved") is not True:
            raise HarnessError("mrope_interleaved is not true; Qwen3-VL interleaves", where="mrope_interleaved")
        section = _need(rope, "mrope_section", list)
        theta = _need({"rope_theta": theta}, "rope_theta", float)
        if len(section) != 3 or not all(type(part) is int and part >= 0 for part in section):
            raise HarnessError(f"{section} is not three counts", where="mrope_section")
    return theta, tuple(section)
