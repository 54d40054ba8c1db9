"""An HF model directory or hub id at a pinned revision: its Geometry, its tensors, its digest; readers of plain files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError, within
from harness.geometry import Geometry

if TYPE_CHECKING:
    import torch

EMBEDDED = Path(__file__).resolve().parent.parent / "oracles" / "qwen3-vl-tiny"


class Checkpoint:
    """A checkpoint on disk, opened lazily.

    Raises HarnessError for a missing directory, config, shard or index, and for a truncated shard.
    """

    def __init__(self, root: Path, revision: str = "local") -> None:
        self.root = Path(root)
        self.revision = revision
        self._digest: Future | None = None
        self._lock = threading.Lock()
        if not (self.root / "config.json").is_file():
            raise HarnessError("no config.json there", where=self.root, fix="give an HF model directory or a hub id")
        with within(self.root):
            self.config = read_json(self.root / "config.json")
            self.geometry = Geometry.from_config(self.config)
            self._files = self._index()
        self.stamps = {path: stamp(path.stat()) for path in (self.root / "config.json", *self.files)}
        """What each file that the digest covers looked like when the checkpoint was opened."""

    @property
    def name(self) -> str:
        """Last path component: `qwen3-vl-tiny`."""
        return self.root.resolve().name

    def _index(self) -> dict[str, Path]:
        index = self.root / "model.safetensors.index.json"
        if not index.exists():
            single = self.root / "model.safetensors"
            if not single.is_file():
                raise HarnessError("neither model.safetensors nor its index is there",
                                   fix="download the checkpoint whole")
            return {name: single for name in safetensors_header(single)}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise HarnessError("the index has no weight_map", where=index.name, fix="download it again")
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise HarnessError(f"shard {shard!r} points outside the checkpoint", where=index.name)
            held = safetensors_header(self.root / shard)
            lacking = [name for name, file in weight_map.items() if file == shard and name not in held]
            if lacking:
                raise HarnessError(f"lacks {lacking[0]} that the index promises", where=shard,
                                   fix="download the shard again")
        return {name: self.root / shard for name, shard in weight_map.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        return tuple(sorted(set(self._files.values())))

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._files))

    def weight_bytes(self) -> int:
        """Bytes that all weights take in float32, from the headers."""
        return sum(4 * math.prod(entry["shape"]) for path in self.files for entry in safetensors_header(path).values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, memory-mapped. Raises HarnessError where the checkpoint has none of that name."""
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            raise HarnessError("the checkpoint has no such tensor", where=f"{self.root}: {name}")
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise HarnessError(f"cannot be read ({error})", where=f"{self._files[name]}: {name}",
                               fix="download the shard again") from error

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, by sorted name."""
        return ((name, self.tensor(name)) for name in self.names())

    def unchanged(self) -> None:
        """Raises HarnessError where a weight file is another than when the checkpoint was opened."""
        for path, known in self.stamps.items():
            try:
                same = stamp(path.stat()) == known
            except OSError:  # gone, which is a change as well
                same = False
            if not same:
                raise HarnessError("the checkpoint changed while it was read", where=path,
                                   fix="run the command again; what was recorded of another checkpoint is not used")

    @property
    def digest(self) -> str:
        """sha256 over config.json and every weight file (names and bytes)."""
        self.digest_soon()
        return self._digest.result()

    def digest_soon(self) -> None:
        """Begin to compute it in the background: of a large checkpoint it takes as long as reading it does."""
        with self._lock:
            if self._digest is None:
                self._digest = Future()
                threading.Thread(target=self._compute_digest, args=(self._digest,), name="digest", daemon=True).start()

    def _compute_digest(self, promise: Future) -> None:
        try:
            promise.set_result(digest_files(self.root, ["config.json", *{path.name for path in self._files.values()}]))
        except BaseException as error:  # noqa: BLE001  it is raised where the digest is asked for
            promise.set_exception(error)


def stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is written or replaced: device, inode, size in bytes, time in nanoseconds."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_checkpoint(source: str | Path | None = None, revision: str | None = None) -> Checkpoint:
    """A directory, a hub id (`Qwen/Qwen3-VL-2B-Instruct`), or None for the embedded tiny one."""
    if source is None:
        return Checkpoint(EMBEDDED, "embedded")
    path = Path(source)
    if path.exists():
        return Checkpoint(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise HarnessError("no such directory, and not a hub id (owner/name)", where=source)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(source), revision=revision,
                                   allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as error:  # the hub client raises a dozen kinds; each means "not to be had"
        raise HarnessError(f"not on this disk and the hub did not give it ({type(error).__name__})", where=source,
                           fix="check the name and the network, or give a local directory") from error
    return Checkpoint(Path(folder), Path(folder).name)


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises HarnessError naming file and position where it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HarnessError("the file is missing", where=path) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HarnessError(f"not valid JSON ({error})", where=path) from error


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises HarnessError naming file and place where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HarnessError("the file is missing", where=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HarnessError(f"not valid TOML ({error})", where=path) from error


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Entries of a safetensors file, checked against the file's real length before anything is mapped.

    Source: the safetensors format (8-byte little-endian header length, JSON header, data).
    """
    if not path.is_file():
        raise HarnessError("the file is missing", where=path, fix="download the checkpoint whole")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, 100_000_000):
            raise HarnessError("truncated or no safetensors file", where=path, fix="download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise HarnessError("its safetensors header is not JSON", where=path, fix="download it again") from error
    try:
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise HarnessError("its safetensors header is damaged", where=path, fix="download it again") from error
    if size != 8 + length + end:
        raise HarnessError(f"holds {size} bytes, its header promises {8 + length + end}", where=path,
                           fix="the file is truncated or damaged: download it again")
    return header


def digest_files(root: Path, names: list[str], each: dict[str, str] | None = None) -> str:
    """sha256 over (name, length, bytes) of the files, sorted by name; read in blocks. `each` is given every file's own."""
    total, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))  # fresh ones cost a tenth
    for name in sorted(names):
        path = root / name
        total.update(f"{name}\0{path.stat().st_size}\0".encode())
        single = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total.update(buffer[:count])
                if each is not None:
                    single.update(buffer[:count])
        if each is not None:
            each[name] = single.hexdigest()
    return total.hexdigest()
