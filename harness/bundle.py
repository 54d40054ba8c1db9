"""A bundle on disk: its metadata, its asset, its digest. No Apple imports: a bundle can be read where no runtime is.

Layout of a LanguageBundle (metadata version 0.2): `metadata.json`, the asset `<name>.aimodel`, `tokenizer/`. A vision
bundle is such a directory of another kind, or a bare `.aimodel`. An `.aimodel` is a directory of `main.mlirb` (MLIR
bytecode with the weights inside), `main.hash` (the 32 bytes of its sha256) and its own `metadata.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.checkpoint import digest_files, read_json
from harness.errors import HarnessError, within

VERSION = "0.2"
LANGUAGE, VISION = "llm", "vision"
MODES = ("fp16", "int8lin", "int8hu")
PROGRAM, PROGRAM_HASH = "main.mlirb", "main.hash"
UNKNOWN_MODE = "unknown"
_KEYS = {"": {"metadata_version", "kind", "name", "assets", "language", "source", "compression", "compilation"},
         "assets": {"main"},
         "language": {"tokenizer", "vocab_size", "max_context_length", "embedded_tokenizer", "function_map"},
         "source": {"model_definition", "hf_model_id"}, "compilation": {"date", "targets"}}


@dataclass(frozen=True)
class Bundle:
    """What the metadata says, every path checked to lie inside the bundle.

    asset: the `.aimodel` directory. tokenizer, vocab_size, max_context_length: None in a vision bundle. mode: fp16,
    int8lin, int8hu, whatever else the metadata calls it, or "unknown". unknown_keys: keys the format does not list.
    """

    path: Path
    kind: str
    name: str
    asset: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tokenizer: Path | None = None
    vocab_size: int | None = None
    max_context_length: int | None = None
    mode: str = UNKNOWN_MODE
    unknown_keys: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str, kind: str = LANGUAGE) -> Bundle:
        """Open a bundle of one kind ("llm" or "vision") and check that its program is whole.

        Raises HarnessError where metadata is missing, no JSON, of another version or kind, or lacks a key; where a path
        leaves the bundle; where the asset is missing or its bytes differ from its own hash.
        """
        path = Path(path)
        if not path.is_dir():
            raise HarnessError("no such bundle directory", where=path)
        with within(path):
            bundle = _bare(path) if path.suffix == ".aimodel" else _described(path)
            if bundle.kind != kind:
                raise HarnessError(f"kind is {bundle.kind!r}, expected {kind!r}", where="metadata.json",
                                   fix="give the decoder with --bundle and the vision tower with --vision-bundle")
        check_asset(bundle.asset)
        return bundle

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Relative names of every file, sorted. Raises HarnessError for a link that leaves the bundle."""
        found = sorted(path for path in self.path.rglob("*") if path.is_symlink() or path.is_file())
        names = [path.relative_to(self.path).as_posix() for path in found]
        with within(self.path):
            for name in names:
                _inside(self.path, name)
        return tuple(names)

    @cached_property
    def digest(self) -> str:
        """sha256 over relative name, length and bytes of every file; read in blocks."""
        return self._digests[0]

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of every file, by relative name, so that a reader elsewhere can be told which one differs."""
        return self._digests[1]

    @cached_property
    def _digests(self) -> tuple[str, dict[str, str]]:
        each: dict[str, str] = {}
        return digest_files(self.path, list(self.files), each), each

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.path / name).stat().st_size for name in self.files)

    def record(self) -> dict[str, Any]:
        """Plain JSON types, for a run record."""
        return {"name": self.name, "kind": self.kind, "mode": self.mode, "digest": self.digest, "bytes": self.size,
                "files": self.hashes, "vocab_size": self.vocab_size, "max_context_length": self.max_context_length,
                "source": self.metadata.get("source"), "unknown_keys": list(self.unknown_keys)}


def metadata(name: str, mode: str, *, kind: str = LANGUAGE, hf_model_id: str, model_definition: str, date: str,
             vocab_size: int | None = None, max_context_length: int | None = None) -> dict[str, Any]:
    """What goes into a new bundle's metadata.json; a vision bundle has no language section.

    date: ISO 8601, UTC. Sizes in tokens.
    """
    record: dict[str, Any] = {"metadata_version": VERSION, "kind": kind, "name": name,
                              "assets": {"main": f"{name}.aimodel"}}
    if kind == LANGUAGE:
        record["language"] = {"tokenizer": hf_model_id, "vocab_size": vocab_size,
                              "max_context_length": max_context_length, "embedded_tokenizer": True,
                              "function_map": {"main": ["main"]}}
    return record | {"source": {"model_definition": model_definition, "hf_model_id": hf_model_id},
                     "compression": mode, "compilation": {"date": date, "targets": []}}


def check_asset(asset: Path, *, bytes_too: bool = True) -> None:
    """Check that an `.aimodel` is there and, with `bytes_too`, that `main.mlirb` is what `main.hash` says, read in blocks.

    The runtime is killed by a path that does not exist or a program that is damaged, so this comes before it.
    """
    with within(asset):
        if not asset.is_dir() or asset.suffix != ".aimodel":
            raise HarnessError("no such .aimodel directory", fix="give a bundle whose metadata names its asset")
        for name in (PROGRAM, PROGRAM_HASH):
            if not (asset / name).is_file():
                raise HarnessError("the file is missing", where=name, fix="export or download the bundle again")
        if not bytes_too:
            return
        expected = (asset / PROGRAM_HASH).read_bytes()
        digest = hashlib.sha256()
        with (asset / PROGRAM).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.digest() != expected:
            raise HarnessError(f"its bytes do not match {PROGRAM_HASH}", where=PROGRAM,
                               fix="the program is damaged: export or download the bundle again")


def _bare(path: Path) -> Bundle:
    return Bundle(path, VISION, path.stem, path, _object(read_json(path / "metadata.json"), "metadata.json"))


def _described(path: Path) -> Bundle:
    table = _object(read_json(path / "metadata.json"), "metadata.json")
    with within("metadata.json"):
        version = table.get("metadata_version")
        if version != VERSION:
            raise HarnessError(f"{version!r} is not supported, only {VERSION!r}", where="metadata_version",
                               fix="export the bundle again with a matching tool")
        kind, name = _text(table, "kind"), _text(table, "name")
        with within("assets"):
            asset = _inside(path, _text(_object(table.get("assets"), "assets"), "main"))
        language = _language(path, table) if kind == LANGUAGE else {}
        return Bundle(path, kind, name, asset, table, mode=_mode(table, name), unknown_keys=_unknown(table), **language)


def _language(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    section = _object(table.get("language"), "language")
    with within("language"):
        sizes = {key: _count(section, key) for key in ("vocab_size", "max_context_length")}
    tokenizer = _inside(path, "tokenizer")
    if section.get("embedded_tokenizer", True) and not tokenizer.is_dir():
        raise HarnessError("embedded_tokenizer is true, but the bundle has no tokenizer/", where="language",
                           fix="export or download the bundle again")
    return {"tokenizer": tokenizer if tokenizer.is_dir() else None, **sizes}


def _mode(table: Mapping[str, Any], name: str) -> str:
    """What the metadata says; published ports leave `compression` null and put the mode into the name."""
    stated = table.get("compression")
    if isinstance(stated, str) and stated:
        return stated
    parts = name.split("_")
    return next((mode for mode in MODES if mode in parts), UNKNOWN_MODE)


def _inside(root: Path, name: str) -> Path:
    """`root / name`, resolved. Raises HarnessError for an absolute path, a `..`, or a link that leads out."""
    relative = Path(name)
    whole = (root / relative).resolve()
    if relative.is_absolute() or ".." in relative.parts or not whole.is_relative_to(root.resolve()):
        raise HarnessError(f"the path {name!r} leaves the bundle", fix="a bundle must be whole in itself")
    return whole


def _unknown(table: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    for section, keys in _KEYS.items():
        inner = table if not section else table.get(section)
        if isinstance(inner, Mapping):
            found += [f"{section}.{key}".lstrip(".") for key in inner if key not in keys]
    return tuple(sorted(found))


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HarnessError("must be a JSON object", where=name)
    return value


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise HarnessError(f"must be a text, found {value!r}", where=key)
    return value


def _count(table: Mapping[str, Any], key: str) -> int:
    value = table.get(key)
    if type(value) is not int or value < 1:
        raise HarnessError(f"must be a whole number above 0, found {value!r}", where=key)
    return value
