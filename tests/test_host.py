"""The reference host beside Hugging Face's own processing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_models import write_checkpoint

from harness.cases import Case, Turn, load_cases
from harness.checkpoint import Checkpoint, read_json
from harness.errors import HarnessError
from harness.host import Preprocessing, host_inputs_for, load_image, make_patches, render, target_size
from harness.oracle.inputs import freeze, image_processor

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "image": (Turn("user", "Describe this image.", "noise:448x448:1"),),
    "image-after": (Turn("user", "Look: ", "noise:160x128:2", True), Turn("assistant", "Yes."), Turn("user", "And?")),
    "system": (Turn("system", "Be kind."), Turn("user", "Grüße, 北京 👋!")),
    "raw": (Turn("", "Hello\n there"),),
    "raw-image": (Turn("", "Describe", "white:128x256"),),
    "resized": (Turn("user", "Describe", "noise:333x501:3"),),
    "grown": (Turn("user", "Describe", "noise:40x90:3"),),
    "shrunk": (Turn("user", "Describe", "noise:2000x900:3"),),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("model"), layers=3))


@pytest.fixture(scope="module")
def preprocessing(checkpoint: Checkpoint) -> Preprocessing:
    return Preprocessing.from_config(read_json(checkpoint.root / "preprocessor_config.json"))


@pytest.mark.parametrize("name", CASES)
def test_host_makes_what_the_processor_makes(name: str, checkpoint: Checkpoint, preprocessing: Preprocessing) -> None:
    case = Case(name, "test", CASES[name], decode=4)
    frozen, made = freeze(case, checkpoint), host_inputs_for(case, checkpoint.root, preprocessing)
    assert made.ids.dtype == frozen.ids.dtype and np.array_equal(made.ids, frozen.ids)
    assert np.array_equal(made.positions, frozen.positions) and made.positions.dtype == np.int32
    assert made.grid == frozen.grid
    if case.images:
        assert made.patches.dtype == np.float32 and np.abs(made.patches - frozen.patches).max() < 1e-6
    else:
        assert made.patches is None


def test_the_ladders_own_cases_render_alike(checkpoint: Checkpoint, preprocessing: Preprocessing) -> None:
    cases = [case for case in load_cases()
             if all(":" in image or (case.root / image).exists() for image in case.images)]
    assert cases
    for case in cases:
        assert np.array_equal(freeze(case, checkpoint).ids, host_inputs_for(case, checkpoint.root, preprocessing).ids)


def test_a_448_image_is_196_tokens_of_211(checkpoint: Checkpoint, preprocessing: Preprocessing) -> None:
    made = host_inputs_for(Case("c", "w", CASES["image"]), checkpoint.root, preprocessing)
    assert made.length == 211 and (made.ids == checkpoint.geometry.image_token).sum() == 196
    assert made.patches.shape == (784, 1536) and made.grid == (1, 28, 28)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(20, 3000), width=st.integers(20, 3000))
def test_sizes_are_smart_resize(height: int, width: int) -> None:
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    numbers = Preprocessing((0.5,) * 3, (0.5,) * 3, 16, 2, 2, 128 * 128, 1024 * 1024)
    if max(height, width) / min(height, width) <= 200:
        assert target_size(height, width, numbers) == smart_resize(height, width, 32, numbers.least, numbers.most)


def test_patches_are_block_major_with_channels_first() -> None:
    numbers = Preprocessing((0.0,) * 3, (1 / 255,) * 3, 2, 2, 2, 1, 10_000)
    pixels = np.zeros((8, 12, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(8)[:, None], np.arange(12)[None]
    patches, grid = make_patches(Image.fromarray(pixels), numbers)
    assert grid == (1, 4, 6) and patches.shape == (24, 24)
    cells = patches.reshape(24, 3, 2, 2, 2).round().astype(int)
    corners = [(int(cell[0, 0, 0, 0]) // 2, int(cell[1, 0, 0, 0]) // 2) for cell in cells]
    assert corners[:8] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert (cells[:, :, 0] == cells[:, :, 1]).all() and (cells[:, 2] == 0).all()
    assert cells[0, 0, 0].tolist() == [[0, 0], [1, 1]] and cells[0, 1, 0].tolist() == [[0, 1], [0, 1]]


def test_render() -> None:
    text = render(Case("c", "w", (Turn("user", "Hi", "x.png"), Turn("assistant", "Yo"), Turn("user", "Bye", None))))
    assert text == ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
                    "Yo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(HarnessError, match="some turns have a role"):
        render(Case("c", "w", (Turn("user", "Hi"), Turn("", "Yo"))))


def test_images(tmp_path: Path) -> None:
    assert np.asarray(load_image("white:4x2", tmp_path)).shape == (2, 4, 3)
    noise = np.asarray(load_image("noise:64x32:5", tmp_path))
    assert np.array_equal(noise, np.asarray(load_image("noise:64x32:5", tmp_path))) and noise.std() > 60
    assert not np.array_equal(noise, np.asarray(load_image("noise:64x32:6", tmp_path)))
    (tmp_path / "bad.png").write_bytes(b"no image")
    for reference, sentence in {"bad.png": "cannot be read", "lost.png": "missing", "../x.png": "outside",
                                "noise:axb": "missing"}.items():
        with pytest.raises(HarnessError, match=sentence):
            load_image(reference, tmp_path)


def test_preprocessing_has_no_silent_default(checkpoint: Checkpoint) -> None:
    config = read_json(checkpoint.root / "preprocessor_config.json")
    for key in ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size", "size"):
        with pytest.raises(HarnessError, match=key):
            Preprocessing.from_config({name: value for name, value in config.items() if name != key})
    with pytest.raises(HarnessError, match="bicubic"):
        Preprocessing.from_config({**config, "resample": 2})


def test_a_missing_or_foreign_tokenizer(tmp_path: Path, preprocessing: Preprocessing) -> None:
    case = Case("c", "w", CASES["raw"])
    with pytest.raises(HarnessError, match="tokenizer.json"):
        host_inputs_for(case, tmp_path, preprocessing)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HarnessError, match="no tokenizer can be read"):
        host_inputs_for(case, tmp_path, preprocessing)


def test_image_processor_config_must_match(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "m", layers=3))
    path = checkpoint.root / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"merge_size": 2', '"merge_size": 1'))
    with pytest.raises(HarnessError, match="merge_size 1"):
        image_processor(checkpoint)


def test_host_does_without_transformers_and_torch() -> None:
    code = "import sys; sys.modules['transformers'] = sys.modules['torch'] = None; import harness.host"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
