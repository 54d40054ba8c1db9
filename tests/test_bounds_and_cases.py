"""Files a human edits: each mistake is one sentence that names file, place and mistake."""

from __future__ import annotations

import pytest

from harness.bounds import load_bounds
from harness.cases import load_cases
from harness.errors import HarnessError

GOOD = {"rung": '"vision"', "metric": '"local.rel_l2"', "limit": "1e-5", "measured": "1e-6", "because": '"measured"',
        "date": "2026-11-23"}


def write_bound(folder, **changes):
    rows = {**GOOD, **changes}
    path = folder / "bounds.toml"
    path.write_text("[[bound]]\n" + "\n".join(f"{key} = {value}" for key, value in rows.items() if value is not None))
    return path


def test_a_bound_loads(tmp_path):
    assert load_bounds(write_bound(tmp_path)).limit("vision", "local.rel_l2") == 1e-5


@pytest.mark.parametrize("change, word", [
    ({"because": None}, "because"), ({"because": '""'}, "because"), ({"limits": "1"}, "limits"),
    ({"limit": "inf"}, "finite"), ({"measured": "1e-4"}, "measured"), ({"limit": "nan"}, "finite")])
def test_a_bound_without_its_because_does_not_load(tmp_path, change, word):
    with pytest.raises(HarnessError, match=word):
        load_bounds(write_bound(tmp_path, **change))


def test_the_bounds_in_the_repo_all_say_why():
    assert all(len(bound.because) > 20 for bound in load_bounds().all)


def test_the_cases_in_the_repo_differ_in_kind():
    cases = load_cases()
    assert len(cases) >= 8 and len({case.why for case in cases}) == len(cases)
    assert any(not case.images for case in cases) and any(not case.engine for case in cases)


@pytest.mark.parametrize("text, word", [
    ("", "case"), ("[[case]]\nname = 'a'\nturns = []", "why"),
    ("[[case]]\nname = 'a'\nwhy = 'b'\nturns = [{role = 'user', text = 't', images = 'x'}]", "images"),
    ("[[case]]\nname = 'a'\nwhy = 'b'\nturns = [{role = 'user', text = 't', image = 'x.png'}, "
     "{role = 'user', text = 't', image = 'y.png'}]", "one image"),
    ("[[case]]\nname = 'a'\nwhy = 'b'\ndecode = 0\nturns = [{role = 'user', text = 't'}]", "decode"),
    ("[[case]\n", "TOML")])
def test_bad_cases_are_one_sentence(tmp_path, text, word):
    path = tmp_path / "cases.toml"
    path.write_text(text)
    with pytest.raises(HarnessError, match=word) as caught:
        load_cases(path)
    assert "\n" not in str(caught.value) and "cases.toml" in str(caught.value)
