"""Training batches: conversations about scenes, and plain text, as padded id rows.

Batch i is a pure function of (stream, i), so the stream does not depend on how many
worker processes make it. Workers make ids and scene integers only; the pictures are
drawn where the model is (see scenes.draw).
"""

import random

import numpy as np
import torch

import corpus
import scenes

IGNORE = -100
MAX_TEXT = 416
LONG_ROW = 40
PROMPT = "Describe this image."
OTHER_SIZE_SHARE = 0.4


class Row:
    """One sequence under construction: ids, labels and three position rows."""

    def __init__(self, tokenizer, image_id):
        self.tokenizer, self.image_id = tokenizer, image_id
        self.ids, self.labels, self.positions, self.next = [], [], [], 0

    def text(self, text, learn=False):
        """Append text; its tokens are learned when asked."""
        ids = self.tokenizer.encode(text).ids
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)
        self.positions += [(self.next + i,) * 3 for i in range(len(ids))]
        self.next += len(ids)

    def image(self, width, height):
        """Append an image's tokens, with M-RoPE positions (t, h, w)."""
        rows, columns = height // 32, width // 32
        self.text("<|vision_start|>")
        self.ids += [self.image_id] * (rows * columns)
        self.labels += [IGNORE] * (rows * columns)
        self.positions += [(self.next, self.next + r, self.next + c) for r in range(rows) for c in range(columns)]
        self.next += max(rows, columns)
        self.text("<|vision_end|>")

    def answer(self, text):
        """Append the assistant's turn."""
        self.text("<|im_start|>assistant\n")
        self.text(text + "<|im_end|>", learn=True)
        self.text("\n")


def _short_document(rng):
    return corpus.document(rng, rng.randint(2, 12))


def _describe(row, scene, rng):
    """One turn that shows the scene and gets its caption; text may come before the image."""
    # A long text goes first only in a fresh conversation, which keeps rows short.
    fresh = len(row.ids) < LONG_ROW
    row.text("<|im_start|>user\n")
    order = rng.random()
    if order < 0.12 and fresh:
        row.text(_short_document(rng) + "\n")
    if 0.12 <= order < 0.22:
        row.text(PROMPT)
        row.image(scene.width, scene.height)
    else:
        row.image(scene.width, scene.height)
        row.text(PROMPT)
    row.text("<|im_end|>\n")
    row.answer(scenes.caption(scene))


def _ask(row, scene, rng):
    question, answer = scenes.question(scene, rng)
    row.text(f"<|im_start|>user\n{question}<|im_end|>\n")
    row.answer(answer)


def _conversation(row, pair, rng):
    """Fill a row with a conversation about one scene, or two when pair has two."""
    if rng.random() < 0.1:
        row.text("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    if len(pair) == 1 and rng.random() < 0.06:
        row.text("<|im_start|>user\nTell a story.<|im_end|>\n")
        row.answer(_short_document(rng))
    if len(pair) == 1 and rng.random() < 0.1:
        row.text("<|im_start|>user\n")
        row.image(pair[0].width, pair[0].height)
        question, answer = scenes.question(pair[0], rng)
        row.text(f"{question}<|im_end|>\n")
        row.answer(answer)
        return
    for scene in pair:
        _describe(row, scene, rng)
    if len(pair) == 1:
        for _ in range(rng.randint(0, 2)):
            _ask(row, pair[0], rng)


class Batches(torch.utils.data.Dataset):
    """Batch i: `images` scenes of one size in conversations, then `texts` text rows."""

    def __init__(self, tokenizer, image_id, stream, count, images, texts):
        self.tokenizer, self.image_id = tokenizer, image_id
        self.stream, self.count, self.images, self.texts = stream, count, images, texts

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = random.Random(f"{self.stream}/{index}")
        width, height = scenes.MAIN_SIZE
        if rng.random() < OTHER_SIZE_SHARE:
            width, height = rng.choice(scenes.OTHER_SIZES)
        shown, rows = [], []
        while len(shown) < self.images:
            wanted = 2 if rng.random() < 0.04 and len(shown) + 2 <= self.images else 1
            pair = [
                scenes.sample(rng.randrange(scenes.FIRST_TRAINING_SEED, 2**48), width, height)
                for _ in range(wanted)
            ]
            row = Row(self.tokenizer, self.image_id)
            _conversation(row, pair, rng)
            shown += pair
            rows.append(row)
        talks = len(rows)
        for _ in range(self.texts):
            row = Row(self.tokenizer, self.image_id)
            row.text(corpus.document(rng) + "<|endoftext|>", learn=True)
            for name in ("ids", "labels", "positions"):
                setattr(row, name, getattr(row, name)[:MAX_TEXT])
            rows.append(row)
        return self._padded(rows, talks, shown, width, height)

    @staticmethod
    def _padded(rows, talks, shown, width, height):
        # Right padding behind a causal mask needs no attention mask.
        shape = (len(rows), max(len(row.ids) for row in rows))
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE)
        positions = np.zeros((*shape, 3), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = row.ids
            labels[index, : len(row.ids)] = row.labels
            positions[index, : len(row.ids)] = row.positions
        return {
            "ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "positions": torch.from_numpy(positions.transpose(2, 0, 1).copy()),
            "scenes": torch.tensor([scenes.parameters(scene) for scene in shown]),
            "talks": talks, "width": width, "height": height,
        }
