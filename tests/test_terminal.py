"""What a run prints at its end, on a screen of 80 columns: nothing cut off, the first fault in sight, commands whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import record_of

from harness.gate import fold
from harness.ladder import NAMES
from harness.policy import policy_from
from harness.run import Run, run_from_record
from harness.terminal import Screen

COMMAND = "harness ladder a/very/long/path/to/a/checkpoint --rung decoder --case scene-211 --policy another/policy.toml"


@pytest.fixture
def shown(monkeypatch, capsys):
    """What the table of a record prints."""
    monkeypatch.setenv("COLUMNS", "80")

    def show(record: dict, names=NAMES) -> list[str]:
        run: Run = run_from_record(record)
        Screen(quiet=True).table(run, fold(run.verdicts, policy_from(record["policy"])), names, Path("reports") / ("x" * 80))
        return capsys.readouterr().out.splitlines()
    return show


def test_a_healthy_run_is_one_screen(shown):
    lines = shown(record_of("healthy"))
    assert [line.split()[0] for line in lines[1:] if line.startswith(NAMES)] == list(NAMES)
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines[:-1]) and "…" not in "".join(lines)
    assert any(line.startswith("PASS: ") for line in lines) and not any("broken" in line for line in lines)
    assert lines[-1] == f"report: reports/{'x' * 80}/report.html", "a path is not wrapped"


def test_the_first_fault_is_shown_whole_and_the_rest_in_a_line_each(shown):
    record = record_of("failing")
    record["localization"][0]["reproduce"] = COMMAND
    record["localization"] += [{**record["localization"][0], "rung": rung, "seam": "tokens", "op": None}
                               for rung in ("decode", "engine", "tokens")]
    lines = shown(record)
    text = "\n".join(lines)
    assert "decoder    FAIL" in text and "first broken (decoder): decoder.layers.01 at decoder.layers.01.attn.q_rope" in text
    assert f"  reproduce: {COMMAND}" in lines and text.count("reproduce:") == 1, "a command is copied from one line"
    assert [line for line in lines if line.startswith("also broken")] == [
        f"also broken ({rung}): tokens, case scene-211" for rung in ("decode", "engine", "tokens")]
    start = next(at for at, line in enumerate(lines) if line.startswith("first broken"))
    end = max(at for at, line in enumerate(lines) if line.startswith("also broken"))
    assert end - start < 12


def test_one_rung_shows_one_row_and_no_verdict_on_the_whole(shown):
    lines = shown(record_of("failing"), ("vision",))
    assert [line.split()[0] for line in lines if line.startswith(NAMES)] == ["vision"]
    assert not any(line.startswith(("PASS: ", "FAIL: ")) for line in lines)


def test_text_of_others_cannot_fill_the_screen_or_style_it(shown):
    record = record_of("failing")
    for verdict in record["verdicts"]:
        verdict["reason"] = "[bold]" + "a very long story\n" * 500
    lines = shown(record)
    assert len(lines) < 80 and any("[bold]" in line for line in lines)
    assert all(len(line) <= 80 for line in lines[:-1] if "reproduce" not in line)
