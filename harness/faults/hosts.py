"""Tokenizer, template and image once more: one colour, one level, odd sizes, and limits that no short prompt meets."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import replace

import numpy as np
from PIL import Image

from harness.faults import fault
from harness.faults.hands import wrap
from harness.faults.suspect import Host

MARK = "<|vision_start|><|image_pad|><|vision_end|>"


def _pixels(host: Host, change) -> None:
    wrap(host, "load", lambda plain, *arguments: Image.fromarray(
        np.ascontiguousarray(change(np.asarray(plain(*arguments)).copy()))))


def _patches(host: Host, change) -> None:
    def patches(plain, *arguments):
        made, grid = plain(*arguments)
        return change(made.copy(), grid), grid

    wrap(host, "patches", patches)


@fault("host", "inputs", "patches", source="T01")
def mean_of_one_colour(host: Host) -> None:
    """the mean of blue is 0.49 for 0.5"""
    host.preprocessing = replace(host.preprocessing, mean=(*host.preprocessing.mean[:2], 0.49))


@fault("host", "inputs", "patches", source="T01")
def deviation_of_another_family(host: Host) -> None:
    """deviations of ImageNet beside the right means"""
    host.preprocessing = replace(host.preprocessing, std=(0.229, 0.224, 0.225))


@fault("host", "inputs", "patches|*.patches", source="T10")
def rescaled_by_256(host: Host) -> None:
    """pixels divided by 256 instead of 255"""
    _patches(host, lambda made, grid: (made * 0.5 + 0.5) * np.float32(255 / 256) * 2 - 1)


@fault("host", "inputs", "patches", source="T10")
def red_and_green_exchanged(host: Host) -> None:
    """red and green exchanged"""
    _pixels(host, lambda pixels: pixels[..., [1, 0, 2]])


@fault("host", "inputs", "patches", source="T10")
def colours_of_the_second_frame_reversed(host: Host) -> None:
    """blue first in the second temporal slot only"""
    def change(made, grid):
        held = made.reshape(len(made), 3, 2, -1)
        held[:, :, 1] = held[:, ::-1, 1].copy()
        return held.reshape(len(made), -1)

    _patches(host, change)


@fault("host", "inputs", "patches", source="T10")
def image_in_grey(host: Host) -> None:
    """the image decoded to grey"""
    wrap(host, "load", lambda plain, *arguments: plain(*arguments).convert("L").convert("RGB"))


@fault("host", "inputs", "patches", source="T10")
def linear_light(host: Host) -> None:
    """pixels in linear light: a colour profile applied"""
    _pixels(host, lambda pixels: ((pixels / 255.0) ** 2.2 * 255).round().astype(np.uint8))


@fault("host", "inputs", "patches", source="T10")
def compressed_again(host: Host) -> None:
    """the image passes through a JPEG of quality 70"""
    def load(plain, *arguments):
        buffer = io.BytesIO()
        plain(*arguments).save(buffer, "JPEG", quality=70)
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")

    wrap(host, "load", load)


@fault("host", "inputs", "patches", source="T09")
def image_mirrored(host: Host) -> None:
    """columns of pixels from the right"""
    wrap(host, "load", lambda plain, *arguments: plain(*arguments).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


@fault("host", "inputs", "patches|grid", source="T09")
def image_turned(host: Host) -> None:
    """width taken for height: the image transposed"""
    wrap(host, "load", lambda plain, *arguments: plain(*arguments).transpose(Image.Transpose.TRANSPOSE))


@fault("host", "inputs", "*.grid|*.patches", source="T03")
def odd_sizes_rounded_up(host: Host) -> None:
    """sizes that are no multiple of 32 rounded up instead of to the nearest"""
    def patches(plain, image, preprocessing):
        size = tuple(-(-side // 32) * 32 for side in image.size)
        return plain(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC), preprocessing)

    wrap(host, "patches", patches)


@fault("host", "inputs", "*.grid|*.patches", source="T03")
def large_images_kept_large(host: Host) -> None:
    """the bound on an image's area is not applied"""
    wrap(host, "patches", lambda plain, image, preprocessing: plain(image, replace(preprocessing, most=1 << 40)))


