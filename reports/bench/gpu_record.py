"""Recording on a GPU beside the plain forward of the same model, at full geometry, with random weights made on the GPU.

    python reports/bench/gpu_record.py [OUT.json] [--size 8b] [--disk DIR] [--layers N --vision-layers N] [--device cpu]

Nothing is downloaded and, without --disk, nothing large is written: the checkpoint on disk is a header and a hole. Each
section prints its figures as soon as it has them and OUT.json is rewritten, so a run that is cut short loses nothing.

plain: Hugging Face's forward of a 211-token prompt with a 448 x 448 image and 24 tokens. naive: the same with a hook on
every seam that copies at once. record: ours, every seam in pinned host memory at the end (no disk), by turns with plain
forwards, since the host's pace drifts by more than the difference. generate: 24 tokens. tokens, with the step that
measures the noise: one pass that verifies a right draft; two passes for a draft with one wrong token. tf32: what the
switches are worth against float64. disk (--disk): a real checkpoint in shards is written to DIR and recorded from there
into an oracle there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from harness.cases import Case, Turn  # noqa: E402
from harness.checkpoint import Checkpoint  # noqa: E402
from harness.oracle import forward, freeze, true_fp32, wanted_seams  # noqa: E402
from harness.oracle.drain import Drain  # noqa: E402
from harness.oracle.hooks import SeamHooks  # noqa: E402
from harness.oracle.jobs import Bench, Whole  # noqa: E402
from harness.oracle.lanes import Lane  # noqa: E402
from harness.streaming.parked import parking  # noqa: E402
from harness.oracle.recording import _constants_to, _passes, record  # noqa: E402
from harness.oracle.stages import skeleton, stages_of  # noqa: E402
from harness.oracle.resident import Resident  # noqa: E402
from harness.streaming.reading import WeightReader  # noqa: E402
from harness.synth import plan, synthesize  # noqa: E402
from harness.synth.draw import std_of  # noqa: E402
from harness.synth.writer import HUB_FILES  # noqa: E402

CASE = Case("noise", "a 448 x 448 image in a prompt of 211 tokens",
            (Turn("user", "Describe this image.", "noise:448x448:7"),))


class InMemory:
    """A writer that lets go of what it is given: parts are counted, nothing is written."""

    def __init__(self) -> None:
        self.bytes, self.parts, self.state = 0, {}, None

    def part(self, name: str, arrays: dict[str, np.ndarray], key: str = "") -> None:
        self.bytes += sum(array.nbytes for array in arrays.values())

    def resume(self, *_: Any) -> bool:
        return False

    def note(self, state: Any) -> None:
        self.state = state

    def noted(self) -> None:
        return None

    def finish(self, facts: dict[str, Any], parts: list[str]) -> None:
        self.facts = facts


class Kept(InMemory):
    """One that also keeps the arrays, to read a stored cache from, and to compare."""

    def part(self, name: str, arrays: dict[str, np.ndarray], key: str = "") -> None:
        self.parts[name] = dict(arrays)  # views of pinned memory, which stays as long as they do

    def read(self, name: str, tensors: Any) -> dict[str, np.ndarray]:
        return {seam: self.parts[name][seam] for seam in tensors}


def hollow(folder: Path, size: str, layers: int | None, vision_layers: int | None) -> Checkpoint:
    """A checkpoint of the right names, shapes and length whose weights are a hole in the file."""
    what = plan(size, layers, vision_layers, shard_bytes=1 << 62)
    header, end = {}, 0
    for name, shape in what.shards[0]:
        count = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(what.config))
    from harness.checkpoint import EMBEDDED

    for name in HUB_FILES:
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    return Checkpoint(folder)


@torch.no_grad()
def filled(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, list]:
    """The model with random weights, drawn on the device."""
    model = skeleton(checkpoint, "sdpa")
    with WeightReader(checkpoint) as reader:
        stages = stages_of(model, checkpoint.geometry, reader.shapes())
    generator = torch.Generator(device).manual_seed(0)
    _constants_to(model, device)
    seen: dict[int, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in seen:
                full, shape = f"{path}.{name}", tuple(parameter.shape)
                value = torch.randn(shape, generator=generator, device=device)
                if len(shape) > 1:
                    value *= std_of(full, shape)
                elif full.endswith("bias"):
                    value *= 0.05
                else:
                    value.mul_(0.25).add_(1)
                seen[id(parameter)] = torch.nn.Parameter(value.to(torch.bfloat16).float(), requires_grad=False)
            module._parameters[name] = seen[id(parameter)]
    return model, stages


class Run:
    """The sections; each adds to `found` and is guarded, so that one that fails does not take the others with it."""

    def __init__(self, out: Path, device: torch.device, rounds: int) -> None:
        self.out, self.device, self.rounds, self.found = out, device, rounds, {"failed": {}}

    def section(self, name: str, call: Any) -> None:
        started = time.perf_counter()
        try:
            self.found[name] = call()
        except Exception as error:  # noqa: BLE001  the other sections still count
            traceback.print_exc()
            self.found["failed"][name] = f"{type(error).__name__}: {error}"
        print(f"[{time.perf_counter() - started:6.1f} s] {name}: {json.dumps(self.found.get(name))}", flush=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, call: Any, rounds: int | None = None, warm: int = 2) -> dict[str, float]:
        for _ in range(warm):
            call()
        return summary([self.spent(call) for _ in range(rounds or self.rounds)])

    def spent(self, call: Any) -> float:
        """Seconds of one call, to the end of what it sent to the GPU."""
        self.sync()
        started = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - started

    def paired(self, yardstick: Any, set_up: Callable[[], AbstractContextManager[Any]], turn: int = 5) -> dict[str, Any]:
        """A call that `set_up` gives beside a yardstick, `turn` rounds of each by turns, behind one that does not count."""
        ours, theirs = [], []
        while len(ours) < self.rounds:
            yardstick()
            theirs += [self.spent(yardstick) for _ in range(turn)]
            with set_up() as call:
                call()
                ours += [self.spent(call) for _ in range(turn)]
        found, plain = summary(ours), summary(theirs)
        return found | {"plain_median_s": plain["median_s"], "plain_least_s": plain["least_s"],
                        "ratio": round(statistics.median(ours) / statistics.median(theirs), 4)}


def summary(spent: list[float]) -> dict[str, float]:
    return {"median_s": round(statistics.median(spent), 5), "least_s": round(min(spent), 5), "rounds": len(spent)}


def describe(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "gpu": gpu, "cores": os.cpu_count(), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(), "switches": true_fp32()}


def tf32(device: torch.device) -> dict[str, float]:
    """Relative error of a product and a convolution against float64, with our switches and with TF32 allowed."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(2048, 2048, device=device, generator=generator) for _ in range(2))
    image = torch.randn(1, 64, 64, 64, device=device, generator=generator)
    kernel = torch.randn(64, 64, 3, 3, device=device, generator=generator)

    def errors() -> list[float]:
        found = []
        for call, parts in ((torch.matmul, (left, right)), (torch.nn.functional.conv2d, (image, kernel))):
            exact = call(*(part.double() for part in parts))
            found.append(float((call(*parts).double() - exact).norm() / exact.norm()))
        return found

    true_fp32()
    ours = errors()
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    wide = errors()
    true_fp32()
    return {"matmul": ours[0], "conv": ours[1], "matmul_tf32": wide[0], "conv_tf32": wide[1], "again": errors()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("gpu-record.json"))
    parser.add_argument("--size", default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vision-layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--disk", type=Path, help="directory with room for a checkpoint and an oracle")
    given = parser.parse_args()
    device, run = torch.device(given.device), None
    run = Run(given.out, device, given.rounds)
    run.section("machine", lambda: describe(device))
    run.section("tf32", lambda: tf32(device))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = hollow(Path(folder), given.size, given.layers, given.vision_layers)
        inputs = freeze(CASE, checkpoint)
        model, stages = filled(checkpoint, device)
        measure(run, checkpoint, inputs, model, stages)
        del model, stages
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if given.disk:
        run.section("disk", lambda: from_disk(run, given, device))
    table(run.found)


def measure(run: Run, checkpoint: Checkpoint, inputs: Any, model: Any, stages: list) -> None:
    device, geometry = run.device, checkpoint.geometry
    seams, source = wanted_seams(geometry), Resident(model)
    tokens = np.full(CASE.decode, 7, dtype=np.int32)
    run.section("plain", lambda: run.timed(lambda: forward(model, inputs, tokens)))
    run.section("naive", lambda: run.timed(lambda: naive(model, geometry, seams, inputs, tokens), 5))
    run.section("generate", lambda: generated(run, model, inputs))
    draft = run.found.get("generate", {}).get("tokens", tokens.tolist())
    with Drain(device) as drain, torch.no_grad():
        @contextmanager
        def recording() -> Iterator[Any]:
            with SeamHooks(model, geometry, seams) as hooks, \
                    parking(module for stage in stages for module in stage.modules) as real:
                bench = Bench(model, geometry, device, hooks, drain, stages)

                def whole(out: Any = None) -> None:
                    job = Whole(bench, inputs, tokens, seams, out or InMemory(), "k")
                    for stage, tensors in source.stages([stage for stage in stages if job.needs(stage)]):
                        job.run(stage, tensors, real)
                    drain.flush()

                whole.bench, whole.real = bench, real
                yield whole

        run.section("record", lambda: run.paired(lambda: forward(model, inputs, tokens), recording))
        with recording() as whole:
            def lane(draft: list[int]) -> Lane:
                held = Lane(CASE, inputs, seams, Kept(), geometry, draft)
                _passes([held], whole.bench, source, whole.real, lambda *_: None)
                return held

            run.section("tokens_right", lambda: run.timed(lambda: lane(draft), 5, 1) | verdict(lane(draft)))
            wrong = [*draft[:12], (draft[12] + 1) % 400, *draft[13:]]
            run.section("tokens_one_wrong", lambda: run.timed(lambda: lane(wrong), 3, 1) | verdict(lane(wrong)))
            ours = Kept()
            run.section("held", lambda: whole(ours) or {"parts": len(ours.parts)})
    run.section("equal", lambda: equal(ours, model, geometry, seams, inputs, tokens))
    run.section("plain_again", lambda: run.timed(lambda: forward(model, inputs, tokens)))
    if device.type == "cuda":
        run.section("gpu_memory", lambda: {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)})


