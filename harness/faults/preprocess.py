"""Tokenizer, template and image: what a native host hands to a right bundle wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from harness.faults import fault
from harness.faults.hands import wrap
from harness.faults.suspect import Host


@fault("host", "inputs", "patches", source="T01")
def statistics_of_clip(host: Host) -> None:
    """images normalised with CLIP's mean and deviation"""
    host.preprocessing = replace(host.preprocessing, mean=(0.48145466, 0.4578275, 0.40821073),
                                 std=(0.26862954, 0.26130258, 0.27577711))


@fault("host", "inputs", "grid|patches|ids", source="T03")
def resize_to_multiples_of_28(host: Host) -> None:
    """images sized to multiples of 28, as Qwen2-VL wants them, then to 32"""
    def load(plain, reference, root):
        image = plain(reference, root)
        width, height = (round(side / 28) * 28 for side in image.size)
        return image.resize((width + 28, height), Image.Resampling.BICUBIC)

    wrap(host, "load", load)


@fault("host", "inputs", "patches|grid", source="T09")
def stretched_to_a_square(host: Host) -> None:
    """a wide image stretched to a square and back"""
    def load(plain, reference, root):
        image = plain(reference, root)
        side = min(image.size)
        return image.resize((side, side)).resize(image.size) if image.width != image.height else image

    wrap(host, "load", load)


@fault("host", "inputs", "ids|grid", source="T09")
def cropped_to_a_square(host: Host) -> None:
    """a wide image cropped to its middle"""
    def load(plain, reference, root):
        image = plain(reference, root)
        side, (width, height) = min(image.size), image.size
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))

    wrap(host, "load", load)


@fault("host", "inputs", "patches", source="T10")
def blue_green_red(host: Host) -> None:
    """colour channels reversed"""
    wrap(host, "load", lambda plain, *arguments: Image.fromarray(np.asarray(plain(*arguments))[..., ::-1].copy()))


@fault("host", "inputs", "patches", source="T10")
def never_rescaled(host: Host) -> None:
    """pixels in 0..255 where 0..1 belongs"""
    host.preprocessing = replace(host.preprocessing, mean=tuple(m / 255 for m in host.preprocessing.mean),
                                 std=tuple(s / 255 for s in host.preprocessing.std))


@fault("host", "inputs", "patches", source="T10")
def never_normalised(host: Host) -> None:
    """pixels in 0..1, mean and deviation forgotten"""
    host.preprocessing = replace(host.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3)


def _patches(host: Host, change) -> None:
    def patches(plain, *arguments):
        made, grid = plain(*arguments)
        return change(made, grid), grid

    wrap(host, "patches", patches)


@fault("host", "inputs", "patches", source="V03")
def patches_in_raster_order(host: Host) -> None:
    """patches row by row instead of block by block"""
    def change(made, grid):
        _, rows, columns = grid
        return made.reshape(rows // 2, columns // 2, 2, 2, -1).transpose(0, 2, 1, 3, 4).reshape(made.shape)

    _patches(host, change)


@fault("host", "inputs", "patches", source="V06")
def patch_features_channels_last(host: Host) -> None:
    """features of a patch as (time, y, x, colour)"""
    _patches(host, lambda made, grid: np.moveaxis(made.reshape(len(made), 3, 2, 16, 16), 1, 4).reshape(made.shape))


@fault("host", "inputs", "patches")
def second_frame_empty(host: Host) -> None:
    """the second temporal slot of a still image left empty"""
    def change(made, grid):
        made = made.reshape(len(made), 3, 2, -1).copy()
        made[:, :, 1] = 0
        return made.reshape(len(made), -1)

    _patches(host, change)


@fault("host", "inputs", "patches")
def image_upside_down(host: Host) -> None:
    """rows of pixels from the bottom"""
    wrap(host, "load", lambda plain, *arguments: plain(*arguments).transpose(Image.Transpose.FLIP_TOP_BOTTOM))


@fault("host", "inputs", "patches")
def another_resampling(host: Host) -> None:
    """images resized by nearest neighbour"""
    def load(plain, reference, root):
        image = plain(reference, root)
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.NEAREST).resize(
            image.size, Image.Resampling.NEAREST)

    wrap(host, "load", load)


@fault("host", "inputs", "ids", source="T04")
def beginning_token_added(host: Host) -> None:
    """a beginning-of-text token before the prompt"""
    wrap(host, "encode", lambda plain, text: np.concatenate([[host.subject.geometry.vocab - 20], plain(text)]))


@fault("host", "inputs", "ids", source="T04")
def first_token_lost(host: Host) -> None:
    """the first token stripped"""
    wrap(host, "encode", lambda plain, text: plain(text)[1:])


@fault("host", "inputs", "ids", source="T06")
def template_missing(host: Host) -> None:
    """the raw prompt without its chat markup"""
    host.text = lambda case: "".join(("<|vision_start|><|image_pad|><|vision_end|>" if turn.image else "") + turn.text
                                     for turn in case.turns)


@fault("host", "inputs", "ids", source="T06")
def assistant_turn_not_opened(host: Host) -> None:
    """the prompt ends without the assistant's opening"""
    wrap(host, "text", lambda plain, case: plain(case).removesuffix("<|im_start|>assistant\n"))


@fault("host", "inputs", "ids", source="T07")
def image_before_the_turn(host: Host) -> None:
    """image tokens moved to the front of the prompt"""
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    wrap(host, "text", lambda plain, case: mark + plain(case).replace(mark, "") if case.images else plain(case))


@fault("host", "inputs", "ids", source="T07")
def vision_start_missing(host: Host) -> None:
    """no vision_start before the image tokens"""
    wrap(host, "text", lambda plain, case: plain(case).replace("<|vision_start|>", ""))


@fault("host", "inputs", "ids", source="T06")
def text_stripped(host: Host) -> None:
    """line breaks at the ends of the prompt stripped"""
    wrap(host, "text", lambda plain, case: plain(case).strip())


@fault("host", "inputs", "ids")
def text_in_ascii(host: Host) -> None:
    """letters beyond ASCII dropped"""
    wrap(host, "text", lambda plain, case: plain(case).encode("ascii", "ignore").decode())


@fault("host", "none", "none", equivalent=True, source="B18")
def one_level_of_a_pixel(host: Host) -> None:
    """pixels one level off, as another decoder gives them"""
    generator = np.random.default_rng(0)

    def load(plain, *arguments):
        pixels = np.asarray(plain(*arguments)).astype(np.int16)
        return Image.fromarray((pixels + generator.integers(-1, 2, pixels.shape)).clip(0, 255).astype(np.uint8))

    wrap(host, "load", load)
