"""A synthetic Qwen3-VL bundle at full 8B geometry, int8hu, made and judged by replay on one GPU, with figures.

    python reports/bench/gpu_replay.py --out DIR            # H100: about 3 minutes; needs coreai-core and coreai-torch
    python reports/bench/gpu_replay.py --out DIR --small    # any machine, seconds: a check of the script itself

Random weights, so no text comes of it; every figure is of size, speed and agreement. Stages: make and export both towers
(S = 1 decoder, context 512), open, encode an image, prefill 211 tokens in layer-major order, 24 greedy tokens from recorded
calls and verified, every layer against a torch twin with the same codes (an independent implementation: `harness.graph`),
single-token times beside the measured memory bandwidth. Prints a table; DIR/gpu_replay.json holds the same. A stage that
fails is reported and the next one runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

import harness.quiet  # noqa: F401  (before coreai_opt is imported)
from harness.cases import FrozenInputs
from harness.engines.replay.arithmetic import Fp16, Fp32
from harness.engines.replay.compile import Constants, compiled
from harness.engines.replay.decoder import Conversation, Decoder as Replayed
from harness.engines.replay.program import read_program
from harness.geometry import Geometry
from harness.graph.contract import host_inputs
from harness.graph.decoder import Decoder, Layer
from harness.graph.quantize import RECIPES, dequantize, expected_codes
from harness.graph.reference import TEXT, checkpoint_name
from harness.graph.vision import Vision

FULL = Geometry(vocab=151936, hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=12288, rms_eps=1e-6,
                rope_theta=5e6, mrope_section=(24, 20, 20), max_positions=262144, vision_layers=27, vision_hidden=1152,
                vision_heads=16, vision_act="gelu_pytorch_tanh", vision_intermediate=4304, patch=16, temporal_patch=2,
                merge=2, channels=3, position_rows=2304, deepstack_taps=(8, 16, 24), tied=False, image_token=151655)
SMALL = Geometry(vocab=2048, hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=512, rms_eps=1e-6,
                 rope_theta=5e6, mrope_section=(16, 8, 8), max_positions=4096, vision_layers=4, vision_hidden=64,
                 vision_heads=2, vision_act="gelu_pytorch_tanh", vision_intermediate=96, patch=16, temporal_patch=2,
                 merge=2, channels=3, position_rows=64, deepstack_taps=(0, 1, 2), tied=False, image_token=2000)
GRID, CONTEXT, PROMPT, FREE = (28, 28), 512, 211, 24
FIGURES: dict[str, object] = {}


def say(name: str, value: object) -> None:
    """Keep and print one figure; what was measured so far survives whatever fails later."""
    FIGURES[name] = round(value, 5) if isinstance(value, float) else value
    print(f"{name:44} {FIGURES[name]}", flush=True)


class Stage:
    """A timed stage whose failure is a figure, not the end."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device

    def __enter__(self) -> Stage:
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as broken:
                error = error or broken
        say(f"{self.name} s", time.perf_counter() - self.started)
        if error is not None and isinstance(error, Exception):
            say(f"{self.name} FAILED", f"{type(error).__name__}: {error}")
            traceback.print_exception(error)
        return isinstance(error, Exception)