def naive(model: Any, geometry: Any, seams: Any, inputs: Any, tokens: Any) -> None:
    """What one writes first: a hook on every layer, `.cpu()` in it."""
    kept, handles = [], []
    for module in (*model.model.visual.blocks, *model.model.language_model.layers, model.model.language_model.norm,
                   model.lm_head):
        handles.append(module.register_forward_hook(
            lambda _, __, value: kept.append((value[0] if isinstance(value, tuple) else value).cpu())))
    output = forward(model, inputs, tokens)
    kept += [part.cpu() for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
    for handle in handles:
        handle.remove()


def generated(run: Run, model: Any, inputs: Any) -> dict[str, Any]:
    ids = torch.from_numpy(inputs.ids.astype(np.int64))[None].to(run.device)
    extra = {"pixel_values": torch.from_numpy(inputs.patches).to(run.device),
             "image_grid_thw": torch.tensor([inputs.grid], device=run.device)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    model.generation_config.eos_token_id = None
    last = []

    def call() -> None:
        model.model.rope_deltas = None
        last[:] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                 max_new_tokens=CASE.decode, **extra)[0, ids.shape[1]:].tolist()

    return run.timed(call, 3, 1) | {"tokens": list(last)}


def verdict(lane: Lane) -> dict[str, Any]:
    return {"passes": lane.passes, "finished": hasattr(lane.out, "facts"), "tokens": lane.tokens.tolist()}


def equal(ours: Kept, model: Any, geometry: Any, seams: Any, inputs: Any, tokens: Any) -> dict[str, Any]:
    """Seams of our pass beside hooks on one plain forward: how many are the same bits, the largest difference."""
    with SeamHooks(model, geometry, seams) as hooks:
        forward(model, inputs, tokens)
    parts = {seam: array for part in ours.parts.values() for seam, array in part.items()}
    parts["logits"] = np.concatenate([parts[name] for name in sorted(parts) if name.startswith("logits.")], axis=1)
    same, worst = 0, 0.0
    for seam, array in hooks.arrays().items():
        same += bool(np.array_equal(array, parts[seam]))
        worst = max(worst, float(np.linalg.norm(array - parts[seam]) / np.linalg.norm(array)))
    return {"seams": len(seams), "same_bits": same, "worst_relative_l2": worst}


def from_disk(run: Run, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A checkpoint in shards, recorded as a user would; seconds of each step."""
    import shutil

    spent, folder = {}, Path(tempfile.mkdtemp(prefix="bench-", dir=given.disk))
    try:
        for name, call in (("synth", lambda: synthesize(plan(given.size, given.layers, given.vision_layers), folder / "m")),
                           ("digest", lambda: Checkpoint(folder / "m").digest),
                           ("record", lambda: record(Checkpoint(folder / "m"), [CASE], folder / "o", device=given.device))):
            started = time.perf_counter()
            result = call()
            spent[f"{name}_s"] = round(time.perf_counter() - started, 2)
            print(f"    disk {name}: {spent[f'{name}_s']} s", flush=True)
        facts = result.case(CASE.name).facts
        return spent | {"passes": facts["passes"], "noise": result.case(CASE.name).noise,
                        "oracle_bytes": sum(path.stat().st_size for path in (folder / "o").rglob("*") if path.is_file())}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(found: dict[str, Any]) -> None:
    """Ratios to the plain forward; of the record, to those between its own rounds."""
    plain = min(found[name]["median_s"] for name in ("plain", "plain_again") if name in found)
    print(f"\n{'':18} {'median':>10} {'x plain':>8}")
    for name in ("plain", "plain_again", "naive", "record", "generate", "tokens_right", "tokens_one_wrong"):
        if name in found:
            ratio = found[name].get("ratio", found[name]["median_s"] / plain)
            print(f"{name:18} {found[name]['median_s']:9.4f}s {ratio:8.3f}")
    also = ("tf32", "gpu_memory", "disk", "equal", "failed")
    print(json.dumps({name: value for name, value in found.items() if name in also}))


if __name__ == "__main__":
    main()
