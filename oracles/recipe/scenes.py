"""Synthetic scenes: sampling, drawing, the caption and the questions of one scene.

A scene is two or three flat shapes, each in its own cell of a 3x3 layout, on a
plain background. Everything follows from (seed, width, height). Drawing is done
with integer tests on pixel coordinates, so that the CPU and the GPU, and every
library version, give the same bytes; Pillow only writes the PNG.
"""

import random
from dataclasses import dataclass

import torch

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 155, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 50),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
RADII = {"small": (20, 26), "large": (40, 48)}
PLACES = (
    "at the top left", "at the top", "at the top right",
    "at the left", "in the centre", "at the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)
COLOUR_JITTER = 10
MAX_OBJECTS = 3
# Every size is a multiple of 32 and at least 320, so that a large shape fits a cell.
MAIN_SIZE = (448, 448)
OTHER_SIZES = ((448, 320), (320, 448), (384, 384), (512, 384), (384, 512))
# Seeds below this are held out: training only draws seeds from here upwards.
FIRST_TRAINING_SEED = 1_000_000


@dataclass(frozen=True)
class Thing:
    """One shape of a scene: names for the caption, integers for the drawing."""

    shape: str
    colour: str
    size: str
    cell: int
    x: int
    y: int
    radius: int
    rgb: tuple


@dataclass(frozen=True)
class Scene:
    """A whole scene; things are in reading order (rows first)."""

    width: int
    height: int
    background: str
    rgb: tuple
    things: tuple


def _jittered(rng, colour):
    return tuple(
        min(255, max(0, channel + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for channel in COLOURS[colour]
    )


def sample(seed, width=MAIN_SIZE[0], height=MAIN_SIZE[1]):
    """The scene of a seed. Shapes and colours are distinct within a scene, so that
    'the circle' names one thing."""
    rng = random.Random(seed)
    count = rng.choice((2, 3))
    background, *colours = rng.sample(list(COLOURS), count + 1)
    shapes = rng.sample(SHAPES, count)
    things = []
    for shape, colour, cell in zip(shapes, colours, sorted(rng.sample(range(9), count))):
        size = rng.choice(tuple(RADII))
        radius = rng.randint(*RADII[size])
        # Stay near the middle of the cell: places must be unambiguous to the eye.
        reach_x = min(width // 15, width // 6 - radius - 2)
        reach_y = min(height // 15, height // 6 - radius - 2)
        things.append(Thing(
            shape, colour, size, cell,
            x=width * (2 * (cell % 3) + 1) // 6 + rng.randint(-reach_x, reach_x),
            y=height * (2 * (cell // 3) + 1) // 6 + rng.randint(-reach_y, reach_y),
            radius=radius, rgb=_jittered(rng, colour),
        ))
    return Scene(width, height, background, _jittered(rng, background), tuple(things))


def caption(scene):
    """The one right caption: the things in reading order, then how the last lies to the first."""
    parts = [f"a {t.size} {t.colour} {t.shape} {PLACES[t.cell]}" for t in scene.things]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1]
    first, last = scene.things[0], scene.things[-1]
    return (
        f"A{listed[1:]} on a {scene.background} background. "
        f"The {last.shape} is {_relation(last, first)} the {first.shape}."
    )


def _relation(thing, other):
    column, other_column = thing.cell % 3, other.cell % 3
    if column == other_column:
        return "below"  # the caller's first thing comes earlier in reading order
    return "right of" if column > other_column else "left of"


def questions(scene, thing):
    """Every question about one thing of the scene, by what it asks for, with its answer."""
    return {
        "colour": (f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}."),
        "place": (f"Where is the {thing.shape}?", f"The {thing.shape} is {PLACES[thing.cell]}."),
        "size": (f"How large is the {thing.shape}?", f"The {thing.shape} is {thing.size}."),
        "background": ("What colour is the background?", f"The background is {scene.background}."),
    }


def question(scene, rng):
    """A random question about the scene and its answer."""
    return rng.choice(tuple(questions(scene, rng.choice(scene.things)).values()))


def parameters(scene):
    """The scene as integers for draw(): row 0 the background, then one row a thing
    (shape index or -1, x, y, radius, r, g, b)."""
    rows = [(-1, 0, 0, 0, *scene.rgb)]
    rows += [(SHAPES.index(t.shape), t.x, t.y, t.radius, *t.rgb) for t in scene.things]
    rows += [(-1, 0, 0, 0, 0, 0, 0)] * (1 + MAX_OBJECTS - len(rows))
    return rows


def draw(rows, width, height):
    """Draw N scenes of one size: rows is (N, 1 + MAX_OBJECTS, 7) of integers, on any
    device; returns (N, 3, height, width) uint8."""
    rows = rows.to(torch.int16)
    xs = torch.arange(width, dtype=torch.int16, device=rows.device).view(1, 1, width)
    ys = torch.arange(height, dtype=torch.int16, device=rows.device).view(1, height, 1)
    image = rows[:, 0, 4:, None, None].to(torch.uint8).expand(-1, 3, height, width)
    for index in range(1, 1 + MAX_OBJECTS):
        shape, x, y, radius = (rows[:, index, k, None, None] for k in range(4))
        # Clamped so that the squares below stay inside 16 bits.
        dx, dy = (xs - x).clamp(-120, 120), (ys - y).clamp(-120, 120)
        ax, ay = dx.abs(), dy.abs()
        square_distance = dx * dx + dy * dy
        hole, arm = radius // 2, radius // 3
        within = torch.maximum(ax, ay) <= radius
        round_ = square_distance <= radius * radius
        inside = (shape == 0) & round_
        inside |= (shape == 1) & (torch.maximum(ax, ay) <= radius * 7 // 8)
        inside |= (shape == 2) & within & (2 * ax <= dy + radius)
        inside |= (shape == 3) & within & (torch.minimum(ax, ay) <= arm)
        inside |= (shape == 4) & round_ & (square_distance > hole * hole)
        image = torch.where(inside[:, None], rows[:, index, 4:, None, None].to(torch.uint8), image)
    return image


def picture(scene):
    """The scene as a Pillow image."""
    from PIL import Image

    pixels = draw(torch.tensor([parameters(scene)]), scene.width, scene.height)[0]
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
