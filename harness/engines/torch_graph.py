"""The engine that runs a torch Conversion: in one pass, in chunks or step by step; with values injected at seams."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from harness.engines import Request
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.graph.contract import HostInputs, host_inputs
from harness.graph.protocol import Conversion, Tap
from harness.trace import Trace


Sink = Callable[[str, np.ndarray], None]
"""`sink(seam, values)`."""


class TorchGraph:
    """Runs a Conversion, by default the whole sequence in one call.

    chunk: tokens a decoder call takes at most (None = all). stepwise: the forced tokens go in one by one after the
    prompt, as a decode loop would. context: slots of the cache (None = as many as the request needs).
    """

    def __init__(self, conversion: Conversion, geometry: Geometry, *, chunk: int | None = None, stepwise: bool = False,
                 context: int | None = None, name: str = "torch-fp32", dtype: torch.dtype = torch.float32) -> None:
        self.conversion, self.geometry, self.context = conversion, geometry, context
        self.chunk, self.stepwise, self.name, self.dtype = chunk, stepwise, name, dtype

    def seams(self) -> frozenset[str]:
        """What the conversion offers."""
        return frozenset(self.conversion.seams())

    def run(self, requests: Sequence[Request], inject: Mapping[str, np.ndarray] | None = None,
            inject_at: Collection[str] = (), sink: Sink | None = None) -> Iterator[Trace]:
        """One Trace a request. For a local error, the conversion goes on with `inject`'s values at the seams `inject_at`.

        sink: takes the values at the request's seams as they come, instead of the Trace. Raises HarnessError where the
        conversion cannot be injected into.
        """
        if inject is not None and not self.conversion.injectable:
            raise HarnessError("this conversion ignores what a tap returns, so no local error can be measured",
                               where=type(self.conversion).__name__, fix="set injectable and go on with tap's value")
        for request in requests:
            yield self._one(request, inject or {}, frozenset(inject_at), sink)

    def _one(self, request: Request, inject: Mapping[str, np.ndarray], inject_at: frozenset[str],
             sink: Sink | None) -> Trace:
        # Logits are what comes out: injected, they would only be compared with themselves.
        tap = _Recorder(request.seams, inject, inject_at - {"logits"}, sink)
        merged = merged_grid(request, self.geometry)
        started = time.perf_counter()
        image, deepstack = self._embeds(request, merged, tap)
        encoded = time.perf_counter()
        ids = np.concatenate([request.inputs.ids, np.asarray(request.forced, dtype=np.int64)])
        host = host_inputs(ids, self.geometry.image_token, self.geometry.vocab, merged)
        session = Session(self.conversion, self.geometry, host, image, deepstack, self.dtype,
                          self.context or len(ids) + request.free)
        prompt = request.inputs.length if self.stepwise else len(host.ids)
        rows, tokens = [session.feed(host.ids[:prompt], tap, self.chunk)], []
        if prompt < len(host.ids):
            rows.append(session.feed(host.ids[prompt:], tap, 1))
        prefilled = time.perf_counter()
        for _ in range(request.free):
            tokens.append(int(rows[-1][-1].argmax()))
            rows.append(session.feed(np.array([tokens[-1]]), _Recorder(frozenset(), {}, frozenset()), 1))
        trace = Trace(tap.arrays(), {"engine": self.name, "tokens": tokens, "vision_s": encoded - started,
                                     "prefill_s": prefilled - encoded, "decode_s": time.perf_counter() - prefilled})
        trace.arrays["logits"] = np.concatenate(rows)
        if request.kv:
            trace.arrays |= session.kv()
        return trace

    def _embeds(self, request: Request, merged: tuple[int, int] | None, tap: Tap) -> tuple[Tensor, Tensor]:
        taps = len(self.geometry.deepstack_taps)
        if request.inputs.patches is None:
            slots = self.conversion.slots
            return (torch.zeros(slots, self.geometry.hidden, dtype=self.dtype),
                    torch.zeros(taps * slots, self.geometry.hidden, dtype=self.dtype))
        with torch.no_grad():
            return self.conversion.encode(torch.from_numpy(request.inputs.patches).to(self.dtype), tap)


class Session:
    """One conversation: the decoder's cache and the count of tokens in it."""

    def __init__(self, conversion: Conversion, geometry: Geometry, host: HostInputs, image: Tensor, deepstack: Tensor,
                 dtype: torch.dtype, context: int) -> None:
        self.conversion, self.image, self.deepstack, self.length = conversion, image, deepstack, 0
        self.shift = [torch.tensor([value], dtype=torch.int32) for value in (host.shift_start, host.shift_amount)]
        shape = (geometry.layers, 1, geometry.kv_heads, context, geometry.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    @torch.no_grad()
    def feed(self, ids: np.ndarray, tap: _Recorder, chunk: int | None) -> np.ndarray:
        """Feed ids [S] (extension ids) in calls of `chunk`; logits [S, V] float32."""
        rows = []
        for part in np.split(ids, range(chunk or len(ids), len(ids), chunk or len(ids))):
            tap.start = self.length
            self.length += len(part)
            ramp = torch.arange(self.length, dtype=torch.int32)[None]
            logits = self.conversion.decode(torch.from_numpy(part.astype(np.int32))[None], ramp, self.image,
                                            self.deepstack, *self.shift, self.cache, tap)
            rows.append(logits[0].float().numpy())
        return np.concatenate(rows)

    def kv(self) -> dict[str, np.ndarray]:
        """`kv.keys` and `kv.values` [L, kv_heads, T, head_dim] float32."""
        return {f"kv.{part}": state[:, 0, :, :self.length].float().numpy().copy()
                for part, state in zip(("keys", "values"), self.cache)}


class _Recorder:
    """A tap that keeps what was asked for and hands back the injected value where there is one."""

    def __init__(self, wanted: frozenset[str], inject: Mapping[str, np.ndarray], at: frozenset[str],
                 sink: Sink | None = None) -> None:
        self.wanted, self.inject, self.at, self.sink, self.start = wanted, inject, at & inject.keys(), sink, 0
        self._parts: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self.wanted:
            kept = value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)
            if self.sink is None:
                self._parts.setdefault(name, []).append(kept.numpy().copy())
            else:
                self.sink(name, kept.numpy().copy())
        if name not in self.at:
            return value
        start = 0 if name.startswith("vision.") else self.start
        given = torch.from_numpy(self.inject[name][start:start + value.shape[0]])
        return given.to(value.dtype).reshape(value.shape)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was kept, calls concatenated along the tokens."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def merged_grid(request: Request, geometry: Geometry) -> tuple[int, int] | None:
    """(rows, columns) of merged image tokens, or None for a text-only request."""
    if request.inputs.grid is None:
        return None
    _, height, width = request.inputs.grid
    return height // geometry.merge, width // geometry.merge
