"""ladders/cases.toml holds the kinds of prompt that the ladder claims to cover, whatever their wording."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.cases import FrozenInputs, load_cases
from harness.checkpoint import EMBEDDED, read_json
from harness.host import IMAGE_PAD, Preprocessing, host_inputs_for, load_tokenizer

SIZES = {"images/scene.png": "white:448x448", "images/scene_b.png": "white:448x448", "images/wide.png": "white:448x320"}


@pytest.fixture(scope="module")
def prompts() -> dict[str, FrozenInputs]:
    """Host inputs by case, with white images of the same sizes: only their token counts matter here."""
    numbers = Preprocessing.from_config(read_json(EMBEDDED / "preprocessor_config.json"))
    made = {}
    for case in load_cases():
        turns = tuple(replace(turn, image=SIZES.get(turn.image, turn.image)) for turn in case.turns)
        made[case.name] = host_inputs_for(replace(case, turns=turns), EMBEDDED, numbers)
    return made


def places(inputs: FrozenInputs) -> np.ndarray:
    return np.flatnonzero(inputs.ids == load_tokenizer(EMBEDDED).token_to_id(IMAGE_PAD))


def test_kinds(prompts: dict[str, FrozenInputs]) -> None:
    assert prompts["scene-211"].length == 211 and len(places(prompts["scene-211"])) == 196
    assert not places(prompts["text-only"]).size and prompts["text-only"].grid is None
    assert places(prompts["image-first"])[0] == 1
    assert places(prompts["image-after-long-text"])[0] > 100
    assert places(prompts["early-image-two-turns"])[-1] < prompts["early-image-two-turns"].length - 25
    assert places(prompts["image-after-words"])[-1] > prompts["image-after-words"].length - 10
    assert prompts["long-text"].length > 300
    assert prompts["wide"].grid == (1, 20, 28)
    assert any(ord(letter) > 0xFFFF for case in load_cases() if case.name == "non-ascii" for letter in case.turns[0].text)


def test_what_the_bundle_runs_fits_its_grid_and_context(prompts: dict[str, FrozenInputs]) -> None:
    cases = load_cases()
    assert len(cases) >= 9 and all(case.decode == 24 and len(case.why) > 30 for case in cases)
    for case in cases:
        if case.engine:
            assert prompts[case.name].grid in (None, (1, 28, 28))
            assert prompts[case.name].length + case.decode <= 512
