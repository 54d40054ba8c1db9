"""Reading values that someone else wrote, and printing figures: total functions that take anything and never raise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ABSENT = "–"
_LONGEST = 2000


def rows(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; nothing where it is no list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, (list, tuple)) else []


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A float, infinite ones included; None for what is no number (NaN too: it orders with nothing)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(found) else found


def integer(value: Any) -> int | None:
    """An int that is an index or a count: not negative."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def text(value: Any, longest: int = _LONGEST) -> str:
    """Words of a value, cut where they would drown the page."""
    if value is None or value == "":
        return ABSENT
    words = value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return words if len(words) <= longest else f"{words[:longest]}… ({len(words) - longest:,} more characters)"


def sentence(value: str) -> str:
    """The same words with a capital."""
    return value[:1].upper() + value[1:]


def place(value: Any) -> str:
    """A coordinate, `[57, 1033]`; empty where there is none."""
    return f"[{', '.join(str(part) for part in value)}]" if isinstance(value, (list, tuple)) and value else ""


def figure(value: Any) -> str:
    """A figure as people read it: 3 digits near one, 1.2e-6 far below or above it."""
    found = number(value)
    if found is None:
        return ABSENT
    if math.isinf(found):
        return "∞" if found > 0 else "−∞"
    size = abs(found)
    if size == 0 or 1e-2 <= size < 1e3:
        return f"{found:.3g}"
    if 1e3 <= size < 1e6:
        return f"{found:,.0f}"
    mantissa, exponent = f"{found:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def cosine(value: Any) -> str:
    """A cosine cut, not rounded, to six places: 0.9999999 must not be printed as 1."""
    found = number(value)
    if found is None or not math.isfinite(found):
        return ABSENT
    return f"{math.trunc(found * 1e6) / 1e6:.6f}"


def size(value: Any) -> str:
    """Bytes in decimal units, as disks and model cards give them."""
    found = number(value)
    if found is None or not math.isfinite(found) or found < 0:
        return ABSENT
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if found >= scale:
            return f"{found / scale:.3g} {unit}" if found < 1000 * scale else f"{found / scale:,.0f} {unit}"
    return f"{found:.0f} B"


def seconds(value: Any) -> str:
    """A duration in seconds."""
    found = number(value)
    if found is None or not math.isfinite(found):
        return ABSENT
    return f"{found:.2f} s" if found < 10 else f"{found:,.0f} s"


def moment(value: Any) -> str:
    """Date and minute of an ISO time: `2026-11-20 09:12`."""
    words = text(value, 40)
    return words[:16].replace("T", " ") if words[4:5] == "-" and words[10:11] == "T" else words


def short(value: Any, length: int = 12) -> str:
    """The first characters of a digest."""
    return value[:length] if isinstance(value, str) and value else ABSENT
