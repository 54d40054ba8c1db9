"""Small paletted PNGs made with the standard library: a heat map that needs no JavaScript, prints, and stays lean."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

LEVELS = 250
INFINITE, NOTHING = 254, 255
_ANCHORS = ("000004", "1c1044", "4f127b", "812581", "b5367a", "e55964", "fb8761", "fec287", "fcfdbf")
"""matplotlib's magma (CC0, S. van der Walt and N. Smith) at nine places: even in lightness, so it prints in grey."""


def palette() -> list[tuple[int, int, int]]:
    """256 colours: LEVELS from low to high, then cyan for infinite and grey for nothing measured."""
    anchors = [tuple(int(code[at:at + 2], 16) for at in (0, 2, 4)) for code in _ANCHORS]
    colours = []
    for level in range(LEVELS):
        place = level / (LEVELS - 1) * (len(anchors) - 1)
        low = min(int(place), len(anchors) - 2)
        part = place - low
        colours.append(tuple(round(a + (b - a) * part) for a, b in zip(anchors[low], anchors[low + 1])))
    return colours + [(0, 229, 255)] * (256 - LEVELS - 1) + [(128, 128, 128)]


def level(value: float | None, low: float, high: float) -> int:
    """Palette index of a value on the scale low..high."""
    if value is None:
        return NOTHING
    if math.isinf(value):
        return INFINITE if value > 0 else 0
    # Steps of 1/16 decade are finer than anybody reads off a colour, and compress to half the size.
    place = (round(value * 16) / 16 - low) / (high - low) if high > low else 0.0
    return round(min(1.0, max(0.0, place)) * (LEVELS - 1))


def data_uri(pixels: Sequence[bytes]) -> str:
    """Rows of palette indices, all of one length, as a `data:` URI; NOTHING is transparent."""
    raw = b"".join(b"\0" + row for row in pixels)
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 3, 0, 0, 0)
    colours = b"".join(bytes(colour) for colour in palette())
    parts = ((b"IHDR", header), (b"PLTE", colours), (b"tRNS", b"\xff" * 255 + b"\0"), (b"IDAT", zlib.compress(raw, 9)),
             (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                    for name, data in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()
