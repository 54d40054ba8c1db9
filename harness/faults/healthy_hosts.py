"""Healthy variations of an engine's loop and of a host: what lies where nobody reads, and detours that lose nothing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from harness.faults.hands import wrap
from harness.faults.loop import Loop
from harness.faults.suspect import Host


def cache_full_of_garbage(loop: Loop) -> None:
    """slots behind the last token hold whatever was there"""
    def reset(plain: Any, length: int) -> None:
        plain(length)
        for state in loop.cache:
            state.fill_(1e4)

    wrap(loop, "reset", reset)


def buffers_of_the_last_image(loop: Loop) -> None:
    """the image's buffers stay bound while a text is answered, which never reads them"""
    def bind(plain: Any, graph: Any, inputs: Any) -> None:
        old = loop.image, loop.deepstack
        plain(graph, inputs)
        if inputs.patches is None and old[0] is not None and old[0].shape == loop.image.shape:
            loop.image, loop.deepstack = old

    wrap(loop, "bind", bind)


def vision_run_twice(loop: Loop) -> None:
    """the vision tower runs once to warm up"""
    def bind(plain: Any, graph: Any, inputs: Any) -> None:
        plain(graph, inputs)
        kept = {name: list(parts) for name, parts in loop._parts.items()}
        plain(graph, inputs)
        loop._parts.clear()
        loop._parts.update(kept)

    wrap(loop, "bind", bind)


def larger_context(loop: Loop) -> None:
    """a cache of 2048 slots"""
    loop.context = 2048


def logits_padded(loop: Loop) -> None:
    """logits in rows of a multiple of 64 and cut again"""
    wrap(loop, "read", lambda plain, logits: np.pad(plain(logits), ((0, 0), (0, 64)))[:, :logits.shape[1]])


def activations_unrounded(loop: Loop) -> None:
    """an engine that keeps activations in float32"""
    loop.rounded = lambda value: value


def image_with_an_opaque_channel(host: Host) -> None:
    """the image passes through RGBA, opaque"""
    wrap(host, "load", lambda plain, *arguments: plain(*arguments).convert("RGBA").convert("RGB"))


def image_through_a_lossless_file(host: Host) -> None:
    """the image written as PNG and read again"""
    def load(plain: Any, *arguments: Any) -> Image.Image:
        buffer = io.BytesIO()
        plain(*arguments).save(buffer, "PNG")
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")

    wrap(host, "load", load)


def patches_in_float64(host: Host) -> None:
    """patches normalised in float64, rounded at last"""
    def patches(plain: Any, image: Image.Image, numbers: Any) -> Any:
        made, grid = plain(image, numbers)
        return ((made.astype(np.float64) * 0.5 + 0.5) * 2 - 1).astype(np.float32), grid

    wrap(host, "patches", patches)


LOOP = (cache_full_of_garbage, buffers_of_the_last_image, vision_run_twice, larger_context, logits_padded,
        activations_unrounded)
HOST = (image_with_an_opaque_channel, image_through_a_lossless_file, patches_in_float64)
