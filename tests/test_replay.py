"""Replay: the program that ships, compiled, computes what the exported torch graph computes, in whatever order it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_bundle import CONTEXT, GRID, Small, small_bundle

from harness.engines import Request
from harness.engines.replay.arithmetic import Fp16, Fp32
from harness.engines.replay.compile import Constants, compiled, new_states
from harness.engines.replay.decoder import STEPS, Conversation, Decoder
from harness.engines.replay.engine import ReplayEngine
from harness.engines.replay.plan import plan
from harness.engines.replay.program import Function, Node, Program, Value, read_program
from harness.engines.replay.sizes import Size
from harness.engines.replay.weights import Weight
from harness.errors import HarnessError, Undecided
from harness.graph.protocol import untapped

pytest.importorskip("coreai")


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bundle()


@pytest.fixture(scope="module")
def program(small: Small) -> Program:
    return read_program(small.decoder)


def engine(small: Small, decoder=None, **settings) -> ReplayEngine:
    settings = {"seam_index": None if decoder else small.seams, "context": CONTEXT, **settings}
    return ReplayEngine(decoder or small.decoder, small.vision, geometry=small.checkpoint.geometry, grid=GRID, **settings)


def request(small: Small, **settings) -> Request:
    return Request(small.image_case(), forced=(3, 4, 5), seams=small.twin.seams(), kv=True, **settings)


class ByRow(Fp32):
    """One row of a matrix product after the other, as single steps multiply them."""

    def linear(self, x, w):
        return torch.stack([super(ByRow, self).linear(row, w) for row in x]) if x.ndim > 2 and len(x) > 1 else \
            super().linear(x, w)


def talk(function: Function, order: str, arithmetic=None, tokens: int = 20):
    """Logits and cache of some tokens, in one order."""
    made = Decoder(function, Constants(arithmetic or Fp32(), dense=True), {}, order)
    conversation = Conversation(made, {}, CONTEXT)
    logits, _ = conversation.feed(np.arange(5, 5 + tokens))
    return [logits, *conversation.kv().values()]


def test_a_program_is_read_whole(program: Program):
    main = program.main
    assert [value.name for value in main.states] == ["keyCache", "valueCache"]
    assert main.outputs["logits"].shape == (1, 1, 512) or main.outputs["logits"].shape[:2] == (1, 1)
    made = {value.id for node in main.nodes for value in node.results}
    given = {value.id for value in (*main.inputs, *main.states)}
    for node in main.nodes:
        for value in node.operands:
            assert value.constant is not None or value.id in made | given
    assert [node.at for node in main.nodes] == sorted({node.at for node in main.nodes})


def test_fp32_is_the_exported_graph_bit_for_bit(small: Small, program: Program):
    """Step by step, against our torch graph with the bundle's weights, which rounds in the same places."""
    replayed = talk(program.main, "steps")
    graph = small.twin.conversion
    cache = tuple(torch.zeros(tuple(value.shape)) for value in program.main.states)
    slots, hidden = graph.slots, small.checkpoint.geometry.hidden
    zeros, none = torch.zeros(slots, hidden), torch.zeros(1, dtype=torch.int32)
    rows = [graph.decode(torch.tensor([[5 + at]], dtype=torch.int32), torch.arange(at + 1, dtype=torch.int32)[None], zeros,
                         torch.zeros(3 * slots, hidden), none, none, cache)[0] for at in range(20)]
    expected = [torch.cat(rows), *(state[:, 0, :, :20] for state in cache)]
    for ours, theirs in zip(replayed, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_vision_differs_in_has_three_names(small: Small, monkeypatch):
    """The patch bias folded into the positions, a Linear's bias added after its product, layer norm spelled out: with the
    torch tower doing the same, nothing is left."""
    recorded = next(engine(small).run([request(small)]))
    product = torch.nn.functional.linear

    def apart(x, weight, bias=None):
        return product(x, weight) if bias is None else product(x, weight) + bias

    def spelled(x, shape, weight, bias, eps):
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias

    monkeypatch.setattr(torch.nn.functional, "linear", apart)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", spelled)
    seen = {}

    def tap(name, value):
        seen[name] = torch.from_numpy(recorded[name]).reshape(value.shape) if name == "vision.embed" else value
        return seen[name]

    small.twin.conversion.encode(torch.from_numpy(small.image_case().patches), tap)
    compared = set(seen) & set(recorded)
    assert len(compared) > 20
    for name in compared:
        assert np.array_equal(seen[name].numpy().reshape(recorded[name].shape), recorded[name]), name


def test_every_seam_is_the_twin_s(small: Small):
    trace = next(engine(small).run([request(small)]))
    twin = next(small.twin.run([request(small)]))
    assert len(trace) > 60
    for seam in set(trace) & set(twin):
        assert np.abs(trace[seam] - twin[seam]).max() <= 2e-5 * max(np.abs(twin[seam]).max(), 1), seam


def test_layer_major_order_is_step_order_bit_for_bit_where_products_go_row_by_row(program: Program):
    steps, layers = talk(program.main, "steps"), talk(program.main, "layers", ByRow())
    assert all(torch.equal(one, other) for one, other in zip(steps, layers, strict=True))


def test_one_matrix_product_of_all_rows_differs_in_the_last_bits_only(program: Program):
    steps, layers = talk(program.main, "steps"), talk(program.main, "layers")
    for one, other in zip(steps, layers, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_a_pass_may_follow_another(small: Small):
    whole, parts = (next(engine(small, chunk=chunk).run([request(small, free=2)])) for chunk in (None, 4))
    assert np.abs(whole["logits"] - parts["logits"]).max() <= 1e-5 * np.abs(whole["logits"]).max()
    assert whole.facts["tokens"] == parts.facts["tokens"] and parts.facts["calls"] > whole.facts["calls"]


def test_any_number_of_tokens_a_call(small: Small):
    dynamic = next(engine(small, small.dynamic).run([request(small)]))
    single = next(engine(small).run([request(small)]))
    for seam in ("logits", "kv.keys", "kv.values"):
        assert np.abs(dynamic[seam] - single[seam]).max() <= 1e-5 * np.abs(single[seam]).max()


def test_a_prefill_function_fills_the_same_cache(small: Small, tmp_path):
    """An asset with `main` (S = 1) and `prefill` (S = 4), which share their weights."""
    import coreai_torch

    from harness.export.program import DECODER_INPUTS, DECODER_STATES

    graph, geometry = small.twin.conversion, small.checkpoint.geometry
    graph.decoder.tap = untapped
    cache = torch.zeros(geometry.layers, 1, geometry.kv_heads, CONTEXT, geometry.head_dim)
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    for name, tokens in (("main", 1), ("prefill", 4)):
        example = (torch.zeros(1, tokens, dtype=torch.int32), torch.arange(8, dtype=torch.int32)[None],
                   torch.zeros(graph.slots, geometry.hidden), torch.zeros(3 * graph.slots, geometry.hidden),
                   torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), cache, cache.clone())
        shapes = [None] * 8
        shapes[1] = {1: torch.export.Dim("T", min=4, max=CONTEXT - 1)}
        exported = torch.export.export(graph.decoder.requires_grad_(False), example, dynamic_shapes=tuple(shapes))
        converter.add_exported_program(exported.run_decompositions(coreai_torch.get_decomp_table()),
                                       input_names=DECODER_INPUTS, state_names=DECODER_STATES, output_names=("logits",),
                                       entrypoint_name=name)
    asset = tmp_path / "two.aimodel"
    converter.to_coreai().save_asset(asset)
    both = read_program(asset)
    assert set(both.functions) == {"main", "prefill"}
    single, filled = (next(engine(small, asset, prefill=prefill).run([request(small)])) for prefill in (False, True))
    assert filled.facts["calls"] < 12 + 3
    for seam in ("logits", "kv.keys", "kv.values"):
        assert np.abs(filled[seam] - single[seam]).max() <= 1e-5 * np.abs(single[seam]).max()
    with pytest.raises(HarnessError, match="has no function prefill"):
        next(engine(small, prefill=True).run([request(small)]))


def test_codes_dequantized_in_parts_are_the_whole(program: Program, monkeypatch):
    made = compiled(program.main, Constants(Fp32()))
    tables = [held for held in made._wide.values() if isinstance(held, Weight) and held.scale is not None]
    wholes = [table.hold(Fp32()).whole for table in tables]
    expected = talk(program.main, "steps")[0]
    monkeypatch.setattr("harness.engines.replay.weights.PART", 1 << 10)
    assert len(tables) == 22 and all(len(list(table.parts(Fp32()))) > 1 for table in tables)
    assert all(torch.equal(torch.cat(list(table.parts(Fp32()))), whole) for table, whole in zip(tables, wholes))
    conversation = Conversation(Decoder(program.main, Constants(Fp32()), {}, "steps"), {}, CONTEXT)
    assert torch.allclose(conversation.feed(np.arange(5, 25))[0], expected, rtol=0, atol=1e-5)


def test_fp16_stores_what_the_program_says(program: Program):
    assert Fp16().held("f16") is torch.float16 and Fp32().held("f16") is torch.float32
    ones = torch.ones(1, 4096, dtype=torch.float16)
    assert Fp16().linear(ones, ones).item() == 4096, "sums in float32; in fp16 they end at 2048"


def test_a_value_handed_out_is_not_overwritten_later(program: Program):
    """A tap on what was read from a state keeps the state from being written in place."""
    read = next(node.results[0] for node in program.main.nodes if node.op == "read_handle")
    assert plan(program.main).in_place
    assert len(plan(program.main, kept=[read.id]).in_place) < len(plan(program.main).in_place)


def test_the_source_can_be_read(program: Program):
    source = compiled(program.main, Constants(Fp32()), steps=STEPS).source
    assert source.count("for p in steps(B, device):") == small_layers(program) + 1  # positions, then each layer's cache
    assert all("#" in line or line.strip().startswith(("def", "return", "for", "del", "l", "B =", "v", "T =", "n"))
               for line in source.splitlines() if line.strip())


def small_layers(program: Program) -> int:
    return next(value for value in program.main.states).shape[0]


def test_an_unknown_operation_is_named_before_anything_runs(program: Program):
    first, *rest = program.main.nodes
    strange = Node("warp", first.operands, first.results, {}, first.at)
    with pytest.raises(HarnessError, match=r"operation 'warp' is not known, it is number \d+"):
        plan(with_nodes(program.main, [strange, *rest]))


def test_a_cache_that_layers_share_is_refused_in_layer_major_order(program: Program):
    """Every layer on slot 0 of the cache: in step order each reads what the one before wrote, so loops may not turn."""
    shared = [Node(node.op, (node.operands[0], *(at_layer_zero(value) for value in node.operands[1:])), node.results,
                   node.attributes, node.at, node.scope) if node.op in ("slice", "slice_update") else node
              for node in program.main.nodes]
    with pytest.raises(HarnessError, match="may touch the same part of state"):
        plan(with_nodes(program.main, shared), STEPS)


def at_layer_zero(value: Value) -> Value:
    """Bounds that pick layer 1 of the cache pick layer 0."""
    constant = value.constant
    if constant is None or value.shape != (5,) or constant.array[0] not in (1, 2):
        return value
    from dataclasses import replace

    moved = constant.array.copy()
    moved[0] -= 1
    return replace(value, id=value.id + 100_000, constant=replace(constant, _held=moved))


def with_nodes(function: Function, nodes: list[Node]) -> Function:
    from dataclasses import replace

    return replace(function, nodes=tuple(nodes))


def test_more_tokens_than_slots_are_refused(program: Program):
    with pytest.raises(HarnessError, match="the cache has 48 slots"):
        talk(program.main, "steps", tokens=CONTEXT + 1)
    step = compiled(program.main, Constants(Fp32()))
    states = new_states(program.main, Constants(Fp32()))
    fixed = {value.name: torch.zeros(value.shape, dtype=step.arithmetic.held(value.dtype)) for value in program.main.inputs
             if value.name not in STEPS}
    with pytest.raises(HarnessError, match="longer than the state has slots"):
        step(states, input_ids=torch.zeros(1, 1, dtype=torch.int32),
             position_ids=torch.arange(CONTEXT + 1, dtype=torch.int32)[None], **fixed)


def test_no_trace_of_bytes_that_do_not_match_their_hash(small: Small, tmp_path):
    import shutil

    damaged = tmp_path / small.decoder.name
    shutil.copytree(small.decoder, damaged)
    (damaged / "main.hash").write_bytes(bytes(32))
    with pytest.raises(HarnessError, match="do not match main.hash"):
        next(engine(small, damaged).run([request(small)]))


def test_choices_that_do_not_exist(small: Small):
    with pytest.raises(HarnessError, match="fp8"):
        engine(small, arithmetic="fp8")
    with pytest.raises(HarnessError, match="sideways"):
        engine(small, order="sideways")
    if not torch.cuda.is_available():
        with pytest.raises(Undecided, match="cuda"):
            engine(small, device="cuda")


@pytest.mark.parametrize(("size", "text"), [
    (Size(3), "3"), (Size(0, (("T", 1),)), "T"), (Size(-1, (("T", 1),)), "T - 1"), (Size(2, (("T", -1),)), "-T + 2"),
    (Size(0, (("T", 2),)) - Size(0, (("T", 1),)), "T"), (Size(-4), "-4"), (Size(1, (("N", 1), ("T", -2))), "N - 2 * T + 1")])
def test_sizes_read_as_python(size: Size, text: str):
    assert str(size) == text
