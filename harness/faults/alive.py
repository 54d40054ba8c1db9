"""The equivalent-mutant check: whether a fault changes anything at all in the thing under test, judge aside.

A graph is run whole, in calls of 37 tokens and token by token, on a square and on another grid, and on a text longer
than any case, and its norms and MLPs alone on rows of several sizes; an engine's loop, a host and a bundle's tables are
compared value by value.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness.errors import HarnessError
from harness.faults import Fault
from harness.faults.loop import Loop
from harness.faults.suspect import Host, Suspect
from harness.faults.tables import ship
from harness.faults.trial import Bench
from harness.graph.contract import host_inputs
from harness.graph.protocol import untapped
from harness.graph.reference import Reference

CALLS = (37, 1)
STEPS = 12
LONG = 2600
SIZES = ((448, 320), (470, 333), (1500, 1200), (60, 90))
"""Width and height: on the grid, off it, past the largest area, below the least."""


def moved(bench: Bench, fault: Fault) -> str | None:
    """Where the first difference shows, or None for a mutant that changes nothing that is looked at here."""
    looks = {"graph": _graph, "host": _host, "engine": _engine, "bundle": _bundle, "model": _model, "asset": _asset,
             "evidence": _evidence}
    pairs = looks[fault.target](bench, fault)
    return next((name for name, old, new in pairs if not _same(old, new)), None)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, str) or isinstance(new, str):
        return old == new
    old, new = np.asarray(old), np.asarray(new)
    return old.shape == new.shape and bool(np.array_equal(old, new, equal_nan=old.dtype.kind == "f"))


Pairs = Iterator[tuple[str, Any, Any]]


def _graph(bench: Bench, fault: Fault) -> Pairs:
    suspect = bench.suspect(fault)
    for case in ("wide", *bench.subject.engine_cases()[:1]):
        grid = bench.subject.grid(case)
        old, new = bench.subject.conversion(grid), suspect.conversion(grid)
        for name, value in old.tensors().items():
            yield name, value, new.tensors()[name]
        for whole in (True, False):
            yield from zip(*_columns(_run(old, bench, case, whole), _run(new, bench, case, whole)))
    yield from zip(*_columns(_long(old), _long(new)))
    yield from zip(*_columns(_alone(old), _alone(new)))


def _alone(graph: Reference) -> dict[str, Any]:
    """What norms, MLPs and mergers make of rows from very small to large."""
    generator, found = torch.Generator().manual_seed(0), {}
    for tower in (graph.vision, graph.decoder):
        for name, module in tower.named_modules():
            size = getattr(module, "weight", None)
            if "norm" in name and size is not None:
                found[name] = module(_rows(len(size), generator))
            elif name.endswith("mlp"):
                first = getattr(module, "gate_proj", getattr(module, "linear_fc1", None))
                found[name] = module(_rows(first.in_features, generator), name, untapped)
    return {name: value.numpy() for name, value in found.items()}


def _rows(size: int, generator: torch.Generator) -> torch.Tensor:
    sizes = torch.tensor([0.0, 1e-6, 1e-3, 1.0, 30.0, 1000.0])
    return sizes[None, :, None] * torch.randn(1, len(sizes), size, generator=generator)


def _columns(old: dict[str, Any], new: dict[str, Any]) -> tuple[list, list, list]:
    names = list(dict.fromkeys((*old, *new)))
    return names, [old.get(name, "absent") for name in names], [new.get(name, "absent") for name in names]


def _run(graph: Reference, bench: Bench, case: str, whole: bool) -> dict[str, Any]:
    """All seams and the cache of one case: in one call, or in calls of 37 tokens and then single ones."""
    inputs = bench.subject.recorded(case).inputs
    merged = (inputs.grid[1] // 2, inputs.grid[2] // 2)
    host = host_inputs(inputs.ids, bench.subject.geometry.image_token, bench.subject.geometry.vocab, merged)
    seams: dict[str, list[Any]] = {}

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        seams.setdefault(name, []).append(value.numpy().copy())
        return value

    image, deepstack = graph.encode(torch.from_numpy(inputs.patches), tap)
    cuts = [0, len(host.ids)] if whole else [*range(0, len(host.ids) - STEPS, CALLS[0]),
                                             *range(len(host.ids) - STEPS, len(host.ids) + 1)]
    seams |= {"image": [image.numpy()], "deepstack": [deepstack.numpy()]}
    cache = _calls(graph, host.ids, cuts, (image, deepstack), (host.shift_start, host.shift_amount), tap)
    return {name: np.concatenate(parts) for name, parts in seams.items()} | cache


def _long(graph: Reference) -> dict[str, Any]:
    """Logits and cache of a text past every case, in calls of 500 tokens and at last of one."""
    ids = np.random.default_rng(0).integers(0, graph.geometry.vocab // 2, LONG)
    rows = graph.slots, 3 * graph.slots
    empty = tuple(torch.zeros(count, graph.geometry.hidden) for count in rows)
    logits: list[Any] = []

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "logits":
            logits.append(value.numpy().copy())
        return value

    cache = _calls(graph, ids, [*range(0, LONG, 500), *range(LONG - 3, LONG + 1)], empty, (1 << 30, 0), tap)
    return {"logits": np.concatenate(logits)} | cache


def _calls(graph: Reference, ids: np.ndarray, cuts: list[int], image: tuple, shift: tuple[int, int], tap: Any) -> dict:
    geometry = graph.geometry
    shape = (geometry.layers, 1, geometry.kv_heads, len(ids) + 1, geometry.head_dim)
    cache = torch.zeros(shape), torch.zeros(shape)
    for start, stop in itertools.pairwise(cuts):
        graph.decode(torch.from_numpy(ids[start:stop].astype(np.int32))[None], torch.arange(stop, dtype=torch.int32)[None],
                     *image, *(torch.tensor([value], dtype=torch.int32) for value in shift), cache, tap)
    return {"keys": cache[0].numpy(), "values": cache[1].numpy()}


def _engine(bench: Bench, fault: Fault) -> Pairs:
    old, new = (Loop(bench.subject) for _ in range(2))
    fault.apply(new)
    for case in bench.subject.engine_cases():
        yield from zip(*_columns(dict(old.run(case)), dict(new.run(case))))


def _host(bench: Bench, fault: Fault) -> Pairs:
    old, new = (Host(Suspect(bench.subject)) for _ in range(2))
    fault.apply(new)
    for case in bench.subject.cases:
        one, other = (_made(host, case) for host in (old, new))
        yield from zip(*_columns(one, other))
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        yield f"{width}x{height}", old.patches(image, old.preprocessing)[0], new.patches(image, new.preprocessing)[0]
    token, vocab = bench.subject.geometry.image_token, bench.subject.geometry.vocab
    for merged in ((2, 3), (3, 2), (2, 2), None):
        ids = np.array([1, 2, 3, *([token] * (merged[0] * merged[1] if merged else 0)), 4, 5])
        one, other = (vars(host.contract(ids, token, vocab, merged)) for host in (old, new))
        yield from zip(*_columns(one, other))


def _made(host: Host, case: str) -> dict[str, Any]:
    try:
        made = host.make(case)
    except HarnessError as error:
        return {"error": str(error)}
    return {"ids": made.ids, "patches": "none" if made.patches is None else made.patches, "grid": str(made.grid)}


def _bundle(bench: Bench, fault: Fault) -> Pairs:
    old, new = ship(bench.subject), ship(bench.subject)
    fault.apply(new)
    for name in dict.fromkeys((*old.tables, *new.tables)):
        one, other = old.tables.get(name), new.tables.get(name)
        yield name, one.stored if one else "absent", other.stored if other else "absent"
        yield name, one.rows(), other.rows()
    yield "attributes", str((old.decoder, old.vision)), str((new.decoder, new.vision))


def _model(bench: Bench, fault: Fault) -> Pairs:
    suspect = bench.suspect(fault)
    twin = bench.subject.twin(bench.subject.options.grid).tensors()
    return ((name, value, suspect.model[name]) for name, value in twin.items() if name in suspect.model)


def _asset(bench: Bench, fault: Fault) -> Pairs:
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        files = bench.files(Path(folder))
        fault.apply(files)
        for old, new in zip(bench.bundles, (files.decoder, files.vision)):
            yield from _differ(old, new)


def _evidence(bench: Bench, fault: Fault) -> Pairs:
    from harness.faults.proof import Evidence

    with tempfile.TemporaryDirectory(dir=bench.work) as one, tempfile.TemporaryDirectory(dir=bench.work) as other:
        old, new = (Evidence(bench.subject, bench.green, Path(folder)) for folder in (one, other))
        fault.apply(new)
        yield "bundle", old.bundle_digest, new.bundle_digest
        yield from _differ(Path(one), Path(other))


def _differ(old: Path, new: Path) -> Pairs:
    for folder in (old, new):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(folder))
                yield name, *((place / name).read_bytes().hex() if (place / name).is_file() else "absent"
                              for place in (old, new))
