"""What goes through the stages for one case: the forward over prompt and tokens, and the rows computed another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from harness.cases import FrozenInputs
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.oracle.drain import Drain
from harness.oracle.hooks import SeamHooks, plain
from harness.oracle.rollout import arguments, behind, cache_name
from harness.store import CaseWriter
from harness.streaming.parked import Call, Parked
from harness.streaming.stages import Stage
from harness.streaming.weights import placed

CHUNK = "chunk"
"""Part that holds how far the second way has come; it is gone when the case is finished."""
Real = Mapping[nn.Module, Callable[..., Any]]


@dataclass
class Bench:
    """What all jobs of a recording share."""

    model: Any
    geometry: Geometry
    device: torch.device
    hooks: SeamHooks
    drain: Drain
    stages: Sequence[Stage]

    def stage_of(self, call: Call) -> Stage:
        """The stage that a waiting call belongs to."""
        return next(stage for stage in self.stages if call.module in stage.modules)


def seams_of(name: str, seams: Sequence[str], geometry: Geometry) -> list[str]:
    """Those of `seams` that the part of a stage holds, in order."""
    tower, _, number = name.partition(".")
    if tower == "norm":
        return [seam for seam in seams if seam == "decoder.norm"]
    if tower == "logits":
        return []
    heads = [f"{tower}.layers.{number}"]
    if number == "00":
        heads.append(f"{tower}.embed")
    if tower == "vision" and int(number) in geometry.deepstack_taps:
        heads.append(f"vision.deepstack.{geometry.deepstack_taps.index(int(number))}")
    if tower == "vision" and int(number) == geometry.vision_layers - 1:
        heads.append("vision.merger")
    return [seam for seam in seams if any(seam == head or seam.startswith(head + ".") for head in heads)]


def tensors_of(stage: Stage, seams: Sequence[str], geometry: Geometry) -> list[str]:
    """Names of the tensors in a stage's part."""
    return list(_tensors_of(stage.name, tuple(seams), geometry))


@lru_cache(1024)  # a GPU waits while a forward begins
def _tensors_of(name: str, seams: tuple[str, ...], geometry: Geometry) -> list[str]:
    tower, _, number = name.partition(".")
    if tower == "logits":
        return [name]
    cache = [f"kv.keys.{number}", f"kv.values.{number}"] if tower == "decoder" else []
    return seams_of(name, seams, geometry) + cache


