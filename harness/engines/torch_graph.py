"""The engine that runs a torch Conversion: in one pass, in chunks or step by step; with values injected at seams."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.engines import Request, streams
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.graph.contract import HostInputs, host_inputs
from harness.graph.protocol import Conversion, Tap, untapped
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

    def verified(self, request: Request, sink: Sink | None = None) -> Trace:
        """The Trace over prompt and forced tokens, which are taken for a draft: `facts["tokens"]` holds as many greedy ones.

        With a sink nothing but that fact is kept.
        """
        trace, session = self._forced(request, {}, frozenset(), sink)
        count = len(request.forced)
        rows = trace["logits"][len(trace["logits"]) - count - 1:-1].copy()
        if sink is not None:
            trace = Trace({}, trace.facts)
        trace.facts["tokens"] = session.follow(request.forced, rows)
        return trace

    def _one(self, request: Request, inject: Mapping[str, np.ndarray], inject_at: frozenset[str],
             sink: Sink | None) -> Trace:
        trace, session = self._forced(request, inject, inject_at, sink)
        started, rows, tokens = time.perf_counter(), [trace["logits"]], trace.facts["tokens"]
        for _ in range(request.free):
            tokens.append(int(rows[-1][-1].argmax()))
            rows.append(session.feed([(np.array([tokens[-1]]), 1)]))
        if tokens:
            trace.arrays["logits"] = np.concatenate(rows)
            trace.arrays |= session.kv() if request.kv else {}
        trace.facts["decode_s"] += time.perf_counter() - started
        return trace

    def _forced(self, request: Request, inject: Mapping[str, np.ndarray], inject_at: frozenset[str],
                sink: Sink | None) -> tuple[Trace, Session]:
        """Over prompt and forced tokens, and the conversation as it stands then."""
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
        logits = session.feed([(host.ids[:prompt], self.chunk), (host.ids[prompt:], 1)], tap)
        trace = Trace(tap.arrays(), {"engine": self.name, "tokens": [], "vision_s": encoded - started,
                                     "prefill_s": time.perf_counter() - encoded, "decode_s": 0.0})
        trace.arrays["logits"] = logits
        if request.kv:
            trace.arrays |= session.kv()
        return trace, session

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

    def feed(self, parts: Sequence[tuple[np.ndarray, int | None]], tap: _Recorder | None = None) -> np.ndarray:
        """Feed ids [S] (extension ids), each part in calls of so many tokens (None: one call); logits [S, V] float32."""
        calls = []
        for ids, chunk in parts:
            for part in np.split(ids, range(chunk or len(ids), len(ids), chunk or len(ids))) if len(ids) else ():
                given = untapped if tap is None else tap.behind(self.length)
                self.length += len(part)
                calls.append(partial(self._call, part, self.length, given))
        rows = in_turn(self.conversion, calls)
        # A copy: a graph may hand out the same memory again. One that streams does not, and is large.
        return rows[0] if len(rows) == 1 and streams(self.conversion) else np.concatenate(rows)

    @torch.no_grad()
    def _call(self, ids: np.ndarray, total: int, tap: Tap) -> np.ndarray:
        ramp = torch.arange(total, dtype=torch.int32)[None]
        logits = self.conversion.decode(torch.from_numpy(ids.astype(np.int32))[None], ramp, self.image, self.deepstack,
                                        *self.shift, self.cache, tap)
        return logits[0].float().numpy()

    def follow(self, draft: Sequence[int], rows: np.ndarray) -> list[int]:
        """Greedy tokens from a draft that was fed last, and the rows [n, V] that choose its tokens.

        Tokens are greedy where each is its row's argmax, by induction. From the first that is not on, what the rows choose
        is the next draft, fed in one call behind what stands; each call settles one token more at least.
        """
        tokens, begin, settled = np.array(draft, dtype=np.int64), self.length - len(draft), 0
        while True:
            chosen = rows.argmax(-1)
            wrong = np.flatnonzero(chosen != tokens[settled:])
            if not len(wrong):
                return tokens.tolist()
            first = settled + int(wrong[0])
            tokens[first:], settled = chosen[wrong[0]:], first + 1
            if settled == len(tokens):
                return tokens.tolist()
            self.length = begin + first
            rows = self.feed([(tokens[first:-1], None)])

    def kv(self) -> dict[str, np.ndarray]:
        """`kv.keys` and `kv.values` [L, kv_heads, T, head_dim] float32."""
        return {f"kv.{part}": state[:, 0, :, :self.length].float().numpy().copy()
                for part, state in zip(("keys", "values"), self.cache)}


class _Recorder:
    """A tap that keeps what was asked for and hands back the injected value where there is one."""

    def __init__(self, wanted: frozenset[str], inject: Mapping[str, np.ndarray], at: frozenset[str],
                 sink: Sink | None = None) -> None:
        self.wanted, self.inject, self.at, self.sink = wanted, inject, at & inject.keys(), sink
        self._parts: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self._take(0, name, value)

    def behind(self, start: int) -> Tap:
        """The tap of a decoder call that begins at token `start`."""
        return partial(self._take, start)

    def _take(self, start: int, name: str, value: Tensor) -> Tensor:
        if name in self.wanted:
            kept = value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)
            if self.sink is None:
                self._parts.setdefault(name, []).append(kept.numpy().copy())
            else:
                self.sink(name, kept.numpy().copy())
        if name not in self.at:
            return value
        given = torch.from_numpy(self.inject[name][start:start + value.shape[0]])
        return given.to(value.dtype).reshape(value.shape)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was kept, calls concatenated along the tokens."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def in_turn(conversion: Any, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of calls of a conversion, made in this order; one that streams brings them through together."""
    if len(calls) > 1 and streams(conversion):
        return conversion.in_turn(calls)
    return [call() for call in calls]


def merged_grid(request: Request, geometry: Geometry) -> tuple[int, int] | None:
    """(rows, columns) of merged image tokens, or None for a text-only request."""
    if request.inputs.grid is None:
        return None
    _, height, width = request.inputs.grid
    return height // geometry.merge, width // geometry.merge
