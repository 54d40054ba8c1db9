"""The weight audit finds tensors by content and names what is missing, stale, misplaced, or stored another way."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from harness.audit import audit
from harness.tables import Expected

RNG = np.random.default_rng(0)


@dataclass
class Table:
    values: np.ndarray
    at: int
    stored: str = "f16"
    uses: list = field(init=False)

    def __post_init__(self):
        self.uses = [SimpleNamespace(at=self.at)]

    @property
    def shape(self):
        return self.values.shape

    def rows(self, start=0, stop=None, columns=None):
        return self.values[start:stop] if columns is None else self.values[start:stop, :columns]

    def digits(self, start, stop):
        return None


def of(name, value, weight=None, step=None):
    """An Expected of arrays that are there."""
    rows = [part if part is None or part.ndim > 1 else part[None] for part in (value, weight, step)]
    value = rows[0]
    cut = [None if part is None else lambda start, stop, columns=None, part=part: part[start:stop, :columns] for part in rows]
    if step is None:
        return Expected(name, value.shape, cut[0])
    return Expected(name, value.shape, *cut, lambda start, stop: (value[start:stop].astype(np.int8), value[start:stop]))


def half(*shape):
    return RNG.standard_normal(shape).astype(np.float16)


NAMES = [f"m.layers.{layer}.{part}.weight" for layer in range(4) for part in ("q", "k", "norm")]
VALUES = {name: half(8) if name.endswith("norm.weight") else half(12, 8) for name in NAMES}
EXPECTED = [of(name, value) for name, value in VALUES.items()]


def tables(**changes):
    return [Table(changes.get(name, value), number) for number, (name, value) in enumerate(VALUES.items())]


def wrong(findings):
    return {one.name: one for one in findings if one.wrong}


def test_a_healthy_program_holds_everything_and_nothing_else():
    findings, extra = audit(EXPECTED, tables())
    assert not wrong(findings) and not extra and [one.name for one in findings] == NAMES


def test_a_kernel_of_a_convolution_is_a_matrix():
    """A patch embedding may be exported as the convolution that it is: [made, channels, 1, 2, 2]."""
    value = half(16, 12)
    findings, extra = audit([of("patch", value), *EXPECTED], [*tables(), Table(value.reshape(16, 3, 1, 2, 2), 99)])
    assert not wrong(findings) and not extra
    stale = value.copy()
    stale[5, 7] += 1
    findings, _ = audit([of("patch", value)], [Table(stale.reshape(16, 3, 1, 2, 2), 99)])
    assert (findings[0].wrong, findings[0].rows) == (1, (5,))


def test_a_transposed_and_a_fused_table_are_healthy():
    held = tables()
    held[0] = Table(np.ascontiguousarray(held[0].values.T), 0)
    held[3:5] = [Table(np.concatenate([VALUES[NAMES[3]], VALUES[NAMES[4]]]), 3)]
    findings, extra = audit(EXPECTED, held)
    assert not wrong(findings) and not extra


def test_a_stale_row_is_named():
    stale = VALUES[NAMES[4]].copy()
    stale[7] = 0
    findings, _ = audit(EXPECTED, tables(**{NAMES[4]: stale}))
    assert {name: one.rows for name, one in wrong(findings).items()} == {NAMES[4]: (7,)}


def test_a_rescaled_tensor_is_found_by_its_likeness():
    findings, extra = audit(EXPECTED, tables(**{NAMES[4]: VALUES[NAMES[4]] * np.float16(1.5)}))
    assert list(wrong(findings)) == [NAMES[4]] and not extra


def test_a_missing_tensor_is_named_and_a_foreign_one_returned():
    held = tables()
    held[2] = Table(half(5, 5), 2)
    findings, extra = audit(EXPECTED, held)
    assert wrong(findings)[NAMES[2]].reason == "the program holds no such table" and len(extra) == 1


def test_two_layers_exchanged_are_out_of_place():
    held = tables()
    for first, other in ((0, 9), (1, 10), (2, 11)):
        held[first].values, held[other].values = held[other].values, held[first].values
    findings, _ = audit(EXPECTED, held)
    assert {name.split(".")[2] for name in wrong(findings)} == {"0", "3"}
    assert "another layer" in wrong(findings)[NAMES[0]].reason


def test_two_roles_exchanged_in_one_layer_are_out_of_order():
    held = tables()
    held[3].values, held[4].values = held[4].values, held[3].values
    findings, _ = audit(EXPECTED, held)
    assert set(wrong(findings)) == {NAMES[3], NAMES[4]}


@pytest.fixture
def quantized():
    weight = half(4, 64)
    step = np.repeat(np.abs(weight.reshape(4, 2, 32)).max(-1) / np.float16(127), 32, axis=1).astype(np.float16)
    codes = np.round(weight.astype(np.float32) / step)
    value = (codes.astype(np.float16) * step).astype(np.float16)
    return of("w", value, weight, step.astype(np.float32)), codes, step


def codes_table(value):
    return [Table(value.astype(np.float16), 0, "si8 x f16/32")]


def test_another_rounding_of_ties_is_healthy(quantized):
    expected, codes, step = quantized
    exact = expected.weight(0, 4).astype(np.float64) / step
    other = np.where(np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 0.004, np.trunc(exact) + np.sign(exact), codes)
    findings, _ = audit([expected], codes_table(other.astype(np.float16) * step))
    assert not wrong(findings)


@pytest.mark.parametrize("spoil", [lambda codes, step: (codes + 1) * step, lambda codes, step: codes * np.roll(step, 1, 0),
                                   lambda codes, step: codes * step * np.float16(0.55)])
def test_a_wrong_code_or_step_is_no_rounding(quantized, spoil):
    expected, codes, step = quantized
    findings, _ = audit([expected], codes_table(spoil(codes.astype(np.float16), step)))
    assert wrong(findings)


def test_storage_must_be_the_recipes(quantized):
    expected, _, _ = quantized
    findings, _ = audit([expected], [Table(expected.value(0, 4), 0)])
    assert "the recipe stores it as codes" in findings[0].reason and findings[0].wrong
    findings, _ = audit([of("w", expected.value(0, 4))], codes_table(expected.value(0, 4)))
    assert "the recipe stores it as it is" in findings[0].reason and findings[0].wrong
