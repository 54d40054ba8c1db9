"""What a bundle must hold of each checkpoint tensor, made in rows: what the weights rung compares its program with."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from harness.errors import HarnessError, Undecided
from harness.subject import Subject
from harness.tables import Digits, Expected

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from harness.graph.quantize import Scheme


def expected(subject: Subject) -> list[Expected]:
    """What the bundle must hold, by the recipe of its mode: fp16, or codes and scales by the quantizer's formula.

    Nothing is read yet. Raises Undecided for a mode that is not known.
    """
    from harness.graph.quantize import RECIPES, planned_names
    from harness.graph.reference import POSITIONS

    if subject.mode not in RECIPES:
        raise Undecided(f"quantization mode {subject.mode!r} is not known", fix=f"known are {', '.join(RECIPES)}")
    made = []
    for name, source, scheme in planned_names(subject.checkpoint, RECIPES[subject.mode]):
        held = subject.checkpoint.tensor(source)
        if name == POSITIONS:
            held = _resampled(subject, held)
        made.append(_expected(name, held.reshape(len(held), -1) if held.ndim > 1 else held[None], scheme))
    return made


def _resampled(subject: Subject, table: Tensor) -> Tensor:
    from harness.graph.quantize import to_fp16
    from harness.graph.vision import interpolate_positions

    return interpolate_positions(to_fp16("positions", table), *subject.options.grid, subject.geometry.merge)


def _expected(name: str, held: Tensor, scheme: Scheme | None) -> Expected:
    """held [rows, columns] as the checkpoint stores it, mapped."""
    shape = tuple(held.shape)
    if scheme is None:
        return Expected(name, shape, partial(_plain, name, held))
    if shape[1] % scheme.block:
        raise HarnessError(f"{shape[1]} input features are no multiple of the block {scheme.block}", where=name,
                           fix="export this checkpoint as fp16")
    return Expected(name, shape, partial(_dequantized, name, held, scheme), partial(_plain, name, held),
                    partial(_step, name, held, scheme), partial(_digits, name, held, scheme))


def _rounded(name: str, held: Tensor, start: int, stop: int, columns: int | None = None) -> Tensor:
    from harness.graph.quantize import to_fp16

    return to_fp16(name, held[start:stop, :columns])


def _plain(name: str, held: Tensor, start: int, stop: int, columns: int | None = None) -> np.ndarray:
    return _rounded(name, held, start, stop, columns).numpy()


def _digits(name: str, held: Tensor, scheme: Scheme, start: int, stop: int) -> Digits:
    from harness.graph.quantize import expected_codes

    codes, scale = expected_codes(_rounded(name, held, start, stop), scheme)
    return codes.numpy(), scale.numpy()


def _dequantized(name: str, held: Tensor, scheme: Scheme, start: int, stop: int,
                 columns: int | None = None) -> np.ndarray:
    from harness.graph.quantize import dequantize, expected_codes

    whole = None if columns is None else -(-columns // scheme.block) * scheme.block
    return dequantize(*expected_codes(_rounded(name, held, start, stop, whole), scheme))[:, :columns].numpy()


def _step(name: str, held: Tensor, scheme: Scheme, start: int, stop: int) -> np.ndarray:
    from harness.graph.quantize import expected_codes

    _, scale = expected_codes(_rounded(name, held, start, stop), scheme)
    return scale.float().repeat_interleave(scheme.block, dim=1).numpy()
