"""Recording at full geometry beside what people do today, each in a process of its own; results as JSON.

    python reports/bench/record.py CHECKPOINT OUT.json [--runs rates,plain,accelerate,ours] [--memory 3GiB] [--cases N]

plain: Hugging Face's model loaded whole in float32, one forward of the same prompt and tokens. accelerate: the same with
a device map that offloads to disk, at a limit of 2 GiB. ours: `harness record` of the same case, from the command to the
finished oracle, with the tokens as a draft. rates: what bounds it: float32 GEMM, reading, widening. The draft is made by
a first recording without one (`--runs draft`), whose passes are measured too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from measured import ROOT, machine, run

CASE = "scene-211"


def rates(root: Path) -> dict[str, float]:
    """GFLOP/s of the decoder's widest product at 235 tokens; GB/s of stored bytes read (cold), and read warm and widened."""
    import os

    import torch

    from harness.checkpoint import Checkpoint
    from harness.streaming.reading import WeightReader

    checkpoint = Checkpoint(root)
    geometry, name = checkpoint.geometry, "model.language_model.layers.{}.mlp.up_proj.weight"
    x, weight = torch.randn(235, geometry.hidden), torch.randn(geometry.intermediate, geometry.hidden)
    best = min(_timed(lambda: torch.nn.functional.linear(x, weight)) for _ in range(20))
    found = {"gemm_gflops": 2 * x.shape[0] * weight.numel() / best / 1e9}
    target = torch.zeros_like(weight)
    with WeightReader(checkpoint) as reader:
        for path, handle in reader._handles.items():
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer, size = bytearray(1 << 22), 0
        path = max(checkpoint.files, key=lambda one: one.stat().st_size)
        with path.open("rb", buffering=0) as file:
            started = time.perf_counter()
            while size < 2e9 and (got := file.readinto(buffer)):
                size += got
            found["read_cold_gb_s"] = size / (time.perf_counter() - started) / 1e9
        reader.fill(name.format(0), target)
        best = min(_timed(lambda: reader.fill(name.format(0), target)) for _ in range(5))
    return found | {"widen_gb_s": 2 * target.numel() / best / 1e9}


def _timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plain(root: Path, tokens: list[int], offload: str | None) -> dict[str, float]:
    """Load with Hugging Face, run one forward of prompt + tokens."""
    from harness.cases import load_cases
    from harness.checkpoint import Checkpoint
    from harness.oracle import forward, freeze, load_model, true_fp32

    true_fp32()
    checkpoint = Checkpoint(root)
    inputs = freeze(next(case for case in load_cases() if case.name == CASE), checkpoint)
    started = time.perf_counter()
    if offload:
        import torch
        from transformers import Qwen3VLForConditionalGeneration

        model = Qwen3VLForConditionalGeneration.from_pretrained(
            root, dtype=torch.float32, device_map="auto", max_memory={"cpu": "2GiB"}, offload_folder=offload).eval()
    else:
        model = load_model(checkpoint)
    loaded = time.perf_counter()
    if offload:
        import torch
        from harness.oracle.rollout import arguments

        with torch.no_grad():
            model(**arguments(inputs, tokens, torch.device("cpu")))
    else:
        forward(model, inputs, tokens)
    return {"load_s": round(loaded - started, 2), "forward_s": round(time.perf_counter() - loaded, 2)}


