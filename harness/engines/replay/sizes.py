"""Integers that a program computes from shapes: known now, or linear in lengths that are known when it runs.

A host value is a numpy array of Size objects, so numpy's own slicing, joining and broadcasting fold shape arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FAR = 2**31 - 1
"""What the program writes for an open end."""


@dataclass(frozen=True)
class Size:
    """constant + sum of factor * name; the name is a Python variable or expression of the generated code."""

    constant: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    @property
    def fixed(self) -> bool:
        """True where it is a plain integer."""
        return not self.terms

    def __int__(self) -> int:
        if self.terms:
            raise TypeError(f"{self} is known only when the program runs")
        return self.constant

    def __add__(self, other: Size) -> Size:
        return _size(self.constant + other.constant, (*self.terms, *other.terms))

    def __neg__(self) -> Size:
        return _size(-self.constant, ((name, -factor) for name, factor in self.terms))

    def __sub__(self, other: Size) -> Size:
        return self + -other

    def __mul__(self, other: Size) -> Size:
        """Raises TypeError where neither is fixed."""
        number, size = (self, other) if self.fixed else (other, self)
        factor = int(number)
        return _size(size.constant * factor, ((name, part * factor) for name, part in size.terms))

    def __str__(self) -> str:
        parts = [f"{'-' if factor < 0 else '+'} {name if abs(factor) == 1 else f'{abs(factor)} * {name}'}"
                 for name, factor in self.terms]
        if self.constant or not parts:
            parts.append(f"{'-' if self.constant < 0 else '+'} {abs(self.constant)}")
        text = " ".join(parts)
        return text.removeprefix("+ ") if text[0] == "+" else text.replace("- ", "-", 1)


def _size(constant: int, terms: Iterable[tuple[str, int]]) -> Size:
    summed: dict[str, int] = {}
    for name, factor in terms:
        summed[name] = summed.get(name, 0) + factor
    return Size(constant, tuple((name, factor) for name, factor in sorted(summed.items()) if factor))


def hosted(array: Any) -> np.ndarray:
    """Plain integers as a host value."""
    plain = np.asarray(array)
    made = np.empty(plain.shape, dtype=object)
    for place in np.ndindex(plain.shape):
        made[place] = Size(int(plain[place]))
    return made


def names(host: np.ndarray) -> set[str]:
    """Names that it depends on."""
    return {name for size in host.ravel() for name, _ in size.terms}


def fixed(host: np.ndarray) -> list[int] | None:
    """Plain integers, flat, or None where one is known only when the program runs."""
    sizes = list(host.ravel())
    return [int(size) for size in sizes] if all(size.fixed for size in sizes) else None


def value_of(size: Size, known: Mapping[str, int]) -> int:
    """The integer, with the names' values."""
    return size.constant + sum(factor * known[name] for name, factor in size.terms)
