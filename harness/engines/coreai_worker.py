"""The child process that holds Apple's runtime: encodes images, runs the decoder step by step, reads inner values.

Started by `harness.engines.coreai`. Names, dtypes and shapes are read from the assets, so that bundles made elsewhere
run.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.engines.coreai_model import Capture, Function, load
from harness.engines.worker import Desk, serve
from harness.errors import HarnessError

DECODER_INPUTS = ("input_ids", "position_ids", "image_embeds", "deepstack_embeds", "rope_shift_start",
                  "rope_shift_amount")
STATES = ("keyCache", "valueCache")
EMBEDS = ("image_embeds", "deepstack_embeds")


def work(desk: Desk) -> None:
    """Load the assets, report the load, then answer the requests of the job in order."""
    asyncio.run(_work(desk))


async def _work(desk: Desk) -> None:
    job, arrays = desk.job, desk.arrays()
    decoder, facts = await load(Path(job["decoder"]), job["compute_unit"])
    _expect(decoder, DECODER_INPUTS, STATES, ("logits",))
    vision = None
    if job["vision"]:
        vision, vision_facts = await load(Path(job["vision"]), job["compute_unit"])
        _expect(vision, ("patches",), (), EMBEDS)
        facts |= {f"vision_{name}": vision_facts[name] for name in ("cold_load_s", "warm_load_s", "asset_bytes")}
    desk.put("ready", {}, facts | _shapes(decoder, job))
    images, state = Images(vision, job, arrays), None
    for number, request in enumerate(job["requests"]):
        embeds, seams, seconds = await images.get(request["image"])
        if state is None or not job["reuse_state"]:
            state = decoder.new_states(job["context"])
        run = Run(decoder, state, request, embeds, job["seams"]["decoder"], job["chunk"])
        rows, facts = await run.go(arrays[f"ids.{number}"])
        desk.put(f"result-{number}", rows | _picked(seams, request["seams"]),
                 facts | {"vision_s": seconds, "peak_rss_bytes": peak_rss()})


class Images:
    """Encodes every distinct image once; embeds handed in by the parent go before the vision asset."""

    def __init__(self, vision: Function | None, job: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self.vision, self.arrays, self.job = vision, arrays, job
        self.done: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]] = {}

    async def get(self, name: str | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
        """Embeds by input name, values by seam, and seconds it took (0 where it was done before)."""
        if name is None:
            return {}, {}, 0.0
        if name in self.done:
            embeds, seams, _ = self.done[name]
            return embeds, seams, 0.0
        if f"{name}.image_embeds" in self.arrays:
            embeds = {part: self.arrays[f"{name}.{part}"] for part in EMBEDS}
            self.done[name] = embeds, {}, 0.0
        else:
            self.done[name] = await self._encode(self.arrays[f"{name}.patches"])
        return self.done[name]

    async def _encode(self, patches: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
        if self.vision is None:
            raise HarnessError("the request has an image, but there is no vision asset",
                               fix="give the vision bundle or the embeds")
        capture = Capture(self.job["seams"]["vision"])
        started = time.perf_counter()
        out = await self.vision(inputs={"patches": patches}, capture=capture)
        seconds = time.perf_counter() - started
        embeds = {name: out[name] for name in EMBEDS}
        seams = capture.rows(1) | {"vision.merger": out["image_embeds"].astype(np.float32)}
        rows = out["deepstack_embeds"].astype(np.float32)
        taps = np.split(rows, range(len(out["image_embeds"]), len(rows), len(out["image_embeds"])))
        return embeds, seams | {f"vision.deepstack.{tap}": part for tap, part in enumerate(taps)}, seconds


class Run:
    """One request: the prompt in one call where the asset takes any length, else step by step; then single tokens."""

    def __init__(self, decoder: Function, state: dict[str, Any], request: Mapping[str, Any],
                 embeds: Mapping[str, np.ndarray], seams: Mapping[str, Any], chunk: int | None) -> None:
        self.decoder, self.state, self.request, self.chunk = decoder, state, request, chunk
        self.capture = Capture({name: seams[name] for name in request["seams"] if name in seams})
        self.length, self.calls = 0, 0
        shift = {name: np.array([request[name]], dtype=np.int32) for name in ("rope_shift_start", "rope_shift_amount")}
        self.fixed = decoder.prepare({name: value for name, value in {**self._zeros(), **embeds, **shift}.items()
                                      if name in decoder.inputs})
        if embeds and "image_embeds" not in decoder.inputs:
            raise HarnessError("the request has an image, but the decoder has no input image_embeds",
                               fix="run its text cases only")

    async def go(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by seam, float32, and the facts of the run."""
        prompt, free, tokens = self.request["prompt"], self.request["free"], []
        started = time.perf_counter()
        logits = await self._feed(ids[:prompt], self.chunk, self.capture)
        prefilled = time.perf_counter()
        rows = logits + await self._feed(ids[prompt:], 1, self.capture)
        for _ in range(free):
            tokens.append(int(rows[-1][-1].argmax()))
            rows += await self._feed(np.array([tokens[-1]]), 1, None)
        ended = time.perf_counter()
        arrays = self.capture.rows(len(ids)) | {"logits": np.concatenate(rows)}
        if self.request["kv"]:
            arrays |= self._cache()
        decoded = len(ids) - prompt + free
        return arrays, {"tokens": tokens, "prefill_s": prefilled - started, "decode_s": ended - prefilled,
                        "prefill_tokens": prompt, "decode_tokens": decoded, "calls": self.calls,
                        "prefill_tok_s": prompt / (prefilled - started),
                        "decode_tok_s": decoded / (ended - prefilled) if decoded else None,
                        "inner_seams": len(self.capture.seams), "unread": self.capture.unread}

    async def _feed(self, ids: np.ndarray, chunk: int | None, capture: Capture | None) -> list[np.ndarray]:
        rows = []
        step = self.decoder.inputs["input_ids"].shape[1]
        step = (chunk or len(ids)) if step < 0 else step
        for start in range(0, len(ids), step):
            part = ids[start:start + step].astype(np.int32)
            self.length += len(part)
            ramp = np.arange(self.length, dtype=np.int32)[None]
            out = await self.decoder(inputs={"input_ids": part[None], "position_ids": ramp}, prepared=self.fixed,
                                     state=self.state, capture=capture)
            rows.append(out["logits"][0].astype(np.float32))
            self.calls += 1
        return rows

    def _cache(self) -> dict[str, np.ndarray]:
        """`kv.keys` and `kv.values` [L, kv_heads, T, head_dim] float32."""
        return {f"kv.{part}": self.state[name].numpy()[:, 0, :, :self.length].astype(np.float32)
                for part, name in zip(("keys", "values"), STATES)}

    def _zeros(self) -> dict[str, np.ndarray]:
        return {name: np.zeros(self.decoder.inputs[name].shape, dtype=np.float32)
                for name in EMBEDS if name in self.decoder.inputs}


