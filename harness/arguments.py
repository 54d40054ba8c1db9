"""What each verb takes on the command line: one function a group of arguments."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path


def subject(parser: argparse.ArgumentParser) -> None:
    """What is under test and what it is judged by."""
    add = parser.add_argument
    add("checkpoint", nargs="?", help="HF model directory or hub id (default: the embedded tiny one)")
    add("--revision", help="revision of a hub id")
    add("--graph", metavar="MODULE:FACTORY", help="torch graph under test (default: ours)")
    add("--bundle", type=Path, metavar="DIR", help="LanguageBundle under test (default: export one)")
    add("--vision-bundle", type=Path, metavar="DIR", help="vision bundle that goes with it")
    add("--oracle", type=Path, metavar="DIR", help="recorded oracle (default: record or resume one)")
    add("--mode", choices=("fp16", "int8lin", "int8hu"), help="mode of the bundle we export (default: int8hu)")
    add("--grid", type=_grid, metavar="HxW", help="patch grid that the bundle is made for (default: 28x28)")
    add("--device", choices=("cpu", "cuda"), help="where torch computes (default: cpu)")
    add("--memory", type=_size, metavar="SIZE", help="memory that recording may hold at once (default: 4GiB)")
    add("--cases", type=Path, metavar="TOML", help="cases (default: ladders/cases.toml)")
    add("--bounds", type=Path, metavar="TOML", help="bounds (default: ladders/qwen3_vl.toml)")
    add("--policy", type=Path, metavar="TOML", help="policy (default: ladders/policy.toml)")
    add("--timeout", type=_seconds, dest="timeout_s", metavar="S", help="seconds the engine may take (default: 900)")


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r} is no grid of patches; write for example 28x28")
    return int(rows), int(columns)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _size(text: str) -> int:
    """`4GiB`, `900MiB`, `4GB` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 4GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000)**("KMGT".index(match[2].upper()) + 1))


def output(parser: argparse.ArgumentParser) -> None:
    """Where the report goes."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="report folder (default: reports/<checkpoint>-<mode>)")
    parser.add_argument("--json", action="store_true", help="print the run record instead of the table")


def rung(parser: argparse.ArgumentParser) -> None:
    """Which part of the ladder."""
    from harness.ladder import NAMES

    parser.add_argument("--rung", action="append", choices=NAMES, help="only this rung (may be repeated)")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")


def record(parser: argparse.ArgumentParser) -> None:
    """`harness record`."""
    add = parser.add_argument
    add("checkpoint", nargs="?", help="HF model directory or hub id (default: the embedded tiny one)")
    add("--revision", help="revision of a hub id")
    add("--out", type=Path, metavar="DIR", help="oracle folder (default: under oracles/recorded)")
    add("--cases", type=Path, metavar="TOML", help="cases (default: ladders/cases.toml)")
    add("--device", choices=("cpu", "cuda", "auto"), default="cpu",
        help="auto: spread over the GPUs that are there, by Hugging Face's device map (default: cpu)")
    add("--memory", type=_size, metavar="SIZE",
        help="memory that may be held at once, for example 3GiB (default: 4GiB, or a GPU's own)")
    add("--draft", type=Path, metavar="JSON",
        help="tokens by case that are likely right: {case: [ids]}, or the run.json of a report; saves passes")
    add("--inside", metavar="LAYERS", help="also record the inside of layers: all, or numbers such as 0,1,5")


def synth(parser: argparse.ArgumentParser) -> None:
    """`harness synth`."""
    from harness.synth.sizes import SIZES

    add = parser.add_argument
    add("target", type=Path, metavar="DIR", help="where the checkpoint goes; must not be there yet")
    add("--size", choices=tuple(SIZES), required=True, help="geometry of which model")
    add("--seed", type=int, default=0, help="which random weights (default: 0)")
    add("--layers", type=int, metavar="N", help="fewer decoder layers, at full width")
    add("--vision-layers", type=int, metavar="N", help="fewer vision blocks, at full width")


def export(parser: argparse.ArgumentParser) -> None:
    """`harness export`."""
    add = parser.add_argument
    add("checkpoint", nargs="?", help="HF model directory or hub id (default: the embedded tiny one)")
    add("--revision", help="revision of a hub id")
    add("--mode", choices=("fp16", "int8lin", "int8hu"), default="int8hu")
    add("--out", type=Path, metavar="DIR", default=Path("build"), help="where the bundles go (default: build)")
    add("--grid", type=_grid, default=(28, 28), metavar="HxW", help="patch grid of the vision bundle (default: 28x28)")
    add("--context", type=int, default=512, metavar="TOKENS", help="slots of the KV cache (default: 512)")
    add("--dynamic", action="store_true", help="also export the dynamic-S twin")
    add("--activations", choices=("fp16", "fp32"), default="fp16", help="fp32 separates structure from rounding")
    add("--overwrite", action="store_true", help="replace bundles that are there")
    add("--json", action="store_true", help="print paths and sizes as JSON")


def verify(parser: argparse.ArgumentParser) -> None:
    """`harness verify`."""
    parser.add_argument("report", type=Path, help="report folder with run.json and certificate.json")
    parser.add_argument("bundle", type=Path, nargs="?", help="the bundle that the certificate must speak for")
    parser.add_argument("--policy", type=Path, metavar="TOML",
                        help="policy that the run's own must not be laxer than")


def report(parser: argparse.ArgumentParser) -> None:
    """`harness report`."""
    add = parser.add_argument
    add("report", type=Path, nargs="*", help="report folder with run.json; two folders: what changed between them")
    add("--card", action="store_true", help="print the section for a model card")
    add("--index", type=Path, metavar="DIR", help="write DIR/index.html over the reports in DIR")


def calibrate(parser: argparse.ArgumentParser) -> None:
    """`harness calibrate`, besides the subject."""
    parser.add_argument("--out", type=Path, metavar="TOML", required=True, help="where the bounds are written")


def faults(parser: argparse.ArgumentParser) -> None:
    """`harness faults`."""
    from harness.faults import KINDS

    add = parser.add_argument
    add("--class", dest="kinds", action="append", choices=KINDS, metavar="CLASS",
        help=f"only this class (may be repeated): {', '.join(KINDS)}")
    add("--fast", action="store_true", help="a few faults of each class on three cases, without a bundle")
    add("--benign", action="store_true", help="healthy variations instead: none may be flagged")
    add("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--out", type=Path, metavar="DIR", default=Path("reports/faults"), help="folder (default: reports/faults)")
    add("--json", action="store_true", help="print the record instead of the table")


def nothing(parser: argparse.ArgumentParser) -> None:
    """For a verb without arguments."""
