"""Writing a bundle directory so that it is whole or not there."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.checkpoint import Checkpoint
from harness.errors import HarnessError

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
             "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
             "video_preprocessor_config.json", "generation_config.json")
"""What a host needs to make inputs; those that the checkpoint has are copied."""


@contextmanager
def whole(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends well, and is removed when it
    does not (Ctrl-C included). Raises HarnessError where the disk refuses."""
    refuse(target, overwrite)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    held = hold(draft)
    try:
        os.chmod(draft, 0o777 & ~_umask())
        yield draft
        _replace(draft, target)
    except OSError as error:
        raise HarnessError(f"cannot be written ({error.strerror or error})", where=target,
                           fix="free some disk space, or give another --out") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(held)


def hold(folder: Path) -> int:
    """Lock a folder while this process lives, however it ends; the handle to close."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def clear_away(target: Path) -> None:
    """Remove the drafts of `target` that a killed process left behind; those of a living one are locked, and stay."""
    for draft in target.parent.glob(f".{glob.escape(target.name)}-*"):
        remove_stale(draft)


def remove_stale(folder: Path) -> None:
    """Remove a folder that no living process holds."""
    try:
        handle = hold(folder)
    except OSError:  # held, or gone meanwhile, or not ours: none of it is ours to remove
        return
    try:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink(missing_ok=True)
    finally:
        os.close(handle)


def refuse(target: Path, overwrite: bool) -> None:
    """Raises HarnessError where `target` is there and may not be replaced, or is no directory."""
    if target.exists() and (not overwrite or not target.is_dir()):
        raise HarnessError("is already there", where=target, fix="give --overwrite, or another --out")


def _replace(draft: Path, target: Path) -> None:
    if not target.exists():
        os.rename(draft, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    try:
        os.rename(target, old / "bundle")
        os.rename(draft, target)
    finally:
        if not target.exists() and (old / "bundle").exists():  # the new one did not get there: the old one stands
            os.rename(old / "bundle", target)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's umask: mkdtemp gives 0700, a bundle is an ordinary directory."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `metadata.json`."""
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def tokenizer_files(checkpoint: Checkpoint) -> list[Path]:
    """The checkpoint's tokenizer and processor files. Raises HarnessError where it has no tokenizer.json."""
    found = [checkpoint.root / name for name in TOKENIZER if (checkpoint.root / name).is_file()]
    if not any(path.name == TOKENIZER[0] for path in found):
        raise HarnessError("the file is missing", where=checkpoint.root / TOKENIZER[0],
                           fix="a bundle carries its tokenizer: download the checkpoint whole")
    return found


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy them into `folder`/tokenizer."""
    target = folder / "tokenizer"
    target.mkdir()
    for path in tokenizer_files(checkpoint):
        shutil.copyfile(path, target / path.name)