def _expect(function: Function, inputs: tuple[str, ...], states: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Refuse an asset of another contract, naming what was found."""
    optional = {"image_embeds", "deepstack_embeds", "rope_shift_start", "rope_shift_amount"}
    for what, found, known in (("inputs", function.inputs, inputs), ("states", function.states, states),
                               ("outputs", function.outputs, outputs)):
        needed = set(known) - (optional if what == "inputs" else set())
        if not needed <= set(found) or not set(found) <= set(known):
            listed = ", ".join(f"{name} {entry}" for name, entry in found.items()) or "none"
            raise HarnessError(f"its {what} are {listed}; the contract asks for {', '.join(known) or 'none'}",
                               where=function.asset, fix="this engine runs bundles of the Qwen3-VL port's contract")


def _shapes(decoder: Function, job: Mapping[str, Any]) -> dict[str, Any]:
    """Vocabulary, context and so on as the asset declares them. Raises HarnessError for another contract's layout."""
    cache, ids = decoder.states["keyCache"].shape, decoder.inputs["input_ids"].shape
    if len(cache) != 5 or cache[1] != 1 or cache != decoder.states["valueCache"].shape:
        raise HarnessError(f"keyCache has shape {list(cache)}; the contract asks for "
                           "[layers, 1, kv_heads, context, head_dim]", where=decoder.asset)
    if len(ids) != 2 or ids[1] not in (1, -1):
        raise HarnessError(f"input_ids has shape {list(ids)}; the contract asks for [1, 1] or [1, any]",
                           where=decoder.asset)
    context = cache[3] if cache[3] > 0 else job["context"]
    longest = max((request["total"] for request in job["requests"]), default=0)
    if longest > context:
        raise HarnessError(f"a request needs {longest} tokens, its cache has {context} slots", where=decoder.asset,
                           fix="shorten the case or export with a longer context")
    return {"vocab": decoder.outputs["logits"].shape[-1], "context": context, "layers": cache[0],
            "dtype": decoder.states["keyCache"].dtype, "dynamic": ids[1] < 0,
            "slots": decoder.inputs["image_embeds"].shape[0] if "image_embeds" in decoder.inputs else 0}


def _picked(seams: Mapping[str, np.ndarray], wanted: list[str]) -> dict[str, np.ndarray]:
    return {name: rows for name, rows in seams.items() if name in wanted}


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    serve(work)
