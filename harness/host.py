"""The reference host: what a native app does around a bundle, written without transformers.

Ids, patches and grid are made here a second time, from tokenizer.json and a few numbers, and compared with the frozen
inputs by the `inputs` rung. Sources: ChatML as the Qwen3-VL chat template renders it; HF `Qwen2VLImageProcessor` for
sizes, values and the order of patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tokenizers import Tokenizer

from harness.cases import Case, FrozenInputs, Turn
from harness.errors import HarnessError, within
from harness.graph.contract import host_inputs, positions

IMAGE_PAD = "<|image_pad|>"
GENERATED = re.compile(r"(white|noise):(\d{1,5})x(\d{1,5})(?::(\d+))?")


@dataclass(frozen=True)
class Preprocessing:
    """Numbers of preprocessor_config.json.

    Sizes in pixels; `least` and `most` bound height x width; mean and std are of values in 0..1, by colour.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int
    temporal: int
    merge: int
    least: int
    most: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read the parsed JSON. Raises HarnessError naming the key that is missing or not supported."""
        try:
            size = config["size"]
            read = cls(tuple(config["image_mean"]), tuple(config["image_std"]), config["patch_size"],
                       config["temporal_patch_size"], config["merge_size"], size["shortest_edge"], size["longest_edge"])
        except (KeyError, TypeError) as error:
            raise HarnessError(f"the key {error} is missing", where="preprocessor_config.json",
                               fix="add it; no default is assumed") from error
        if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255) or config.get("resample", 3) != 3:
            raise HarnessError("only 8-bit rescaling and bicubic resizing are supported",
                               where="preprocessor_config.json")
        return read


def host_inputs_for(case: Case, tokenizer_dir: Path, preprocessing: Preprocessing) -> FrozenInputs:
    """What a native app computes for the case; the fields of FrozenInputs mean the same.

    Positions come from the contract's formula, which asks of V only that no text id reaches it.
    Raises HarnessError for a missing tokenizer.json, a lost image, or image tokens that do not match the grid.
    """
    with within(case.name):
        tokenizer = load_tokenizer(tokenizer_dir)
        patches, grid, merged = None, None, None
        if case.images:
            patches, grid = make_patches(load_image(case.images[0], case.root), preprocessing)
            merged = grid[1] // preprocessing.merge, grid[2] // preprocessing.merge
        count = merged[0] * merged[1] if merged else 0
        text = render(case).replace(IMAGE_PAD, IMAGE_PAD * count)
        ids = np.array(tokenizer.encode(text).ids, dtype=np.int32)
        vocab = tokenizer.get_vocab_size(with_added_tokens=True)
        host = host_inputs(ids, tokenizer.token_to_id(IMAGE_PAD), vocab, merged)
        planes = positions(host.ids, vocab, host.shift_start, host.shift_amount, merged[1] if merged else 1)
        return FrozenInputs(case.name, ids, planes, patches, grid)


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a directory. Raises HarnessError where it is missing, malformed, or lacks the image token."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise HarnessError("the file is missing", where=path, fix="the bundle must carry its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise HarnessError(f"no tokenizer can be read from it ({error})", where=path) from error
    if tokenizer.token_to_id(IMAGE_PAD) is None:
        raise HarnessError(f"has no token {IMAGE_PAD}", where=path, fix="give the tokenizer of a Qwen3-VL checkpoint")
    return tokenizer


def render(case: Case) -> str:
    """The prompt as text, with one image token a picture: ChatML and an open assistant turn, or raw text where no turn
    has a role."""
    raw = [not turn.role for turn in case.turns]
    if all(raw):
        return "".join(_content(turn) for turn in case.turns)
    if any(raw):
        raise HarnessError("some turns have a role and some have none", where=case.name, fix="give all a role, or none")
    turns = (f"<|im_start|>{turn.role}\n{_content(turn)}<|im_end|>\n" for turn in case.turns)
    return "".join(turns) + "<|im_start|>assistant\n"


def _content(turn: Turn) -> str:
    image = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>" if turn.image else ""
    return turn.text + image if turn.image_after_text else image + turn.text


def load_image(reference: str, root: Path) -> Image.Image:
    """An RGB image from a path relative to `root`, or `white:WxH`, or `noise:WxH:seed` (uniform bytes, numpy PCG64).

    Raises HarnessError for a missing or unreadable file, or a path that leaves `root`.
    """
    match = GENERATED.fullmatch(reference)
    if match and match[1] == "white":
        return Image.new("RGB", (int(match[2]), int(match[3])), "white")
    if match:
        generator = np.random.default_rng(int(match[4] or 0))
        return Image.fromarray(generator.integers(0, 256, (int(match[3]), int(match[2]), 3), dtype=np.uint8))
    path = Path(root) / reference
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise HarnessError("the image lies outside the directory of the cases file", where=path)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise HarnessError("the image is missing", where=path) from error
    except (UnidentifiedImageError, OSError) as error:
        raise HarnessError(f"the image cannot be read ({error})", where=path) from error


def target_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width in pixels that an image is resized to: multiples of patch x merge, area within the bounds.

    Source: HF `smart_resize`.
    """
    factor = preprocessing.patch * preprocessing.merge
    rounded = round(height / factor) * factor, round(width / factor) * factor
    area = rounded[0] * rounded[1]
    if area > preprocessing.most:
        shrink = math.sqrt(height * width / preprocessing.most)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if area < preprocessing.least:
        grow = math.sqrt(preprocessing.least / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return rounded


def make_patches(image: Image.Image, preprocessing: Preprocessing) -> tuple[np.ndarray, tuple[int, int, int]]:
    """RGB image -> patches [P, channels x temporal x patch x patch] float32 and grid (1, rows, columns) in patches.

    Rows are block-major: merge x merge patches of a block together, blocks row by row. A still image fills every
    temporal slot alike.
    """
    height, width = target_size(image.height, image.width, preprocessing)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    patch, merge = preprocessing.patch, preprocessing.merge
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, block column, row, column, colour, y, x
    still = np.repeat(ordered[:, :, :, :, :, None], preprocessing.temporal, axis=5)
    return np.ascontiguousarray(still.reshape(rows * columns, -1)), (1, rows, columns)
