"""Recording at full geometry beside what people do today, each in a process of its own; results as JSON.

    python reports/bench/record.py CHECKPOINT OUT.json [--runs rates,plain,generate,undrafted,drafted] [--memory 3GiB]
    python reports/bench/record.py CHECKPOINT OUT.json --runs undrafted,drafted --cases 8 --kind text --decode 2

plain: Hugging Face's model loaded whole in float32, one forward of the same prompt and tokens (not for the 8B on a small
machine). accelerate: the same with a device map that offloads to disk, at a limit of 2 GiB. generate: loaded whole, 24
greedy tokens by cached decoding, which is what someone without a draft has to do before that forward. undrafted: `harness
record` of the case, from the command to the finished oracle, where nobody has a draft of its tokens: it makes its own.
drafted: the same with the tokens that `undrafted` found as a draft. rates: what bounds them: float32 products at the row
counts of these runs, reading, widening. One case is `scene-211` (211 tokens, 196 of them image); --kind text: prompts of
some 20 tokens, where reading the weights is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from measured import ROOT, machine, run, written

CASE = "scene-211"


def rates(root: Path) -> dict[str, float]:
    """GFLOP/s of all products of a decoder layer, of a vision block and of a block of the head, at the rows of the run;
    GB/s of stored bytes read cold, and read warm and widened; of sha256, which the bound leaves out."""
    import hashlib

    import torch

    from harness.checkpoint import Checkpoint
    from harness.streaming.reading import WeightReader
    from harness.streaming.stages import head_rows

    checkpoint = Checkpoint(root)
    g = checkpoint.geometry
    queries, keys, rows = g.heads * g.head_dim, g.kv_heads * g.head_dim, 211 + 24
    products = {"layer": (rows, [(g.hidden, queries), (g.hidden, keys), (g.hidden, keys), (queries, g.hidden),
                                 (g.hidden, g.intermediate), (g.hidden, g.intermediate), (g.intermediate, g.hidden)]),
                "block": (784, [(g.vision_hidden, 3 * g.vision_hidden), (g.vision_hidden, g.vision_hidden),
                                (g.vision_hidden, g.vision_intermediate), (g.vision_intermediate, g.vision_hidden)]),
                "head": (rows, [(g.hidden, head_rows(g))])}
    found = {f"{name}_gflops": gflops(*shapes) for name, shapes in products.items()}
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    found["read_cold_gb_s"] = cold(max(checkpoint.files, key=lambda one: one.stat().st_size))
    with WeightReader(checkpoint) as reader:
        target = torch.zeros(reader.shapes()[name])
        best = min(_timed(lambda: reader.fill(name, target)) for _ in range(6))
        found["widen_gb_s"] = 2 * target.numel() / best / 1e9
    block = bytes(1 << 26)
    return found | {"sha256_gb_s": len(block) / min(_timed(lambda: hashlib.sha256(block)) for _ in range(3)) / 1e9}


def gflops(rows: int, shapes: list[tuple[int, int]]) -> float:
    """Of products [rows, from] x [from, to] one after another, each with weights of its own: no cache holds them all."""
    import torch

    weights = [torch.randn(to, of) for of, to in shapes]
    inputs = [torch.randn(rows, of) for of, _ in shapes]
    best = min(_timed(lambda: [torch.nn.functional.linear(x, weight) for x, weight in zip(inputs, weights)])
               for _ in range(6))
    return 2 * rows * sum(of * to for of, to in shapes) / best / 1e9


def cold(path: Path) -> float:
    """GB/s of the file's first GiB, which the page cache does not hold when this begins and holds again afterwards."""
    buffer, size = bytearray(1 << 22), 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 1 << 30, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while size < 1 << 30 and (got := file.readinto(buffer)):
            size += got
        return size / (time.perf_counter() - started) / 1e9


def _timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plain(root: Path, tokens: list[int], offload: str | None, decode: bool = False) -> dict[str, float]:
    """Load with Hugging Face, run one forward of prompt + tokens; or decode as many tokens."""
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
    elif decode:
        from harness.oracle.rollout import best_of, greedy

        choose = best_of([model.lm_head.weight], checkpoint.geometry.image_token)
        greedy(model, choose, inputs, [], len(tokens), model.lm_head.weight.device)
    else:
        forward(model, inputs, tokens)
    return {"load_s": round(loaded - started, 2), "forward_s": round(time.perf_counter() - loaded, 2)}


