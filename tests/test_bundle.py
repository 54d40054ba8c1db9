"""The bundle reader: what it says of a whole bundle, and one clear sentence for each broken one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from harness.bundle import Bundle, check_asset, metadata
from harness.errors import ExitCode, HarnessError

NAME = "toy_decode_int8hu_s1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / NAME
    asset, tokenizer = root / f"{NAME}.aimodel", root / "tokenizer"
    asset.mkdir(parents=True)
    tokenizer.mkdir()
    (asset / "main.mlirb").write_bytes(b"program" * 1000)
    (asset / "main.hash").write_bytes(hashlib.sha256(b"program" * 1000).digest())
    (asset / "metadata.json").write_text('{"assetVersion": "2.0"}')
    (tokenizer / "tokenizer.json").write_text("{}")
    save(root, **metadata(NAME, "int8hu", hf_model_id="o/m", model_definition="torch", date="2026-01-01T00:00:00Z",
                          vocab_size=512, max_context_length=256))
    return root


def save(root: Path, **table: object) -> None:
    (root / "metadata.json").write_text(json.dumps(table))


def edit(root: Path, section: str | None = None, **changes: object) -> None:
    table = json.loads((root / "metadata.json").read_text())
    (table[section] if section else table).update(changes)
    save(root, **table)


def refused(root: Path, *words: str, kind: str = "llm") -> None:
    with pytest.raises(HarnessError) as caught:
        Bundle.open(root, kind).digest
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_whole_bundle(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert (bundle.name, bundle.mode, bundle.vocab_size, bundle.max_context_length) == (NAME, "int8hu", 512, 256)
    assert bundle.asset == (folder / f"{NAME}.aimodel").resolve()
    assert bundle.tokenizer == (folder / "tokenizer").resolve()
    assert bundle.unknown_keys == ()
    assert bundle.size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert json.loads(json.dumps(bundle.record()))["digest"] == bundle.digest


def test_digest_covers_names_and_bytes(folder: Path) -> None:
    first = Bundle.open(folder).digest
    (folder / "tokenizer" / "tokenizer.json").write_text("[]")
    second = Bundle.open(folder).digest
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "other.json")
    third = Bundle.open(folder).digest
    assert len({first, second, third}) == 3


def test_unknown_keys_are_listed(folder: Path) -> None:
    edit(folder, flavour="new")
    edit(folder, "language", eos=3)
    assert Bundle.open(folder).unknown_keys == ("flavour", "language.eos")


@pytest.mark.parametrize(("name", "mode"), [("m_decode_int8lin_s1", "int8lin"), ("m", "unknown")])
def test_mode_of_a_port_that_leaves_compression_null(folder: Path, name: str, mode: str) -> None:
    edit(folder, compression=None, name=name)
    assert Bundle.open(folder).mode == mode


def test_bare_vision_asset(folder: Path) -> None:
    bundle = Bundle.open(folder / f"{NAME}.aimodel", kind="vision")
    assert (bundle.kind, bundle.vocab_size, bundle.asset) == ("vision", None, bundle.path)


def test_vision_bundle_has_no_language_section(folder: Path) -> None:
    save(folder, **metadata(NAME, "fp16", kind="vision", hf_model_id="o/m", model_definition="torch", date="x"))
    assert Bundle.open(folder, kind="vision").tokenizer is None
    refused(folder, "kind is 'vision'")


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such bundle")


@pytest.mark.parametrize("path", ["../out.aimodel", "/tmp/out.aimodel", "a/../../out.aimodel"])
def test_path_that_leaves_the_bundle(folder: Path, path: str) -> None:
    edit(folder, "assets", main=path)
    refused(folder, "leaves the bundle")


def test_link_that_leaves_the_bundle(folder: Path, tmp_path: Path) -> None:
    (folder / f"{NAME}.aimodel").rename(tmp_path / "out.aimodel")
    (folder / f"{NAME}.aimodel").symlink_to(tmp_path / "out.aimodel")
    refused(folder, "leaves the bundle")


def test_link_beside_the_asset_that_leaves_the_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (folder / "tokenizer" / "link.json").symlink_to(tmp_path / "secret")
    refused(folder, "leaves the bundle")


@pytest.mark.parametrize(("section", "change", "word"), [
    (None, {"metadata_version": "0.3"}, "metadata_version"), (None, {"metadata_version": None}, "metadata_version"),
    (None, {"name": 3}, "name"), (None, {"assets": []}, "assets"), (None, {"language": None}, "language"),
    ("language", {"vocab_size": "512"}, "vocab_size"), ("language", {"max_context_length": 0}, "max_context_length"),
    ("language", {"vocab_size": True}, "vocab_size"), ("assets", {"main": "lost.aimodel"}, "lost.aimodel")])
def test_bad_metadata(folder: Path, section: str | None, change: dict, word: str) -> None:
    edit(folder, section, **change)
    refused(folder, word)


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff"])
def test_metadata_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "metadata.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "metadata.json")


@pytest.mark.parametrize("name", ["main.mlirb", "main.hash"])
def test_missing_program_files(folder: Path, name: str) -> None:
    (folder / f"{NAME}.aimodel" / name).unlink()
    refused(folder, name, "missing")


def test_damaged_program(folder: Path) -> None:
    program = folder / f"{NAME}.aimodel" / "main.mlirb"
    program.write_bytes(program.read_bytes()[:-1])
    refused(folder, "main.mlirb", "do not match")


def test_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer").rmdir()
    refused(folder, "tokenizer/")
    edit(folder, "language", embedded_tokenizer=False)
    assert Bundle.open(folder).tokenizer is None


def test_asset_must_be_an_aimodel(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no such .aimodel"):
        check_asset(tmp_path)
