"""Power: the smallest error seen is found by bisection, by the rung's own judgement, and drawn."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.faults import power
from harness.faults.scoreboard import bench_for
from harness.options import Options
from harness.report.power import draw_power


@given(st.floats(1e-8, 1e2))
def test_bisection_finds_where_seeing_begins(threshold):
    found = power.bisect(lambda size: size >= threshold)
    assert threshold <= found <= 1.07 * threshold


def test_what_is_never_seen_is_infinite():
    assert power.bisect(lambda size: False) == math.inf


@pytest.mark.parametrize("way", [power.EVERYWHERE, power.ONE_TOKEN])
def test_noise_has_the_size_asked(way):
    value = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    made = power.noise(value, 0.01, way) - value
    where = slice(None) if way == power.EVERYWHERE else 4
    assert torch.isclose(made.norm(), 0.01 * value[where].norm(), rtol=1e-4)
    assert torch.equal(power.noise(value[:1], 0.01, power.ONE_TOKEN), value[:1])


def test_a_rung_sees_little_and_not_nothing(tmp_path):
    """Two injections of different targets, each between its own rounding and a thousandth."""
    bench = bench_for(Options(), True, tmp_path)
    wanted = {("decoder", "decoder.layers.01", power.EVERYWHERE), ("weights", "lm_head.weight", power.ONE_VALUE)}
    found = [one for one in power.injections(bench) if (one.rung, one.seam, one.way) in wanted]
    assert len(found) == len(wanted)
    for one in found:
        assert not power._seen(bench, one, 0.0), "nothing injected is nothing seen"
        assert power.SMALLEST < power.bisect(lambda size, one=one: power._seen(bench, one, size)) < 1e-3


def test_the_plot_is_well_formed_and_its_text_stays_text():
    rows = [{"rung": "decoder", "case": "<script>", "seam": f"decoder.layers.{layer:02d}", "way": way, "least": least}
            for layer in range(3) for way in (power.EVERYWHERE, power.ONE_TOKEN) for least in (1e-6, None)]
    drawn = str(draw_power(rows))
    assert "<script>" not in drawn and "not seen" in drawn and "seen from 1e-06" in drawn
    assert len(ElementTree.fromstring(drawn).findall(".//{*}title")) == len(rows)
    assert str(draw_power([])) == ""


def test_the_record_passes_only_where_all_is_seen():
    row = {"rung": "decoder", "case": "c", "seam": "logits", "way": power.EVERYWHERE, "least": 1e-6}
    assert power.passed({"rows": [row]}) and not power.passed({"rows": [row, {**row, "least": None}]})
    assert not power.passed({"rows": []})
