"""Rotary positions: planes exchanged, sections, theta, pairing of lanes, positions moved; norm and rotation in another order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from harness.causes import Guess, Scene
from harness.causes.linear import narrowed
from harness.graph.contract import rope_axis
from harness.probes import formulas

THETAS = (1e4, 1e5, 5e5, 1e6, 1e7)
VISION_THETA = 1e4


def guesses(scene: Scene) -> Iterator[Guess]:
    """For the seam behind a rotation of queries or keys, and for the planes themselves."""
    if scene.seam == "decoder.positions":
        yield from (Guess(words, planes.T) for words, planes in _planes(scene))
    match = re.fullmatch(r"(decoder|vision)\.layers\.(\d+)\.attn\.([qk])_rope", scene.seam)
    if match and match[1] == "decoder":
        yield from _decoder(scene, int(match[2]), match[3])
    elif match and scene.grid:
        yield from _vision(scene, int(match[2]), match[3])


def _decoder(scene: Scene, number: int, part: str) -> Iterator[Guess]:
    geometry = scene.geometry
    x = scene.held(scene.seam.replace("_rope", "_norm"))
    if x is None or scene.planes.shape[1] != len(x):
        return
    lanes = geometry.head_dim // 2
    axis = rope_axis(geometry.mrope_section, lanes)

    def turned(planes=scene.planes, axis=axis, frequency=formulas.inverse_frequencies(geometry.rope_theta, lanes)) -> np.ndarray:
        return formulas.rotate(x, (planes.astype(np.float64)[axis].T * frequency)[:, None])

    yield from (Guess(words, turned(planes=planes)) for words, planes in _planes(scene))
    yield from (Guess(words, turned(axis=other)) for words, other in _axes(geometry.mrope_section, lanes))
    for theta in THETAS:
        if theta != geometry.rope_theta:
            yield Guess(f"theta is {theta:g}, not {geometry.rope_theta:g}",
                        turned(frequency=formulas.inverse_frequencies(theta, lanes)))
    exact = formulas.inverse_frequencies(geometry.rope_theta, lanes)
    angles = (scene.planes.astype(np.float64)[axis].T * exact)[:, None]
    for kind, held in narrowed(exact):
        yield Guess(f"the rotary frequencies are held in {kind}", turned(frequency=held))
    for kind, held in narrowed(angles):
        yield Guess(f"the angles are held in {kind}", formulas.rotate(x, held))
    for kind, held in narrowed(scene.planes.astype(np.float64)):
        yield Guess(f"positions pass through {kind}", turned(planes=held))
    theta = _fitted_theta(scene, x, turned, lanes)
    yield Guess(f"theta is about {theta:.6g}, not {geometry.rope_theta:g}",
                turned(frequency=formulas.inverse_frequencies(theta, lanes)))
    yield Guess("frequencies are built for half a head and repeated",
                turned(frequency=np.tile(formulas.inverse_frequencies(geometry.rope_theta, lanes // 2), 2)))
    yield from _lanes(scene, x, exact, axis)
    yield Guess("the exponent of the frequencies runs over half the lanes",
                turned(frequency=geometry.rope_theta ** -(np.arange(lanes) / (lanes / 2))))
    yield from _pairings(x, angles)
    projected = scene.held(f"decoder.layers.{number:02d}.input_norm")
    if projected is not None:
        root = f"model.language_model.layers.{number}.self_attn"
        raw = (projected @ scene.weight(f"{root}.{part}_proj.weight").T).reshape(x.shape)
        yield Guess("the norm stands behind the rotation, not before it",
                    formulas.rms_norm(formulas.rotate(raw, angles), scene.weight(f"{root}.{part}_norm.weight"), geometry.rms_eps))


def _fitted_theta(scene: Scene, x: np.ndarray, turned: Callable[..., np.ndarray], lanes: int) -> float:
    """The theta that leaves least, near the right one or anywhere: a coarse search on a log scale, then finer ones."""
    def left(theta: float) -> float:
        return scene.left(turned(frequency=formulas.inverse_frequencies(theta, lanes)))

    known = np.log(scene.geometry.rope_theta)
    found = []
    for low, high in ((known - 0.02, known + 0.02), (np.log(1e3), np.log(1e8))):
        for count in (47, 21, 21, 21):
            thetas = np.exp(np.linspace(low, high, count))
            at = int(np.argmin([left(theta) for theta in thetas]))
            low, high = np.log(thetas[max(at - 1, 0)]), np.log(thetas[min(at + 1, count - 1)])
        found.append(float(thetas[at]))
    return min(found, key=left)


def _lanes(scene: Scene, x: np.ndarray, frequency: np.ndarray, axis: np.ndarray) -> Iterator[Guess]:
    """Each lane with the plane that fits it best: a few lanes on another axis, or standing still."""
    planes = scene.planes.astype(np.float64)
    choices = {name: formulas.rotate(x, (row[:, None] * frequency)[:, None])
               for name, row in zip(("t", "h", "w"), planes)} | {"nothing": x.astype(np.float64)}
    names, lanes = list(choices), len(frequency)
    pairs = {name: np.stack(np.split(made, 2, axis=-1)) for name, made in choices.items()}
    wrong = np.stack(np.split(scene.wrong.astype(np.float64), 2, axis=-1))
    apart = np.stack([np.square(pairs[name] - wrong).sum((0, 1, 2)) for name in names])
    right = np.array([apart[axis[lane], lane] for lane in range(lanes)])
    # A slow lane hardly turns: what float32 costs must not decide which plane turns it.
    sure = (right > 1e-12 * np.square(wrong).sum((0, 1, 2))) & (apart.min(0) < 0.1 * right)
    best = np.where(sure, apart.argmin(0), axis)
    moved = np.flatnonzero(best != axis)
    if 0 < len(moved) <= lanes // 2:
        made = np.take_along_axis(np.stack(list(pairs.values())), best[None, None, None, None], 0)[0]
        listed = ", ".join(f"{lane} by {names[best[lane]]} for {names[axis[lane]]}" for lane in moved[:4])
        yield Guess(f"lanes turn by another plane: {listed}{' ...' if len(moved) > 4 else ''}", np.concatenate(made, axis=-1))


def _planes(scene: Scene) -> Iterator[tuple[str, np.ndarray]]:
    planes, image = scene.planes.astype(np.int64), scene.image
    yield "h and w are exchanged", planes[[0, 2, 1]]
    yield "t and h are exchanged", planes[[1, 0, 2]]
    yield "all three axes use t", planes[[0, 0, 0]]
    index = np.arange(planes.shape[1])
    yield "positions are the token's index: no M-RoPE, no shift behind the image", np.stack([index] * 3)
    if scene.prompt is not None:
        yield from ((f"single steps stand at position {by:+d}", planes + by * (index >= scene.prompt)) for by in (1, -1))
    if not image.any() or len(image) != planes.shape[1]:
        yield from ((f"positions are {by:+d}", planes + by) for by in (1, -1))
        return
    first, last = np.flatnonzero(image)[[0, -1]]
    behind = index > last
    yield "text behind the image is not shifted", np.where(behind, index, planes)
    for by in (1, -1):
        yield f"text behind the image stands {by:+d}", planes + by * behind
        yield f"the shift begins one token {'late' if by > 0 else 'early'}", np.where(
            index == (last + 1 if by > 0 else last), index, planes)
        yield f"the image stands {by:+d}", planes + by * image
    for name, row in (("t", 0), ("h", 1), ("w", 2)):
        flat = planes.copy()
        flat[row, image] = planes[0, first]
        yield f"{name} does not move within the image", flat
    yield "image tokens count on as text does", np.where(image, index, planes)
    for words, row in (("t counts up within the image", index), ("t moves with h", planes[1]), ("t moves with w", planes[2])):
        counted = planes.copy()
        counted[0, image] = row[image]
        yield words, counted
    if scene.grid:
        slot, height = index[image] - first, scene.grid[0] // scene.geometry.merge
        divided = planes.copy()
        divided[1, image], divided[2, image] = planes[0, first] + slot // height, planes[0, first] + slot % height
        yield "slots are divided by the grid's height where its width belongs", divided
    high = planes[1:, image].max() - planes[0, first] + 1
    by_height = planes + np.where(behind, (planes[1, image].max() - planes[0, first] + 1) - high, 0)
    yield "text behind the image goes on from its height, not from the larger side", by_height


def _axes(section: tuple[int, int, int], lanes: int) -> Iterator[tuple[str, np.ndarray]]:
    lane = np.arange(lanes)
    contiguous = np.where(lane < section[0], 0, np.where(lane < section[0] + section[1], 1, 2))
    yield "sections are contiguous (Qwen2-VL), not interleaved", contiguous
    right = rope_axis(section, lanes)
    yield "lanes are assigned one late", np.roll(right, 1)
    yield "lanes are assigned one early", np.roll(right, -1)
    yield "every lane is interleaved, also behind the sections", lane % 3
    for name, at in (("h", 1), ("w", 2)):
        for by in (1, -1):
            moved = list(section)
            moved[at] += by
            moved[0] -= by
            yield f"the section of {name} is one lane too {'long' if by > 0 else 'short'}", rope_axis(tuple(moved), lanes)


def _pairings(x: np.ndarray, angles: np.ndarray) -> Iterator[Guess]:
    yield Guess("the rotation turns the other way", formulas.rotate(x, -angles))
    yield Guess("there is no rotation", x.astype(np.float64))
    parts = np.split(x.astype(np.float64), 2, axis=-1)
    cosine, sine = (table.astype(np.float16).astype(np.float64) for table in (np.cos(angles), np.sin(angles)))
    yield Guess("cos and sin are held in float16",
                np.concatenate([parts[0] * cosine - parts[1] * sine, parts[1] * cosine + parts[0] * sine], axis=-1))
    first, second, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angles), np.sin(angles)
    pairs = np.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    yield Guess("neighbouring lanes are paired, where halves should be", pairs.reshape(x.shape))
    half = x.shape[-1] // 2
    one, two = x[..., :half], x[..., half:]
    yield Guess("sine enters with the wrong sign in one half",
                np.concatenate([one * cos + two * sin, two * cos + one * sin], axis=-1))


def _vision(scene: Scene, number: int, part: str) -> Iterator[Guess]:
    geometry, (rows, columns) = scene.geometry, scene.grid
    x = scene.held(scene.seam.split(".attn.")[0] + ".norm1")
    if x is None:
        return
    root = f"model.visual.blocks.{number}.attn.qkv"
    fused = x @ scene.weight(f"{root}.weight").T + scene.weight(f"{root}.bias")
    at = "qkv".index(part)
    x = fused.reshape(len(x), 3, geometry.vision_heads, -1)[:, at]
    merge, quarter = geometry.merge, x.shape[-1] // 4
    raster = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)
    blocks = raster.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)

    def turned(places=blocks, theta=VISION_THETA, x=x) -> np.ndarray:
        frequency = formulas.inverse_frequencies(theta, quarter)
        return formulas.rotate(x, (places[:, :, None] * frequency).reshape(len(x), 1, -1))

    yield Guess("q, k and v are taken head by head from a matrix that holds them one after the other",
                turned(x=fused.reshape(len(x), geometry.vision_heads, 3, -1)[:, :, at]))
    yield Guess("the bias of the fused projection is missing",
                turned(x=x - scene.weight(f"{root}.bias").reshape(3, geometry.vision_heads, -1)[at]))

    yield Guess("rows and columns are exchanged in the rotation", turned(blocks[:, ::-1]))
    yield Guess("the rotation's coordinates are in raster order, not by merge blocks", turned(raster))
    yield from (Guess(f"the rotation's theta is {theta:g}, not {VISION_THETA:g}", turned(theta=theta)) for theta in THETAS[1:])
    angles = (blocks[:, :, None] * formulas.inverse_frequencies(VISION_THETA, quarter)).reshape(len(x), 1, -1)
    yield from _pairings(x, angles)