def bound(geometry, measured: dict, weight_bytes: int, cases: int, decode: int) -> dict[str, float]:
    """Seconds that products and weights take at the measured rates; the larger where they overlap."""
    g = geometry
    tokens, patches = 211 + decode, 784
    layer = g.hidden * g.head_dim * 2 * (g.heads + g.kv_heads) + 3 * g.hidden * g.intermediate
    block = 4 * g.vision_hidden**2 + 2 * g.vision_hidden * g.vision_intermediate
    joined = g.vision_hidden * g.merge**2
    mergers = (1 + len(g.deepstack_taps)) * (joined**2 + joined * g.hidden)
    products = 2 * cases * (tokens * (g.layers * layer + g.vocab * g.hidden)
                            + patches * (g.vision_layers * block + g.patch_features * g.vision_hidden)
                            + patches // g.merge**2 * mergers)
    compute, read = products / measured["gemm_gflops"] / 1e9, weight_bytes / measured["widen_gb_s"] / 1e9
    return {"tflop": round(products / 1e12, 2), "compute_s": round(compute, 2), "read_s": round(read, 2),
            "bound_s": round(max(compute, read), 2), "sum_s": round(compute + read, 2)}


def ours(root: Path, folder: Path, cases: Path, memory: str, draft: Path | None) -> list[str]:
    """The command line of a recording."""
    command = [sys.executable, "-m", "harness.cli", "record", str(root), "--cases", str(cases), "--out", str(folder),
               "--memory", memory]
    return command + (["--draft", str(draft)] if draft else [])


def cases_file(folder: Path, count: int, decode: int) -> Path:
    """The first `count` cases with an image of 448 x 448, `scene-211` first, as a cases.toml beside their images."""
    text = (ROOT / "ladders" / "cases.toml").read_text(encoding="utf-8").split("[[case]]")
    kept = [part for part in text[1:] if "images/scene" in part or 'image = "white' in part or 'image = "noise' in part]
    shutil.copytree(ROOT / "ladders" / "images", folder / "images", dirs_exist_ok=True)
    more = [f'\nname = "noise-{seed}"\nwhy = "as noise"\nturns = [{{ role = "user", text = "Describe this image.", '
            f'image = "noise:448x448:{seed}" }}]\n' for seed in range(count)]
    path = folder / f"cases-{count}.toml"
    text = "".join(f"[[case]]\ndecode = {decode}{part}" for part in [*kept, *more][:count])
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", default="rates,plain,accelerate,draft,ours")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--decode", type=int, default=24, help="tokens to decode (default: 24)")
    parser.add_argument("--draft", type=Path, help="where the draft is kept (default: beside OUT)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    draft = given.draft or given.out.with_suffix(".draft.json")
    tokens = json.loads(draft.read_text())[CASE] if draft.exists() else [1] * 24
    if given.child:
        child(given, tokens)
        return
    from harness.checkpoint import Checkpoint

    held = json.loads(given.out.read_text()) if given.out.exists() else {"runs": {}}
    held["machine"], held["checkpoint"] = machine(), given.checkpoint.name
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.out.parent) as scratch:
        for name in given.runs.split(","):
            again = [sys.executable, __file__, str(given.checkpoint), str(given.out), "--child", name, "--draft", str(draft)]
            if name in ("draft", "ours"):
                folder, cases = Path(scratch) / name, cases_file(Path(scratch), given.cases, given.decode)
                again = ours(given.checkpoint, folder, cases, given.memory, draft if name == "ours" else None)
            found = run(name, again)
            if name == "draft":
                keep_draft(folder, draft)
            if name in ("draft", "ours"):
                found["oracle"] = facts(folder)
                shutil.rmtree(folder)
            held["runs"][name if given.cases == 1 else f"{name}-{given.cases}"] = found
            if "rates" in held["runs"]:
                checkpoint = Checkpoint(given.checkpoint)
                size = sum(path.stat().st_size for path in checkpoint.files)
                held["bound"] = {count: bound(checkpoint.geometry, held["runs"]["rates"]["said"], size, count, given.decode)
                                 for count in (1, given.cases)}
            given.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def child(given: argparse.Namespace, tokens: list[int]) -> None:
    if given.child == "rates":
        print(json.dumps(rates(given.checkpoint)))
        return
    with tempfile.TemporaryDirectory(prefix="offload-", dir=given.out.parent) as folder:
        print(json.dumps(plain(given.checkpoint, tokens, folder if given.child == "accelerate" else None)))


def keep_draft(folder: Path, draft: Path) -> None:
    from harness.store import Oracle

    oracle = Oracle.open(folder)
    draft.write_text(json.dumps({name: oracle.case(name).rollout.tokens.tolist() for name in oracle.cases}) + "\n")


def facts(folder: Path) -> dict:
    from harness.store import Oracle

    oracle = Oracle.open(folder)
    return {"digest": oracle.digest, "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "cases": {name: oracle.case(name).facts for name in oracle.cases}}


if __name__ == "__main__":
    main()