class Whole:
    """Prompt + tokens in one forward; every stage's part goes to the store. Stages that are there already are stepped over.

    key: of the parts that depend on the tokens. `rows` [n, V] float32, when all is done, choose the tokens.
    """

    def __init__(self, bench: Bench, inputs: FrozenInputs, tokens: np.ndarray, seams: Sequence[str], out: CaseWriter,
                 key: str) -> None:
        self.bench, self.inputs, self.tokens, self.out, self.key = bench, inputs, tokens, out, key
        self.parts = {stage.name: tensors_of(stage, seams, bench.geometry) for stage in bench.stages
                      if inputs.patches is not None or not stage.name.startswith("vision.")}
        self.done = self._finished()
        self.cache, self.raw, self.kv, self._rows = DynamicCache(), {}, None, []
        named = {cache_name(bench.model): self.cache}
        bench.hooks.into(self.raw)
        self.forward = Parked(lambda: bench.model.model(**arguments(inputs, tokens, bench.device), **named)[0][0])
        self._step_over()

    def _finished(self) -> set[str]:
        """Stages whose parts are there, up to the first that is not; the head's rows are cheap and made again."""
        done = set()
        for name, tensors in self.parts.items():
            if name.startswith(("norm", "logits")) or not self.out.resume(name, tensors, self.key_of(name)):
                break
            done.add(name)
        return done

    def key_of(self, name: str) -> str:
        """The vision tower does not see the tokens."""
        return "" if name.startswith("vision.") else self.key

    def needs(self, stage: Stage) -> bool:
        """Whether this stage's weights are wanted."""
        return stage.name in self.parts and stage.name not in self.done

    def _step_over(self) -> None:
        # Nothing is computed with these weights, but transformers 4.57 asks the position table for its device.
        nothing = torch.full((), float("nan"), device=self.bench.device)
        last = {name.partition(".")[0]: name for name in self.parts if name in self.done}
        while self.forward.at is not None and (stage := self.bench.stage_of(self.forward.at)).name in self.done:
            seam = self._seam(self.forward.at.module, stage)
            matters = seam and (".layers." not in seam or stage.name in last.values())
            with placed(stage.places, [nothing.expand(place.shape) for place in stage.places]):
                self.forward.go(self._stored(stage, seam) if matters else _blank(self.forward.at))
        ahead = self.parts[self.bench.stage_of(self.forward.at).name] if self.forward.at else ()
        for name in [name for name in self.raw if name not in ahead]:
            del self.raw[name]

    def _seam(self, module: nn.Module, stage: Stage) -> str:
        """The seam that is a module's output; "" for one whose output is no seam."""
        tower, _, number = stage.name.partition(".")
        visual = self.bench.model.model.visual
        if module is visual.merger:
            return "vision.merger"
        if module in list(visual.deepstack_merger_list):
            return f"vision.deepstack.{list(visual.deepstack_merger_list).index(module)}"
        return "" if module in (visual.patch_embed, visual.pos_embed) else f"{tower}.layers.{number}"

    def _stored(self, stage: Stage, seam: str) -> Tensor:
        array = self.out.read(stage.name, [seam])[seam]
        value = torch.from_numpy(array).to(self.bench.device)
        return value[None] if seam.startswith("decoder.") else value

    def run(self, stage: Stage, tensors: Sequence[Tensor], real: Real) -> None:
        """Compute a stage whose weights are in place, and send its part to the store."""
        if stage.rows is not None:
            logits = F.linear(self.forward.result, tensors[0].to(self.forward.result.device))
            first = self.inputs.length - 1
            self._rows.append(logits[first:first + len(self.tokens)].clone())
            self.bench.drain.put(self.out, stage.name, {stage.name: logits}, self.key)
            return
        self.bench.hooks.into(self.raw)
        drive(self.forward, stage, real)
        names = self.parts[stage.name]
        values = plain(self.raw, [name for name in names if not name.startswith("kv.")], self.bench.geometry)
        self.kv = None
        if stage.name.startswith("decoder."):
            layer = self.cache.layers[-1]
            self.kv = layer.keys, layer.values
            layer.keys = layer.values = layer.keys[:, :, :0].clone()
            values |= {name: part[0] for name, part in zip(names[-2:], self.kv)}
        self.bench.drain.put(self.out, stage.name, values, self.key_of(stage.name))

    @property
    def rows(self) -> np.ndarray:
        """Logits [n, V] that choose the tokens."""
        return torch.cat(self._rows, dim=1).float().cpu().numpy()


