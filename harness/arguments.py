"""What each verb takes on the command line: one function a group of arguments."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path


def subject(parser: argparse.ArgumentParser) -> None:
    """What is under test and what it is judged by."""
    from harness.options import ENGINES

    add = parser.add_argument
    add("checkpoint", nargs="?", help="HF model directory or hub id (default: the embedded tiny one)")
    add("--revision", help="revision of a hub id")
    add("--graph", metavar="MODULE:FACTORY", help="torch graph under test (default: ours)")
    add("--bundle", type=Path, metavar="DIR", help="LanguageBundle under test (default: export one)")
    add("--vision-bundle", type=Path, metavar="DIR", help="vision bundle that goes with it")
    add("--oracle", type=Path, metavar="DIR", help="recorded oracle, or a sketch of one (default: record or resume one)")
    add("--mode", choices=("fp16", "int8lin", "int8hu"), help="mode of the bundle we export (default: int8hu)")
    add("--grid", type=_grid, metavar="HxW", help="patch grid that the bundle is made for (default: 28x28)")
    add("--engine", choices=ENGINES, metavar="ENGINE",
        help=f"what runs the bundle: {', '.join(ENGINES)} (default: coreai; replay runs its own program in torch)")
    add("--device", choices=("cpu", "cuda"), help="where torch computes (default: cpu)")
    add("--memory", type=_size, metavar="SIZE",
        help="memory that recording, and rungs that stream, may hold at once (default: 4GiB)")
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
        help="tokens by case that are likely right: {case: [ids]}, or the run.json of a report; saves passes, and the time "
             "that the model takes to make a draft of its own")
    add("--inside", metavar="LAYERS", help="also record the inside of layers: all, or numbers such as 0,1,5")


def sketch(parser: argparse.ArgumentParser) -> None:
    """`harness sketch`."""
    parser.add_argument("oracle", type=Path, help="recorded oracle")
    parser.add_argument("out", type=Path, help="new folder for the sketch")


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
    add("--tmp", type=Path, metavar="DIR", help="where temporary files go (default: TMPDIR)")
    add("--json", action="store_true", help="print paths and sizes as JSON")


def verify(parser: argparse.ArgumentParser) -> None:
    """`harness verify`."""
    parser.add_argument("report", type=Path, help="report folder with run.json and certificate.json")
    parser.add_argument("bundle", type=Path, nargs="?", help="the bundle that the certificate must speak for")
    parser.add_argument("--vision-bundle", type=Path, metavar="DIR", help="vision bundle that it must speak for too")
    _held_against(parser)


def publish_check(parser: argparse.ArgumentParser) -> None:
    """`harness publish-check`."""
    parser.add_argument("bundle", type=Path, help="the bundle, of either kind, that is to be published")
    parser.add_argument("--certificate", type=Path, metavar="DIR",
                        help="report folder (default: BUNDLE.report, or the nearest folder above the bundle with one)")
    _held_against(parser)


def _held_against(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--policy", type=Path, metavar="TOML", help="policy that the run's own must not be laxer than")
    add("--bounds", type=Path, metavar="TOML",
        help="bounds that the run's own must not be wider than (default: this repository's, for its own checkpoint)")
    add("--cases", type=Path, metavar="TOML", help="cases that the run must have judged, on the engine where they say so")
    add("--signed-by", metavar="KEY", help="minisign public key, a file or its text, that must have signed the certificate")


def report(parser: argparse.ArgumentParser) -> None:
    """`harness report`."""
    add = parser.add_argument
    add("report", type=Path, nargs="*", help="report folder with run.json; two folders: what changed between them")
    add("--card", action="store_true", help="print the section for a model card")
    add("--annotations", action="store_true", help="print GitHub's annotations of what did not hold, and nothing else")
    add("--link", metavar="URL", help="where report.md says that the whole report is (default: the files beside it)")
    add("--sign", type=Path, metavar="KEY", help="also sign the certificate with this minisign secret key")
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
    add("--only", action="append", metavar="PATTERN", help="only faults whose name matches (may be repeated)")
    add("--fast", action="store_true", help="a few faults of each class on three cases, without a bundle")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--benign", action="store_true", help="healthy variations instead: none may be flagged")
    other.add_argument("--power", action="store_true", help="instead, the smallest error that each rung sees at each seam")
    add("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--out", type=Path, metavar="DIR",
        help="folder (default: reports/faults; build/faults for some of the faults, which are no scoreboard)")
    add("--json", action="store_true", help="print the record instead of the table")


def replay(parser: argparse.ArgumentParser) -> None:
    """`harness replay`."""
    add = parser.add_argument
    add("bundle", type=Path, help="bundle directory of either kind, or an .aimodel")
    add("--print", action="store_true", help="print the torch source that replay runs")
    add("--order", choices=("steps", "layers"), default="steps",
        help="steps: one call; layers: many tokens of a one-token program, layer by layer")
    add("--arithmetic", choices=("fp32", "fp16", "coreai-cpu"), default="fp32", help="which arithmetic it is printed for")
    add("--function", metavar="NAME", help="a function besides the main one")


def pair(parser: argparse.ArgumentParser) -> None:
    """`harness diff`."""
    for name in ("left", "right"):
        parser.add_argument(name, type=Path, help="bundle directory of either kind, or an .aimodel")


def nothing(parser: argparse.ArgumentParser) -> None:
    """For a verb without arguments."""