def draw(shape: tuple[int, ...], seed: int, device: str, spread: float) -> torch.Tensor:
    """Random fp16 weights, made on the device and the same there for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * spread).half()


class Model:
    """Both towers: weights by checkpoint name, made again from their seeds whenever asked for."""

    def __init__(self, geometry: Geometry, device: str) -> None:
        self.geometry, self.device, self.recipe = geometry, device, RECIPES["int8hu"]
        merged = tuple(side // geometry.merge for side in GRID)
        with torch.device("meta"):
            self.decoder, self.vision = Decoder(geometry, merged), Vision(geometry, GRID)
        self.names = [name for name, _ in self.decoder.named_parameters()]

    def weight(self, name: str) -> torch.Tensor:
        """fp16, on the device."""
        shape = dict(self.decoder.named_parameters())[name].shape
        if name.endswith("norm.weight") or "layernorm" in name or "_norm" in name:
            return 1 + draw(shape, self.names.index(name), self.device, 0.05)
        return draw(shape, self.names.index(name), self.device, 0.02 if name == "embed_tokens.weight" else shape[-1]**-0.5)

    def codes(self, name: str):
        """(codes, scale) as the recipe says, or None for fp16."""
        scheme = self.recipe.scheme(checkpoint_name(TEXT, name))
        return expected_codes(self.weight(name), scheme) if scheme else None

    def build(self) -> tuple[Decoder, Vision]:
        """Towers to export, on the CPU: codes and scales in coreai-opt's own modules."""
        from harness.export.quantizer import quantize_linears

        empty = self.decoder
        made = {}
        for scheme in {self.recipe.body, self.recipe.head}:
            linear = torch.nn.Linear(64, 32, bias=False).half()
            quantize_linears([linear], scheme)
            made[scheme] = linear
        decoder = copy.deepcopy(empty)
        for name in self.names:
            held = self.codes(name)
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            if held is None:
                module = decoder.get_submodule(name.removesuffix(".weight"))
                module.weight = torch.nn.Parameter(self.weight(name).cpu(), requires_grad=False)
                continue
            linear = copy.deepcopy(made[self.recipe.scheme(checkpoint_name(TEXT, name))])
            linear.out_features, linear.in_features = held[0].shape
            inner = linear.parametrizations.weight[0]
            inner.quantized_data, inner.scale = held[0].cpu(), held[1].cpu()
            inner.zero_point = torch.zeros(held[1].shape, dtype=torch.int8)
            setattr(decoder.get_submodule(parent) if parent else decoder, leaf, linear)
        merged = tuple(side // self.geometry.merge for side in GRID)
        decoder.rope = Decoder(SMALL_LIKE(self.geometry), merged).rope
        return decoder.eval(), self.build_vision(torch.float16)

    def build_vision(self, dtype: torch.dtype, device: str = "cpu") -> Vision:
        """The vision tower with its random weights."""
        vision = copy.deepcopy(self.vision).to_empty(device=device)
        with torch.no_grad():
            for number, (name, value) in enumerate(vision.named_parameters()):
                spread = 0.02 if value.ndim == 1 or name == "positions" else value.shape[-1]**-0.5
                drawn = draw(value.shape, 10_000 + number, self.device, spread)
                value.copy_(drawn + (1 if "norm" in name and name.endswith("weight") else 0))
        tables = Vision(SMALL_LIKE(self.geometry), GRID)
        for name, buffer in tables.named_buffers():
            parent, _, leaf = name.rpartition(".")
            setattr(vision.get_submodule(parent) if parent else vision, leaf, buffer.to(device))
        from harness.graph.norms import cast_weights

        return cast_weights(vision.eval(), dtype)


def SMALL_LIKE(geometry: Geometry) -> Geometry:
    """The same positions and head sizes with next to no weights: for the tables that are computed, not drawn."""
    from dataclasses import replace

    return replace(geometry, layers=3, vision_layers=3, deepstack_taps=(0, 1, 2), intermediate=64, vision_intermediate=64,
                   hidden=64, vocab=geometry.vocab)


def export(model: Model, out: Path) -> tuple[Path, Path]:
    """Decoder and vision assets."""
    from harness.export.convert import save_asset
    from harness.export.program import trace_decoder, trace_vision

    decoder_path, vision_path = out / "decoder.aimodel", out / "vision.aimodel"
    with Stage("make weights", model.device):
        decoder, vision = model.build()
    with Stage("trace decoder", model.device):
        program = trace_decoder(decoder, model.geometry, CONTEXT, torch.float16)
    with Stage("convert decoder", model.device):
        save_asset(program, decoder_path)
    del decoder, program
    with Stage("export vision", model.device):
        save_asset(trace_vision(vision, model.geometry, torch.float16), vision_path)
    say("decoder asset bytes", (decoder_path / "main.mlirb").stat().st_size)
    return decoder_path, vision_path


def stream_taps(function, geometry: Geometry) -> dict:
    """Output of every decoder layer, after its DeepStack addition: the additions of the residual stream, in order."""
    adds = [node.results[0] for node in function.nodes if node.op == "broadcasting_add"
            and node.results[0].shape == (1, 1, geometry.hidden) and node.results[0].dtype == "f16"]
    taps, place = {}, 0
    for layer in range(geometry.layers):
        place += 2 + (layer < len(geometry.deepstack_taps))
        taps[f"decoder.layers.{layer:02d}"] = adds[place - 1]
    if place != len(adds):
        raise ValueError(f"{len(adds)} additions to the stream, {place} were expected")
    return taps


def twin_layers(model: Model, ids: np.ndarray, host, embeds, deepstack, got: dict) -> dict[str, tuple[float, float]]:
    """Each layer in float32 torch with the bundle's numbers: relative L2 (local: fed with replay's own stream; accumulated)."""
    geometry, device = model.geometry, model.device
    merged = tuple(side // geometry.merge for side in GRID)
    small = Decoder(SMALL_LIKE(geometry), merged).to(device)
    total, vocab = len(ids), geometry.vocab
    given = torch.from_numpy(ids.astype(np.int32)).to(device)
    place = torch.arange(total, dtype=torch.int32, device=device)
    start, amount = (torch.tensor([value], dtype=torch.int32, device=device)
                     for value in (host.shift_start, host.shift_amount))
    rope = small.rope(small.rope.planes(given, place, start, amount))
    visible = place[None, :] <= place[:, None]
    is_image = (given >= vocab)[None, :, None]
    slot = (given - vocab).clamp(0, small.slots - 1).long()
    table = model.weight("embed_tokens.weight")
    text = table[given.clamp(0, vocab - 1).long()].float()
    del table
    x = torch.where(is_image, embeds.float()[slot][None], text[None])
    before, figures = x, {}
    for number in range(geometry.layers):
        with torch.device("meta"):
            layer = Layer(geometry, 0)
        prefix = f"layers.{number}."
        state = {}
        for name, _ in layer.named_parameters():
            held = model.codes(prefix + name)
            state[name] = (dequantize(*held) if held else model.weight(prefix + name)).float()
        layer.load_state_dict(state, assign=True)
        layer.to(device)  # the index of shared heads, which no checkpoint holds

        def run(stream: torch.Tensor) -> torch.Tensor:
            cache = tuple(torch.zeros(1, 1, geometry.kv_heads, total, geometry.head_dim, device=device) for _ in range(2))
            made = layer(stream, rope, visible, cache, "layer", lambda name, value: value)
            if number < len(geometry.deepstack_taps):
                rows = deepstack.float()[slot + number * small.slots][None]
                made = made + torch.where(is_image, rows, torch.zeros_like(rows))
            return made

        with torch.no_grad():
            x, local = run(x), run(before)
        name = f"decoder.layers.{number:02d}"
        before = got[name].float().reshape(1, total, -1)
        figures[name] = distance(before, local), distance(before, x)
        del layer, state
    with torch.no_grad():
        normed = torch.nn.functional.rms_norm(x, (geometry.hidden,), model.weight("norm.weight").float(), geometry.rms_eps)
        head = dequantize(*model.codes("lm_head.weight"))
        logits = torch.cat([torch.nn.functional.linear(normed[0], rows.float()) for rows in head.split(1 << 14)], -1)
    figures["logits"] = distance(got["logits"].float(), logits), distance(got["logits"].float(), logits)
    same = (got["logits"].argmax(-1) == logits.argmax(-1)).float().mean()
    say("argmax equal to the twin's, share of positions", float(same))
    return figures


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2, in float64."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def bandwidth(device: str) -> float:
    """Bytes/s read plus written by a large copy."""
    count = 1 << (31 if device == "cuda" else 27)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        target.copy_(source)
        times.append(timed(lambda: target.copy_(source), device))
    return 2 * count / min(times)


def timed(work, device: str) -> float:
    """Seconds of one call, the device's own work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    """All stages; 0 where none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the assets on the disk")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    geometry = SMALL if arguments.small else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)
    Fp16.exact_accumulation()
    say("device", torch.cuda.get_device_name() if device == "cuda" else "cpu")
    say("torch", torch.__version__)
    try:
        stages(arguments, geometry, device)
    finally:
        (arguments.out / "gpu_replay.json").write_text(json.dumps(FIGURES, indent=1), encoding="utf-8")
        if not arguments.keep:
            for name in ("decoder.aimodel", "vision.aimodel"):
                shutil.rmtree(arguments.out / name, ignore_errors=True)
    return int(any(name.endswith("FAILED") for name in FIGURES))


def stages(arguments: argparse.Namespace, geometry: Geometry, device: str) -> None:
    """Make, open, run, judge, time."""
    model = Model(geometry, device)
    decoder_path, vision_path = export(model, arguments.out)
    rng = np.random.default_rng(0)
    gate = time.perf_counter()
    with Stage("open: read the program", device):
        program = read_program(decoder_path, check=False)
    with Stage("open: dequantize and upload", device):
        constants = Constants(Fp16(), device, dense=True)
        taps = stream_taps(program.main, geometry)
        replay = Replayed(program.main, constants, taps, record=device == "cuda")
        replay.step()
    with Stage("vision: open and encode", device):
        vision_program = read_program(vision_path).main
        vision = compiled(vision_program, Constants(Fp16(), device))
        patches = torch.from_numpy(rng.standard_normal((784, geometry.patch_features)).clip(-1, 1).astype(np.float16))
        outputs, _ = vision({}, patches=patches.to(device))
        embeds, deepstack = outputs["image_embeds"], outputs["deepstack_embeds"]
        tower = model.build_vision(torch.float32, device)
        with torch.no_grad():
            expected = tower(patches.to(device).float())
        say("vision embeds against a float32 tower, rel L2", distance(embeds, expected[0]))
        say("vision DeepStack against it, rel L2", distance(deepstack, expected[1]))
        del tower
        # Random towers put out what they like: the decoder gets rows of the size of its own embeddings.
        embeds, deepstack = (value / value.float().std() * 0.02 for value in (embeds.float(), deepstack.float()))
        embeds, deepstack = embeds.half(), deepstack.half()
    image = geometry.image_token
    prompt = np.array([5, 6, 7, image - 1, *[image] * 196, *range(20, 31)], dtype=np.int64)
    merged = tuple(side // geometry.merge for side in GRID)
    host = host_inputs(prompt, image, geometry.vocab, merged)
    fixed = {"image_embeds": embeds, "deepstack_embeds": deepstack,
             "rope_shift_start": torch.tensor([host.shift_start], dtype=torch.int32),
             "rope_shift_amount": torch.tensor([host.shift_amount], dtype=torch.int32)}
    talk, tokens, rows = Conversation(replay, fixed, CONTEXT), [], []
    with Stage("prefill 211 tokens, layer-major", device):
        logits, _ = talk.feed(host.ids)
    with Stage("24 greedy tokens", device):
        for _ in range(FREE):
            tokens.append(int((rows[-1] if rows else logits)[-1].argmax()))
            rows.append(talk.feed(np.array([tokens[-1]]))[0])
    say("all finite", bool(logits.isfinite().all() and torch.cat(rows).isfinite().all()))
    with Stage("verify: all 235 in one pass, tapped", device):
        whole = Conversation(replay, fixed, CONTEXT)
        ids = np.concatenate([host.ids, np.array(tokens)])
        verified, tapped = whole.feed(ids, tapped=True)
        again = verified[PROMPT - 1:-1].argmax(-1).tolist()
        say("greedy tokens verified", f"{sum(a == b for a, b in zip(again, tokens))} of {FREE}")
        say("recorded calls against one pass, rel L2", distance(torch.cat(rows), verified[PROMPT:]))
    with Stage("layer rungs against the torch twin", device):
        found = twin_layers(model, ids, host, embeds, deepstack, {**tapped, "logits": verified})
        say("layers judged", len(found) - 1)
        say("worst local rel L2 of a layer", max(local for name, (local, _) in found.items() if name != "logits"))
        say("accumulated rel L2, last layer", found[f"decoder.layers.{geometry.layers - 1:02d}"][1])
        say("logits rel L2", found["logits"][1])
        FIGURES["layers"] = {name: [round(value, 8) for value in pair] for name, pair in found.items()}
    say("gate: opening to verdict s", time.perf_counter() - gate)
    times(replay, program, fixed, device, geometry)


def times(replay: Replayed, program, fixed: dict, device: str, geometry: Geometry) -> None:
    """Single tokens: plain, recorded, recorded with fused norms, beside what reading the weights takes."""
    with Stage("bandwidth", device):
        speed = bandwidth(device)
        say("memory bandwidth, copy, TB/s", speed / 1e12)
        read = sum(held.whole.numel() * held.whole.element_size() for held in replay.step()._wide.values()
                   if getattr(held, "whole", None) is not None)
        say("weights read a token, GB", read / 1e9)
        floor = read / speed
        say("floor: weights once at that bandwidth, ms", floor * 1e3)
    variants = {"plain": (False, False), "recorded": (True, False), "recorded, fused norms": (True, True)}
    for name, (record, fuse) in variants.items():
        if record and device != "cuda":
            continue
        with Stage(f"S=1 {name}", device):
            made = Replayed(program.main, replay.constants, {}, record=record, fuse=fuse)
            talk = Conversation(made, fixed, CONTEXT)
            talk.length = 215
            for token in range(6):
                talk.feed(np.array([token + 20]))
            spent = [timed(lambda token=token: talk.feed(np.array([token + 40])), device) for token in range(24)]
            say(f"S=1 {name}, median ms", statistics.median(spent) * 1e3)
            say(f"S=1 {name}, times the floor", statistics.median(spent) / floor)
    if device == "cuda":
        say("GPU memory, peak GB", torch.cuda.max_memory_allocated() / 1e9)
    with Stage("fp32 arithmetic, 64 tokens layer-major, codes kept", device):
        wide = Replayed(program.main, Constants(Fp32(), device), {})
        Conversation(wide, fixed, CONTEXT).feed(np.arange(20, 84))


if __name__ == "__main__":
    sys.exit(main())
