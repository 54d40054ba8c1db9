"""Writing a checkpoint as the hub does, block by block: shards, index, config, tokenizer; whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harness.checkpoint import EMBEDDED
from harness.errors import HarnessError
from harness.synth.draw import blocks, draw
from harness.synth.sizes import config_of, tensors_of

SHARD = 5_000_000_000
"""Bytes of tensors in a shard at most (the hub's default)."""
SPARE = 64 << 20
"""Bytes beside the tensors: headers, tokenizer, and something for the filesystem."""
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json",
             "preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json")
Tensors = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Plan:
    """What will be written: the config, and tensors (name, shape) by shard."""

    config: dict[str, Any]
    shards: tuple[Tensors, ...]

    @property
    def parameters(self) -> int:
        """Count of all weights."""
        return sum(math.prod(shape) for shard in self.shards for _, shape in shard)

    @property
    def bytes(self) -> int:
        """Disk that is needed, in bytes."""
        return 2 * self.parameters + SPARE

    def describe(self, target: Path) -> str:
        """One sentence, for before the start."""
        return f"{target}: {self.parameters / 1e9:.3f} billion weights in {len(self.shards)} shards; needs " \
               f"{self.bytes / 1e9:.2f} GB of disk, {shutil.disk_usage(_there(target)).free / 1e9:.2f} GB are free"


def plan(size: str, layers: int | None = None, vision_layers: int | None = None, shard_bytes: int = SHARD) -> Plan:
    """What `synthesize` would write. Raises HarnessError for an unknown size or a bad count of layers."""
    config, shards, held = config_of(size, layers, vision_layers), [[]], 0
    for name, shape in tensors_of(config):
        size_bytes = 2 * math.prod(shape)
        if shards[-1] and held + size_bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, shape))
        held += size_bytes
    return Plan(config, tuple(shards))


def synthesize(what: Plan, target: Path, seed: int = 0,
               progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Write the checkpoint and return its directory; memory is a few blocks a thread, whatever the size.

    progress(bytes done, bytes in all). Raises HarnessError where the target is there already, the disk is too
    small or fails, or another process writes it; what is there then is what was there before.
    """
    target = Path(target)
    if target.exists():
        raise HarnessError("is already there", where=target, fix="remove it, or give another directory")
    if seed < 0:
        raise HarnessError(f"{seed} is below 0", where="--seed", fix="give 0 or more")
    free = shutil.disk_usage(_there(target)).free
    if free < what.bytes:
        raise HarnessError(f"needs {what.bytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free", where=target,
                           fix="make space, or give a directory on another disk")
    with _draft(target) as folder, ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        names, done = _shard_names(len(what.shards)), 0
        for file_name, tensors in zip(names, what.shards):
            with (folder / file_name).open("wb") as file:
                for written in _write_shard(file, tensors, seed, workers):
                    done += written
                    progress(done, 2 * what.parameters)
                os.fsync(file.fileno())
        _write_rest(folder, what, names)
    return target


def _write_shard(file: BinaryIO, tensors: Tensors, seed: int, workers: ThreadPoolExecutor) -> Iterator[int]:
    """The safetensors format; blocks are drawn ahead by the workers, a few at a time, and written in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    ahead: list[Future] = []
    for name, shape in tensors:
        for block in blocks(shape):
            ahead.append(workers.submit(draw, name, shape, seed, block))
            if len(ahead) > 4:
                yield _write_next(file, ahead)
    while ahead:
        yield _write_next(file, ahead)


def _write_next(file: BinaryIO, ahead: list[Future]) -> int:
    bits = ahead.pop(0).result()
    file.write(bits.astype("<u2", copy=False).data)
    return bits.nbytes


def _write_rest(folder: Path, what: Plan, names: list[str]) -> None:
    if len(names) > 1:
        index = {"metadata": {"total_size": 2 * what.parameters},
                 "weight_map": {name: file for file, shard in zip(names, what.shards) for name, _ in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in HUB_FILES:
        shutil.copyfile(EMBEDDED / name, folder / name)
    (folder / "config.json").write_text(json.dumps(what.config, indent=2) + "\n", encoding="utf-8")


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A directory beside `target` that becomes it when the block ends well; what a killed run left is removed first."""
    draft = target.with_name(f".{target.name}.part")
    handle = None
    try:
        draft.mkdir(parents=True, exist_ok=True)
        handle = os.open(draft, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in draft.iterdir():
            leftover.unlink()
        try:
            yield draft
            os.rename(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except BlockingIOError as error:
        raise HarnessError("another process is writing it", where=target, fix="wait for it") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise HarnessError("the disk filled up" if full else f"cannot be written ({error.strerror})", where=target,
                           fix="make space; nothing half-written is left") from error
    finally:
        if handle is not None:
            os.close(handle)


def _there(path: Path) -> Path:
    """The nearest directory above that exists."""
    path = path.absolute()
    return path if path.is_dir() else _there(path.parent)
