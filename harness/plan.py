"""What a whole run must have answered, from the geometry and the cases alone: a record is held against it without a model.

The rungs plan with the same functions, and `tests/test_plan.py` compares the two: neither can forget a seam alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.geometry import Geometry
from harness.trace import Depths, decoder_seams, vision_seams

DECODER_OPS = ("input_norm", "attn.q_norm", "attn.k_norm", "attn.q_rope", "attn.k_rope", "attn.context", "post_norm",
               "mlp.act")
VISION_OPS = ("norm1", "attn.q_rope", "attn.k_rope", "attn.context", "norm2", "mlp.act")
MERGER_OPS = ("norm", "act")
CALLS = ("calls.chunked", "calls.repeated", "calls.slots")
CONSTANTS = ("norm.eps", "vision.eps", "attention.scale", "vision.scale", "gelu.flavour", "mask.fill", "rope.frequencies",
             "vision.rope", "rope.positions", "norm.statistics", "attention.softmax")
SIZES = ("off-grid", "halves", "long", "small", "large")
"""Images of sizes that no case has, see `harness.probes.images`."""
TOKENIZER = ("vocabulary", "merges", "template")
EXTRA = "tensors nobody accounts for"
SHARP, ALL = "~sharp", "all-cases"
NOT_IN_SKETCH = "not-in-sketch"
"""The seam of a rung judged by sketch under which a policy may allow what a sketch cannot say."""
SKETCHED = ("vision", "decoder", "decode", "quantized")
HEAD = "lm_head.weight"
_DECODER_TENSORS = ("input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm",
                    "self_attn.k_norm", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.q_proj",
                    "self_attn.v_proj")
_VISION_TENSORS = ("attn.proj", "attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2", "norm1", "norm2")


@dataclass(frozen=True)
class Kind:
    """What of a case decides its seams: whether it has an image, and whether the bundle runs it."""

    image: bool
    engine: bool


def probed(depths: Depths) -> tuple[str, ...]:
    """Seams that are probed: operations of every layer and merger, the cache of every layer, behaviour between calls."""
    ops = {"vision.layers": VISION_OPS, "decoder.layers": DECODER_OPS, "vision.merger": MERGER_OPS,
           "vision.deepstack": MERGER_OPS}
    found = []
    for seam in (*vision_seams(depths, inside=True), *decoder_seams(depths, inside=True)):
        family = next((names for prefix, names in ops.items() if seam.startswith(prefix)), ())
        if seam in ("vision.embed", "decoder.norm") or seam.endswith(tuple(f".{op}" for op in family)):
            found.append(seam)
        if seam.startswith("decoder.") and seam.endswith(".attn.context"):
            layer = seam.split(".")[2]
            found += [f"kv.keys.{layer}", f"kv.values.{layer}"]
    return (*found, *CALLS)


def resized() -> tuple[str, ...]:
    """Grid and patches of each of `SIZES`."""
    return tuple(f"{name}.{part}" for name in SIZES for part in ("grid", "patches"))


def cache_seams(layers: int) -> tuple[str, ...]:
    """Names of the cache of every layer."""
    return tuple(f"kv.{part}.{layer:02d}" for layer in range(layers) for part in ("keys", "values"))


def with_cache(depths: Depths) -> tuple[str, ...]:
    """Decoder seams, each layer's cache before its output: so they are computed, so the first that breaks is the first."""
    cache = {f"decoder.layers.{layer:02d}": (f"kv.keys.{layer:02d}", f"kv.values.{layer:02d}")
             for layer in range(depths.layers)}
    return tuple(name for seam in decoder_seams(depths) for name in (*cache.get(seam, ()), seam))


def tensors(geometry: Geometry) -> tuple[str, ...]:
    """Names of all tensors of a checkpoint of this geometry, as `transformers` saves them, sorted."""
    text, visual = "model.language_model", "model.visual"
    names = [f"{text}.embed_tokens.weight", f"{text}.norm.weight", *([] if geometry.tied else [HEAD])]
    names += [f"{text}.layers.{layer}.{part}.weight" for layer in range(geometry.layers) for part in _DECODER_TENSORS]
    names.append(f"{visual}.pos_embed.weight")
    blocks = [f"{visual}.blocks.{layer}.{part}" for layer in range(geometry.vision_layers) for part in _VISION_TENSORS]
    mergers = [f"{visual}.merger", *(f"{visual}.deepstack_merger_list.{tap}"
                                     for tap in range(len(geometry.deepstack_taps)))]
    mergers = [f"{merger}.{part}" for merger in mergers for part in ("linear_fc1", "linear_fc2", "norm")]
    names += [f"{name}.{part}" for name in (f"{visual}.patch_embed.proj", *blocks, *mergers) for part in ("bias", "weight")]
    return tuple(sorted(names))


def planned(geometry: Geometry, cases: Mapping[str, Kind], mode: str, exported: bool,
            by_sketch: bool = False) -> dict[tuple[str, str], list[str]]:
    """Seams by rung and case. `exported`: the bundle is our own export, which has a sharp twin (see `rungs.engine`).

    by_sketch: a sketch stands for the oracle.
    """
    vision, decoder = vision_seams(geometry), decoder_seams(geometry)
    cache, held = cache_seams(geometry.layers), tensors(geometry)
    taps = [f"deepstack.{tap}" for tap in range(len(geometry.deepstack_taps))]
    head = [HEAD] if mode == "int8hu" and HEAD not in held else []
    found: dict[tuple[str, str], list[str]] = {
        ("contract", "probes"): [*probed(geometry)], ("inputs", "tokenizer"): [*TOKENIZER],
        ("weights", "graph"): [*held, EXTRA], ("weights", "bundle"): [*held, *head, EXTRA],
        ("weights", "constants"): [*CONSTANTS], ("quantized", "mode"): ["mode"],
        ("headroom", ALL): [*vision_seams(geometry, inside=True), *decoder_seams(geometry, inside=True)]}
    if any(kind.image for kind in cases.values()):
        found["inputs", "sizes"] = [*resized()]
    for name, kind in cases.items():
        found["contract", name] = ["host.positions", "graph.positions", *(taps if kind.image else [])]
        found["inputs", name] = ["ids", *(["grid", "patches"] if kind.image else [])]
        if kind.image:
            found["vision", name] = [*vision]
        found["decoder", name] = [*decoder]
        found["decode", name] = [*cache, "kl", "tokens"]
        found["quantized", name] = [*decoder, "kl", "tokens"]
        if kind.engine:
            inside = [*(vision if kind.image else ()), *with_cache(geometry)]
            found |= {("engine", name + end): inside for end in (("", SHARP) if exported else ("",))}
            found["tokens", name] = ["tokens"]
    for (rung, name), seams in found.items():
        if by_sketch and rung in SKETCHED and name in cases:
            seams.append(NOT_IN_SKETCH)
    return found
