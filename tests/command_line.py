"""What the tests of the command line share: a folder with everything that can be given, and what a refusal looks like."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from random_models import write_checkpoint

from harness.bundle import metadata
from harness.cli import main

CASES = """
[[case]]
name = "picture"
why = "w"
decode = 4
turns = [{ role = "user", text = "Describe this image.", image = "noise:96x64:5" }]
[[case]]
name = "words"
why = "w"
decode = 4
turns = [{ role = "user", text = "Tell a story." }]
"""
BUNDLE = "toy_decode_int8hu_s1"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a random checkpoint `model`, its `oracle` of two cases, and `cases.toml`."""
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "model", layers=3)
    (root / "cases.toml").write_text(CASES)
    assert main(["record", str(root / "model"), "--cases", str(root / "cases.toml"), "--out", str(root / "oracle")]) == 0
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, as the current directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def bundle(here: Path) -> Path:
    """A bundle whose files are well-formed; its program is none, which nothing here gets far enough to see."""
    root = here / BUNDLE
    asset = root / f"{BUNDLE}.aimodel"
    asset.mkdir(parents=True)
    (root / "tokenizer").mkdir()
    (asset / "main.mlirb").write_bytes(b"program" * 100)
    (asset / "main.hash").write_bytes(hashlib.sha256(b"program" * 100).digest())
    (root / "metadata.json").write_text(json.dumps(metadata(
        BUNDLE, "int8hu", hf_model_id="o/m", model_definition="torch", date="2026-01-01", vocab_size=512,
        max_context_length=256)))
    return root


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """`refused(code, argv, *words)`: one sentence on stderr with these words, that exit code, no file added or changed."""
    def check(code: int, argv: str, *words: str, leaves: tuple[str, ...] = ()) -> str:
        before, verb = _files(), argv.split()[0]
        capfd.readouterr()
        assert main(argv.split()) == code
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith(f"harness {verb}: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert all(word in err for word in words), err
        assert {name for name, content in _files().items() if before.get(name) != content} == set(leaves)
        assert not set(before) - set(_files())
        return err
    return check


def _files() -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path().rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


JUDGE = "ladder model --cases cases.toml --oracle oracle --out out --rung contract"
