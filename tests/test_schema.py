"""The JSON Schemas in the repository describe the records that the tool writes, and refuse what it would not write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import pytest
from command_line import JUDGE, here, made  # noqa: F401  fixtures
from fake_run import record_of, signed
from jsonschema import Draft202012Validator

from harness.cli import main
from harness.gate import CHAIN, SCHEMA
from harness.ladder import NAMES
from harness.run import SCHEMA as RUN_SCHEMA
from harness.run import Run

FOLDER = Path(__file__).resolve().parent.parent / "harness" / "report" / "schema"


def validator(name: str) -> Draft202012Validator:
    """The validator of one schema, itself checked."""
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def wrong(name: str, record: Any) -> list[str]:
    """What the schema has against a record."""
    return [f"{error.json_path}: {error.message}"[:300] for error in validator(name).iter_errors(record)]


@pytest.mark.parametrize("kind", ["healthy", "failing"])
def test_made_up_records_are_described(kind):
    assert wrong("run", record_of(kind)) == []
    assert wrong("certificate", signed(record_of(kind))) == []


def test_a_record_of_a_real_run_is_described(here, capsys):  # noqa: F811
    assert main([*JUDGE.split(), "--rung", "inputs", "--rung", "vision", "--rung", "decoder"]) in (0, 1, 3)
    for name in ("run", "certificate"):
        record = json.loads((here / "out" / f"{name}.json").read_text())
        assert wrong(name, record) == []
    assert record["schema"] == SCHEMA


def test_the_schemas_name_what_the_code_names():
    run, certificate = (validator(name).schema for name in ("run", "certificate"))
    assert run["properties"]["schema"]["const"] == RUN_SCHEMA and certificate["properties"]["schema"]["const"] == SCHEMA
    assert {*run["required"], "power"} == set(run["properties"]) == {"schema", *Run.__dataclass_fields__}
    assert tuple(run["properties"]["verdicts"]["items"]["properties"]["rung"]["enum"]) == NAMES
    assert tuple(link["properties"]["name"]["const"] for link in
                 certificate["properties"]["chain"]["prefixItems"]) == CHAIN


def test_a_picture_that_is_an_address_is_refused():
    assert any("image" in sentence for sentence in wrong("run", record_of("hostile")))


@pytest.mark.parametrize("name, spoil", [
    ("run", lambda record: record.pop("verdicts")), ("run", lambda record: record.update(schema=0)),
    ("run", lambda record: record["verdicts"][0].update(outcome="FINE")),
    ("run", lambda record: record["bounds"][0].update(because="")),
    ("run", lambda record: record["subject"]["bundle"].update(digest="abc")),
    ("run", lambda record: record["heat"][0].update(values=[["x"]])),
    ("certificate", lambda record: record.pop("chain")), ("certificate", lambda record: record.update(extra=1)),
    ("certificate", lambda record: record["chain"].reverse()),
    ("certificate", lambda record: record["rungs"].pop("vision"))])
def test_what_the_tool_would_not_write_is_refused(name, spoil: Callable[[dict], Any]):
    record = record_of("healthy") if name == "run" else signed(record_of("healthy"))
    spoil(record)
    assert wrong(name, record)


def test_the_schemas_travel_with_the_package():
    import tomllib

    table = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "report/schema/*" in table["tool"]["setuptools"]["package-data"]["harness"]
    assert fake_run.HOSTILE and sorted(path.name for path in FOLDER.iterdir()) == ["certificate.schema.json",
                                                                                  "run.schema.json"]