def bound(g, measured: dict, weight_bytes: int, cases: list[tuple[int, int]]) -> dict[str, float]:
    """Seconds that products and weights take at the measured rates, in one pass; the larger where they overlap.

    cases: tokens (prompt and decoded) and patches of each. measured: what `rates` found.
    """
    tokens, patches = map(sum, zip(*cases))
    layer = g.hidden * g.head_dim * 2 * (g.heads + g.kv_heads) + 3 * g.hidden * g.intermediate
    block = 4 * g.vision_hidden**2 + 2 * g.vision_hidden * g.vision_intermediate
    joined = g.vision_hidden * g.merge**2
    mergers = (1 + len(g.deepstack_taps)) * (joined**2 + joined * g.hidden)
    products = {"layer": tokens * g.layers * layer, "head": tokens * g.vocab * g.hidden,
                "block": patches * (g.vision_layers * block + g.patch_features * g.vision_hidden)
                + patches // g.merge**2 * mergers}
    compute = sum(2 * count / measured[f"{name}_gflops"] / 1e9 for name, count in products.items())
    read = weight_bytes / measured["widen_gb_s"] / 1e9
    return {"tflop": round(2 * sum(products.values()) / 1e12, 2), "compute_s": round(compute, 2),
            "read_s": round(read, 2), "bound_s": round(max(compute, read), 2), "sum_s": round(compute + read, 2)}


def ours(root: Path, folder: Path, cases: Path, memory: str, draft: Path | None) -> list[str]:
    """The command line of a recording."""
    command = [sys.executable, "-m", "harness.cli", "record", str(root), "--cases", str(cases), "--out", str(folder),
               "--memory", memory]
    return command + (["--draft", str(draft)] if draft else [])


def cases_file(folder: Path, count: int, decode: int, kind: str) -> Path:
    """`count` cases as a cases.toml: with an image of 448 x 448, `scene-211` first; or of a few words."""
    text = (ROOT / "ladders" / "cases.toml").read_text(encoding="utf-8").split("[[case]]")
    kept = [part for part in text[1:] if "images/scene" in part or 'image = "white' in part or 'image = "noise' in part]
    shutil.copytree(ROOT / "ladders" / "images", folder / "images", dirs_exist_ok=True)
    more = [f'\nname = "noise-{seed}"\nwhy = "as noise"\nturns = [{{ role = "user", text = "Describe this image.", '
            f'image = "noise:448x448:{seed}" }}]\n' for seed in range(count)]
    if kind == "text":
        kept, more = [], [f'\nname = "text-{seed}"\nwhy = "few tokens"\nturns = [{{ role = "user", '
                          f'text = "What comes after {seed}?" }}]\n' for seed in range(count)]
    path = folder / f"cases-{kind}-{count}.toml"
    text = "".join(f"[[case]]\ndecode = {decode}{part}" for part in [*kept, *more][:count])
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", default="rates,plain,accelerate,generate,undrafted,drafted")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--kind", choices=("image", "text"), default="image", help="of the cases (default: image)")
    parser.add_argument("--cold", action="store_true", help="let go of the checkpoint's pages before each recording")
    parser.add_argument("--decode", type=int, default=24, help="tokens to decode (default: 24)")
    parser.add_argument("--draft", type=Path, help="where the draft is kept (default: beside OUT)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    draft = given.draft or given.out.with_suffix(".draft.json")
    if given.child:
        child(given, json.loads(draft.read_text()).get(CASE, [1] * 24) if draft.exists() else [1] * 24)
        return
    held = json.loads(given.out.read_text()) if given.out.exists() else {"runs": {}}
    held["machine"], held["checkpoint"] = machine(), given.checkpoint.name
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.out.parent) as scratch:
        for name in given.runs.split(","):
            whole = name in ("rates", "plain", "accelerate", "generate")
            found = baseline(given, name, draft) if whole else recording(given, name, draft, Path(scratch), held["runs"])
            cold = "-cold" if given.cold else ""
            held["runs"][name if whole else f"{name}-{given.kind}-{given.cases}{cold}"] = found
            given.out.write_text(written(held), encoding="utf-8")


def baseline(given: argparse.Namespace, name: str, draft: Path) -> dict:
    """A run of this script in a process of its own."""
    return run(name, [sys.executable, __file__, str(given.checkpoint), str(given.out), "--child", name,
                      "--draft", str(draft)])


def recording(given: argparse.Namespace, name: str, draft: Path, scratch: Path, runs: dict) -> dict:
    """A run of `harness record`, with what bounds it where the rates are known."""
    from harness.checkpoint import Checkpoint

    folder, cases = scratch / name, cases_file(scratch, given.cases, given.decode, given.kind)
    if given.cold:
        chill(given.checkpoint)
    found = run(name, ours(given.checkpoint, folder, cases, given.memory, draft if name == "drafted" else None))
    if name == "undrafted":
        keep_draft(folder, draft)
    found |= {"oracle": facts(folder), "kind": given.kind + ", cold" * given.cold, "cases": given.cases}
    shutil.rmtree(folder)
    if "rates" in runs:
        checkpoint, patches = Checkpoint(given.checkpoint), 784 if given.kind == "image" else 0
        counts = [(case["prompt_tokens"] + case["decoded"], patches) for case in found["oracle"]["cases"].values()]
        found["bound"] = bound(checkpoint.geometry, runs["rates"]["said"],
                               sum(path.stat().st_size for path in checkpoint.files), counts)
    return found


def chill(root: Path) -> None:
    """The next read of the checkpoint's files is the disk's."""
    for path in root.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(given: argparse.Namespace, tokens: list[int]) -> None:
    if given.child == "rates":
        print(json.dumps(rates(given.checkpoint)))
        return
    with tempfile.TemporaryDirectory(prefix="offload-", dir=given.out.parent) as folder:
        print(json.dumps(plain(given.checkpoint, tokens, folder if given.child == "accelerate" else None,
                               given.child == "generate")))


def keep_draft(folder: Path, draft: Path) -> None:
    from harness.store import Oracle

    oracle = Oracle.open(folder)
    known = json.loads(draft.read_text()) if draft.exists() else {}
    found = {name: oracle.case(name).rollout.tokens.tolist() for name in oracle.cases}
    draft.write_text(json.dumps(known | found) + "\n")


def facts(folder: Path) -> dict:
    from harness.store import Oracle

    oracle = Oracle.open(folder)
    return {"digest": oracle.digest, "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "cases": {name: oracle.case(name).facts for name in oracle.cases}}


if __name__ == "__main__":
    main()