class Chunk:
    """The rows that choose tokens first.. n - 1, computed behind a cache: as `Whole` left it in this pass, or stored.

    key: of the pass and its tokens; how far it came is kept under it, so that a killed run can go on. `rows`
    [n - first, V] float32 when all is done.
    """

    def __init__(self, bench: Bench, inputs: FrozenInputs, tokens: np.ndarray, first: int, out: CaseWriter,
                 key: str) -> None:
        self.bench, self.out, self.key, self.first = bench, out, key, first
        self.past, self.cache, self._rows, self.level = inputs.length - 1 + first, DynamicCache(), [], -1
        if self.past:
            blank = torch.zeros((), device=bench.device).expand(1, 1, self.past, 1)
            self.cache.update(blank, blank, 0)  # its length is asked for before the first layer runs
        named = {cache_name(bench.model): self.cache}
        bench.hooks.into(None)
        stream = self._resume()
        self.forward = Parked(lambda: bench.model.model(**behind(inputs, tokens, first, bench.device), **named)[0][0])
        for layer in range(self.level + 1):
            self.forward.go(stream if layer == self.level else _blank(self.forward.at))

    def _resume(self) -> Tensor | None:
        if not self.out.resume(CHUNK, ("level", "stream"), self.key):
            return None
        held = self.out.read(CHUNK, ("level", "stream"))
        self.level = int(held["level"][0])
        return torch.from_numpy(held["stream"])[None].to(self.bench.device)

    def needs(self, stage: Stage) -> bool:
        """Whether this stage's weights are wanted."""
        tower, _, number = stage.name.partition(".")
        return tower in ("norm", "logits") or tower == "decoder" and int(number) > self.level

    def run(self, stage: Stage, tensors: Sequence[Tensor], real: Real, kv: tuple[Tensor, Tensor] | None) -> None:
        """Compute a stage; kv: keys and values [1, kv_heads, T.., head_dim] of the whole forward, if it has just run."""
        if stage.rows is not None:
            self._rows.append(F.linear(self.forward.result, tensors[0].to(self.forward.result.device)))
            return
        self.bench.hooks.into(None)
        if stage.name.startswith("decoder."):
            self._remember(int(stage.name[8:]), stage, kv)
        drive(self.forward, stage, real)
        if stage.name.startswith("decoder."):
            layer = self.cache.layers[int(stage.name[8:])]
            layer.keys = layer.values = layer.keys[:, :, :0].clone()
            if self.forward.at is not None:
                self._keep(int(stage.name[8:]))

    def _remember(self, number: int, stage: Stage, kv: tuple[Tensor, Tensor] | None) -> None:
        if not self.past:
            return
        if kv is None:
            names = f"kv.keys.{stage.name[8:]}", f"kv.values.{stage.name[8:]}"
            held = self.out.read(stage.name, names)
            kv = tuple(torch.from_numpy(held[name])[None].to(self.bench.device) for name in names)
        keys, values = (part[:, :, :self.past] for part in kv)
        if number == 0:
            self.cache.layers[0].keys, self.cache.layers[0].values = keys, values
            return
        while len(self.cache.layers) < number:  # layers that an earlier run has finished
            self.cache.update(keys[:, :, :0], values[:, :, :0], len(self.cache.layers))
        self.cache.update(keys, values, number)

    def _keep(self, number: int) -> None:
        call = self.forward.at
        stream = call.arguments[0] if call.arguments else call.keywords["hidden_states"]
        level = torch.tensor([float(number)], dtype=torch.float32)
        self.bench.drain.put(self.out, CHUNK, {"level": level, "stream": stream[0]}, self.key)

    @property
    def rows(self) -> np.ndarray:
        """Logits [n, V] that choose the tokens."""
        return torch.cat(self._rows, dim=1).float().cpu().numpy()


def drive(forward: Parked, stage: Stage, real: Real) -> None:
    """Answer the calls of a stage's modules with what they compute. Raises HarnessError where the model does not call."""
    if forward.at is None or forward.at.module not in stage.modules:
        raise HarnessError("the model does not call its layers in order", where=stage.name,
                           fix="use transformers 4.57 or 5.x as tested")
    while forward.at is not None and forward.at.module in stage.modules:
        call = forward.at
        forward.go(real[call.module](*call.arguments, **call.keywords))


def _blank(call: Call) -> Tensor:
    """Zeros in the shape of what a module would return, where only what follows it matters."""
    first = call.arguments[0] if call.arguments else call.keywords["hidden_states"]
    width = getattr(call.module, "embed_dim", None) or getattr(call.module, "embedding_dim", None)
    if width is None:
        return torch.zeros_like(first)
    rows = first.shape[:-1] if first.is_floating_point() else first.shape
    return torch.zeros((*rows, width), dtype=torch.float32, device=first.device)
