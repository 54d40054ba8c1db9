"""The table of big constants in `main.mlirb`: MLIR bytecode version 6, read in pure Python without copying.

Source: the MLIR bytecode format (mlir.llvm.org/docs/BytecodeFormat). Only the string, resource and resource-offset
sections are read; the program itself is read by Apple's bindings, see `harness.engines.program`. Everything is checked
against the file's real length, so that damaged bytes give a sentence and never a large allocation.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError, within

MAGIC = b"ML\xefR"
VERSION = 6
MOST = 1 << 22
"""More strings or resources than any program has; a damaged count must not make a list of the file's length."""
_STRINGS, _RESOURCES, _OFFSETS = 0, 5, 6
_BLOB = 0


@dataclass(frozen=True)
class Blob:
    """Where a resource's bytes lie in the file."""

    offset: int
    size: int


def read_resources(path: Path) -> dict[str, Blob]:
    """Resource name -> place of its bytes. Raises HarnessError for a file that is no whole bytecode of this version."""
    with within(path):
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse(data)
        except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
            raise HarnessError(f"cannot be mapped ({error})", fix="export or download the bundle again") from error


def parse(data: mmap.mmap | bytes) -> dict[str, Blob]:
    """The same for bytes in memory."""
    reader = _Reader(data, 0, len(data))
    if reader.take(4) != MAGIC:
        raise HarnessError("is no MLIR bytecode (wrong magic)")
    version = reader.varint()
    if version != VERSION:
        raise HarnessError(f"is MLIR bytecode version {version}, only {VERSION} is supported",
                           fix="export with coreai-core 1.0.0b3")
    reader.skip_text()
    sections = dict(_sections(reader))
    missing = {_STRINGS, _RESOURCES, _OFFSETS} - set(sections)
    if missing == {_RESOURCES, _OFFSETS}:
        return {}
    if missing:
        raise HarnessError(f"section {min(missing)} is missing")
    return _table(sections[_OFFSETS], sections[_RESOURCES], _strings(sections[_STRINGS]))


class _Reader:
    """A cursor over data[at:end] that never leaves it."""

    def __init__(self, data: mmap.mmap | bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    @property
    def left(self) -> int:
        """Bytes to the end."""
        return self.end - self.at

    def advance(self, count: int) -> int:
        """Move on by `count` bytes and return where they began."""
        start = self.at
        if count > self.left:
            raise HarnessError(f"is truncated or damaged: {count} bytes are announced at offset {start}, "
                               f"{self.left} are left")
        self.at += count
        return start

    def take(self, count: int) -> bytes:
        """The next `count` bytes, copied."""
        start = self.advance(count)
        return self.data[start:start + count]

    def varint(self) -> int:
        """A prefix varint: the count of low zero bits in the first byte says how many bytes follow."""
        first = self.take(1)[0]
        if first == 0:
            return int.from_bytes(self.take(8), "little")
        extra = (first & -first).bit_length() - 1
        return (first | int.from_bytes(self.take(extra), "little") << 8) >> (extra + 1)

    def skip_text(self) -> None:
        """Pass over a text that ends with a zero byte."""
        end = self.data.find(b"\0", self.at, self.end)
        if end < 0:
            raise HarnessError("is truncated or damaged: its producer's name does not end")
        self.at = end + 1

    def align(self, alignment: int) -> None:
        """Pass over padding, up to a multiple of `alignment` from the beginning of the file."""
        if alignment < 1 or alignment & (alignment - 1):
            raise HarnessError(f"is damaged: alignment {alignment} at offset {self.at} is no power of two")
        self.advance(-self.at % alignment)

    def part(self, count: int) -> _Reader:
        """A reader of the next `count` bytes, which are passed over here."""
        start = self.advance(count)
        return _Reader(self.data, start, start + count)


def _sections(reader: _Reader) -> Iterator[tuple[int, _Reader]]:
    seen = set()
    while reader.left:
        head = reader.take(1)[0]
        length = reader.varint()
        if head & 0x80:
            reader.align(reader.varint())
        number = head & 0x7F
        if number in seen:
            raise HarnessError(f"is damaged: section {number} is there twice")
        seen.add(number)
        yield number, reader.part(length)


def _strings(reader: _Reader) -> list[bytes]:
    """Lengths come in reverse order, before the texts; each text ends with a zero byte that its length counts."""
    count = _counted(reader)
    lengths = [reader.varint() for _ in range(count)]
    return [reader.take(length)[:-1] for length in reversed(lengths)]


def _table(offsets: _Reader, data: _Reader, strings: list[bytes]) -> dict[str, Blob]:
    found: dict[str, Blob] = {}
    offsets.varint()  # how many of the groups are not a dialect's; all are laid out alike
    while offsets.left:
        offsets.varint()  # the group's name, or its dialect's number
        for _ in range(_counted(offsets)):
            key, size, kind = offsets.varint(), offsets.varint(), offsets.take(1)[0]
            entry = data.part(size)
            if kind != _BLOB:
                continue
            if key >= len(strings):
                raise HarnessError(f"is damaged: resource name {key} of {len(strings)}")
            name = strings[key].decode("utf-8", "replace")
            alignment, length = entry.varint(), entry.varint()
            entry.align(alignment)
            found[name] = Blob(entry.advance(length), length)
    return found


def _counted(reader: _Reader) -> int:
    """A count of things that take at least one byte each."""
    count = reader.varint()
    if count > min(reader.left, MOST):
        raise HarnessError(f"is truncated or damaged: {count} entries are announced, {reader.left} bytes are left")
    return count
