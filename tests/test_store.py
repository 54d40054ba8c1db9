"""Oracles on disk: whole or not at all, verified when read, never mixed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cases import Case, Turn
from harness.errors import HarnessError
from harness.store import Identity, Oracle, OracleWriter

IDENTITY = Identity(checkpoint="tiny", revision="r1", checkpoint_digest="d" * 64, geometry={"layers": 2}, device="cpu",
                    attention="sdpa", transformers="5.0", torch="2.13", tool="0.1")
ROOT = Path(__file__).resolve().parent.parent


def make_case(name: str = "one", **changes) -> Case:
    return replace(Case(name, "a reason", (Turn("user", "hello"),), decode=2), **changes)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"decoder.embed": generator.standard_normal((5, 4)).astype(np.float32),
            "logits": generator.standard_normal((5, 7)).astype(np.float32)}


def write_case(out: OracleWriter, case: Case, seed: int = 0) -> None:
    part = out.case(case)
    part.part("inputs", {"ids": np.arange(3, dtype=np.int32), "positions": np.ones((3, 3), dtype=np.int32),
                         "patches": np.ones((4, 6), dtype=np.float32), "grid": np.array([1, 2, 2], dtype=np.int32)})
    part.part("rollout", {"tokens": np.array([4, 5], dtype=np.int32), "margins": np.array([1, 2], dtype=np.float32),
                          "ties": np.array([1], dtype=np.int32), "positions": np.ones((3, 5), dtype=np.int32),
                          "noise": np.array([0.25])})
    part.part("decoder", arrays(seed))
    part.finish({"forward_s": 0.5})


@pytest.fixture
def oracle(tmp_path: Path) -> Path:
    with OracleWriter(tmp_path / "oracle", IDENTITY) as out:
        write_case(out, make_case())
    return tmp_path / "oracle"


def test_round_trip(oracle: Path) -> None:
    found = Oracle.open(oracle, "d" * 64)
    case = found.case("one")
    assert found.identity == IDENTITY and found.cases == ("one",)
    assert case.inputs.grid == (1, 2, 2) and case.inputs.ids.dtype == np.int32 and case.inputs.length == 3
    assert case.rollout.ties == (1,) and case.rollout.tokens.tolist() == [4, 5] and case.noise == 0.25
    assert set(case.trace) == set(arrays()) == set(case.seams)
    for name, array in arrays().items():
        assert case.trace[name].dtype == np.float32 and np.array_equal(case.trace[name], array)
    assert list(case.load(["logits", "no.such"])) == ["logits"]
    assert case.case_record["turns"] == [{"role": "user", "text": "hello", "image": None, "image_after_text": False}]
    assert case.facts == {"forward_s": 0.5}


def test_is_read_without_torch(oracle: Path) -> None:
    code = ("import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
            "from harness.store import Oracle\n"
            f"print(Oracle.open({str(oracle)!r}).case('one').trace['logits'].shape)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "(5, 7)", ran.stderr


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(oracle: Path, place: float, bit: int) -> None:
    path = oracle / "cases" / "one" / "decoder.safetensors"
    whole = path.read_bytes()
    data = bytearray(whole)
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        with pytest.raises(HarnessError, match="decoder.safetensors"):
            Oracle.open(oracle).case("one").trace
    finally:
        path.write_bytes(whole)


def test_a_flipped_byte_names_file_tensor_and_remedy(oracle: Path) -> None:
    path = oracle / "cases" / "one" / "decoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(HarnessError, match=r"decoder\.safetensors: logits: its bytes changed.*harness record"):
        Oracle.open(oracle).case("one").trace


@pytest.mark.parametrize("keep", [-8, 300, 20, 4, 0, None])
def test_a_truncated_or_missing_part_is_noticed(oracle: Path, keep: int | None) -> None:
    path = oracle / "cases" / "one" / "decoder.safetensors"
    data = path.read_bytes()
    path.unlink() if keep is None else path.write_bytes(data[:keep])
    with pytest.raises(HarnessError, match="damaged or missing"):
        Oracle.open(oracle).case("one").trace


@pytest.mark.parametrize("name, change", [
    ("decoder.json", lambda record: record["tensors"]["logits"].update(sha256="0" * 64)),
    ("case.json", lambda record: record["definition"].update(decode=3)),
    ("case.json", lambda record: record["parts"].remove("decoder")),
    ("case.json", lambda record: record.update(digest="0" * 64)),
    ("case.json", lambda record: record.pop("definition")),
    ("case.json", lambda record: record["parts"].append("../../manifest")),
])
def test_changed_records_are_noticed(oracle: Path, name: str, change) -> None:
    path = oracle / "cases" / "one" / name
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(HarnessError):
        Oracle.open(oracle).case("one")


@pytest.mark.parametrize("change, sentence", [
    (lambda manifest: manifest.update(schema=99), "schema 99 is not known"),
    (lambda manifest: manifest.pop("schema"), "lacks 'schema'"),
    (lambda manifest: manifest["identity"].pop("torch"), "torch"),
])
def test_a_manifest_that_is_not_ours(oracle: Path, change, sentence: str) -> None:
    manifest = json.loads((oracle / "manifest.json").read_text())
    change(manifest)
    (oracle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HarnessError, match=sentence):
        Oracle.open(oracle)


def test_no_oracle_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no oracle there"):
        Oracle.open(tmp_path)
    OracleWriter(tmp_path, IDENTITY).close()
    with pytest.raises(HarnessError, match="no whole case"):
        Oracle.open(tmp_path)


def begin(folder: Path, digest: str = "d" * 64, **stamps: int) -> OracleWriter:
    return OracleWriter(folder, replace(IDENTITY, checkpoint_digest=""), lambda: digest, stamps)


def test_parts_before_the_digest_is_known(tmp_path: Path) -> None:
    with begin(tmp_path, file=1) as out:
        out.case(make_case()).part("decoder", arrays())
    with pytest.raises(HarnessError, match="no whole case"):
        Oracle.open(tmp_path)
    with begin(tmp_path, file=1) as out:
        assert out.case(make_case()).resume("decoder", arrays()), "a killed run goes on"
    with begin(tmp_path, file=2) as out:
        assert not out.case(make_case()).resume("decoder", arrays()), "of another file"
        out.seal()
        write_case(out, make_case())
    assert Oracle.open(tmp_path, "d" * 64).identity == IDENTITY and not (tmp_path / "pending.json").exists()
    begin(tmp_path, file=3).close()  # the digest decides from here on
    with pytest.raises(HarnessError, match="checkpoint digest"):
        begin(tmp_path, "e" * 64, file=2)


def test_parts_of_nobody_knows_what_are_removed(oracle: Path) -> None:
    (oracle / "manifest.json").unlink()
    with begin(oracle, file=1):
        assert not list(oracle.glob("cases/one/*"))


def test_a_digest_that_fails_lets_go_of_the_directory(oracle: Path) -> None:
    def fails() -> str:
        raise HarnessError("the checkpoint changed")

    with pytest.raises(HarnessError, match="changed"):
        OracleWriter(oracle, IDENTITY, fails)
    OracleWriter(oracle, IDENTITY).close()


def test_another_checkpoint_is_refused(oracle: Path) -> None:
    with pytest.raises(HarnessError, match="oracle from another checkpoint revision"):
        Oracle.open(oracle, "e" * 64)


@pytest.mark.parametrize("name, value", [("revision", "r2"), ("checkpoint_digest", "e" * 64),
                                         ("transformers", "4.57.1"),
                                         ("dtype", "bfloat16"), ("precision", {"cudnn.conv": "tf32"})])
def test_identities_do_not_mix(oracle: Path, name: str, value: object) -> None:
    with pytest.raises(HarnessError, match=name.replace("_", " ")):
        OracleWriter(oracle, replace(IDENTITY, **{name: value}))
    OracleWriter(oracle, IDENTITY).close()  # the refusal let go of the directory


def test_two_writers_are_refused(oracle: Path) -> None:
    with OracleWriter(oracle, IDENTITY), pytest.raises(HarnessError, match="another process"):
        OracleWriter(oracle, IDENTITY)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "..", "a\0b"])
def test_names_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    with OracleWriter(tmp_path / "o", IDENTITY) as out:
        with pytest.raises(HarnessError, match="cannot name a file"):
            out.case(make_case(name))
        with pytest.raises(HarnessError, match="cannot name a file"):
            out.case(make_case()).part(name, arrays())
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("number, sentence", [(errno.ENOSPC, r"no space left.*needs 0\.0 MiB.*are free"),
                                              (errno.EACCES, "cannot be written")])
def test_a_failing_disk_leaves_nothing_half_written(oracle: Path, monkeypatch, number: int, sentence: str) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    before = Oracle.open(oracle).digest
    with OracleWriter(oracle, IDENTITY) as out:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(HarnessError, match=sentence):
            write_case(out, make_case("two"))
        monkeypatch.undo()
    assert list((oracle / "cases" / "two").iterdir()) == []
    assert Oracle.open(oracle).digest == before


def test_a_killed_run_leaves_parts_that_the_next_takes_over(oracle: Path) -> None:
    case = make_case("two")
    with OracleWriter(oracle, IDENTITY) as out:
        out.case(case).part("decoder", arrays(1))
    (oracle / "cases" / "two" / ".tmp-1-vision.safetensors").write_bytes(b"half")
    assert Oracle.open(oracle).cases == ("one",)
    with OracleWriter(oracle, IDENTITY) as out:
        assert not list(oracle.rglob(".tmp-*"))
        assert out.complete(make_case()) and not out.complete(case)
        again = out.case(case)
        assert not again.resume("vision", arrays()) and not again.resume("decoder", ["logits"])
        assert again.resume("decoder", arrays())
        again.finish()
    assert np.array_equal(Oracle.open(oracle).case("two").trace["logits"], arrays(1)["logits"])


def test_a_part_of_another_definition_does_not_count(oracle: Path) -> None:
    with OracleWriter(oracle, IDENTITY) as out:
        changed = make_case(decode=3)
        assert not out.complete(changed)
        assert not out.case(changed).resume("decoder", arrays())
    assert not list((oracle / "cases" / "one").iterdir())


def test_complete_asks_for_seams(oracle: Path) -> None:
    with OracleWriter(oracle, IDENTITY) as out:
        assert out.complete(make_case(), ["logits"]) and not out.complete(make_case(), ["logits", "kv.keys"])


def test_digest_binds_content_and_not_time(tmp_path: Path) -> None:
    def digest(folder: str, names: str, seed: int = 0, identity: Identity = IDENTITY) -> str:
        with OracleWriter(tmp_path / folder, identity) as out:
            for name in names:
                write_case(out, make_case(name), seed)
        return Oracle.open(tmp_path / folder).digest

    first = digest("a", "xy")
    assert digest("b", "yx") == first
    assert len({first, digest("c", "xy", seed=1), digest("d", "x"),
                digest("e", "xy", identity=replace(IDENTITY, device="cuda"))}) == 4


def test_stale(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"first")
    case = make_case(turns=(Turn("user", "hello", "a.png"),), root=tmp_path)
    with OracleWriter(tmp_path / "oracle", IDENTITY) as out:
        write_case(out, case)
    oracle = Oracle.open(tmp_path / "oracle")
    assert oracle.stale(case) is None and oracle.stale(replace(case, why="other", engine=False)) is None
    assert "decode" in oracle.stale(replace(case, decode=3))
    assert "turns" in oracle.stale(replace(case, turns=(Turn("user", "hullo", "a.png"),)))
    assert "not recorded" in oracle.stale(make_case("other"))
    (tmp_path / "a.png").write_bytes(b"second")
    assert "images" in oracle.stale(case)