@fault("host", "inputs", "*.grid|*.patches", source="T03")
def small_images_kept_small(host: Host) -> None:
    """the least area of an image is not applied"""
    wrap(host, "patches", lambda plain, image, preprocessing: plain(image, replace(preprocessing, least=1)))


@fault("host", "inputs", "*.patches", source="T09")
def odd_sizes_resampled_bilinear(host: Host) -> None:
    """images that need resizing are resized bilinearly"""
    def patches(plain, image, preprocessing):
        from harness.host import target_size

        height, width = target_size(image.height, image.width, preprocessing)
        return plain(image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR),
                     preprocessing)

    wrap(host, "patches", patches)


@fault("host", "inputs", "patches", source="V06")
def frames_before_colours(host: Host) -> None:
    """features of a patch as (time, colour, y, x)"""
    _patches(host, lambda made, grid: made.reshape(len(made), 3, 2, -1).transpose(0, 2, 1, 3).reshape(made.shape))


@fault("host", "inputs", "patches", source="V03")
def blocks_down_the_columns(host: Host) -> None:
    """the four patches of a block ordered column by column"""
    _patches(host, lambda made, grid: made.reshape(-1, 2, 2, made.shape[1]).transpose(0, 2, 1, 3).reshape(made.shape))


@fault("host", "inputs", "patches", source="V10")
def last_patch_repeats(host: Host) -> None:
    """the last patch is the one before it"""
    _patches(host, lambda made, grid: np.concatenate([made[:-1], made[-2:-1]]))


@fault("host", "inputs", "patches")
def patches_rounded_to_half(host: Host) -> None:
    """patches normalised in bfloat16"""
    _patches(host, lambda made, grid: (made.view(np.uint32) & 0xFFFF0000).view(np.float32))


@fault("host", "none", "none", equivalent=True, source="T04")
def text_decomposed(host: Host) -> None:
    """text in Unicode's decomposed form, which the tokenizer composes again"""
    wrap(host, "text", lambda plain, case: unicodedata.normalize("NFD", plain(case)))


@fault("host", "inputs", "ids|vocabulary", source="T04")
def double_breaks_joined(host: Host) -> None:
    """line breaks become blanks"""
    wrap(host, "text", lambda plain, case: plain(case).replace("\n", " "))


@fault("host", "inputs", "ids", source="T06")
def thinking_opened(host: Host) -> None:
    """the assistant's turn opens with an empty thought"""
    opening = "<|im_start|>assistant\n"
    wrap(host, "text", lambda plain, case: plain(case).replace(opening, f"{opening}<think>\n"))


@fault("host", "inputs", "ids", source="T06")
def system_turn_added(host: Host) -> None:
    """a system turn before the conversation"""
    wrap(host, "text", lambda plain, case: "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + plain(case))


@fault("host", "inputs", "ids", source="T06")
def break_between_turns_lost(host: Host) -> None:
    """no line break behind the end of a turn"""
    wrap(host, "text", lambda plain, case: plain(case).replace("<|im_end|>\n", "<|im_end|>"))


@fault("host", "inputs", "ids", source="T04")
def markup_read_as_text(host: Host) -> None:
    """special tokens of the prompt's middle are tokenized as text"""
    wrap(host, "encode", lambda plain, text: plain(text.replace("<|im_end|>", "<| im_end |>")))


@fault("host", "inputs", "ids", source="T07")
def image_behind_the_words(host: Host) -> None:
    """the image stands behind the words of its turn"""
    def text(plain, case):
        made = plain(case)
        if MARK not in made:
            return made
        before, after = made.split(MARK, 1)
        words, end, rest = after.partition("<|im_end|>")
        return before + words + MARK + end + rest

    wrap(host, "text", text)


@fault("host", "inputs", "ids", source="T07")
def vision_end_missing(host: Host) -> None:
    """no vision_end behind the image tokens"""
    wrap(host, "text", lambda plain, case: plain(case).replace("<|vision_end|>", ""))


@fault("host", "inputs", "ids", source="T04")
def prompt_cut_at_256(host: Host) -> None:
    """the tokenizer truncates at 256 tokens"""
    wrap(host, "encode", lambda plain, text: plain(text)[:256])


@fault("host", "inputs", "ids", source="T04")
def case_folded(host: Host) -> None:
    """text lower-cased beside the markup"""
    wrap(host, "text", lambda plain, case: plain(case).lower())
