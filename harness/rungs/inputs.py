"""Inputs: what the host makes of text and image, from the bundle's own tokenizer, is what the HF processor makes.

Images of sizes that no case has (`harness.probes.images`) show how a host resizes. Another decoder may differ by one
level of a pixel here and there, but not on the whole: what all pixels are off by on average may be half a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.checkpoint import read_json
from harness.host import load_image, load_tokenizer
from harness.ladder import exact
from harness.plan import TOKENIZER as TOKENIZER_SEAMS
from harness.plan import resized
from harness.probes.images import sizes
from harness.subject import Subject
from harness.verdict import Outcome, Verdict

NAME, TOKENIZER, RESIZED = "inputs", "tokenizer", "sizes"
LEVEL = 2 / 255 * (1 + 1e-4)
"""One of 256 pixel levels after normalisation with mean and std 0.5: what another resize or rounding may cost."""


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """Ids always; grid and patches where there is an image; once, the whole vocabulary, and images of other sizes."""
    cases = {name: ("ids", *(("grid", "patches") if case.images else ())) for name, case in subject.cases.items()}
    return {**cases, TOKENIZER: TOKENIZER_SEAMS, **({RESIZED: resized()} if subject.image_cases() else {})}


def measure(subject: Subject, case: str) -> list[Verdict]:
    """The reference host against the frozen inputs."""
    if case == TOKENIZER:
        return _tokenizer(subject)
    if case == RESIZED:
        return [verdict for name, size in sizes(subject.preprocessing).items() for verdict in _resized(subject, name, size)]
    frozen = subject.recorded(case).inputs
    made = subject.made_inputs(case)
    verdicts = [exact(NAME, case, "ids", frozen.ids, made.ids, "token ids")]
    if frozen.patches is None:
        return verdicts
    if made.patches is None:
        return [*verdicts, *(Verdict(NAME, case, seam, Outcome.FAIL, "the host made no patches")
                             for seam in ("grid", "patches"))]
    return [*verdicts, exact(NAME, case, "grid", np.array(frozen.grid), np.array(made.grid), "patch grid (t, h, w)"),
            _patches(case, "patches", frozen.patches, made.patches)]


def _resized(subject: Subject, name: str, size: tuple[int, int]) -> list[Verdict]:
    """Grid and patches of one image of noise against HF's processor."""
    from harness.oracle.inputs import pixels

    image = load_image("noise:{}x{}:3".format(*size), Path())
    (right, grid), (made, found) = pixels(image, subject.checkpoint), subject.made_patches(image)
    return [exact(NAME, RESIZED, f"{name}.grid", np.array(grid), np.array(found),
                  "patch grid (t, h, w) of {} x {} pixels".format(*size)),
            _patches(RESIZED, f"{name}.patches", right, made)]


def _tokenizer(subject: Subject) -> list[Verdict]:
    """Entries that no prompt holds: the host's tokenizer against the checkpoint's, id by id and merge by merge; and the
    chat template, where the bundle carries one."""
    def parts(folder: Path) -> tuple[dict[str, int], list[str]]:
        tokenizer = load_tokenizer(folder)
        merges = read_json(folder / "tokenizer.json").get("model", {}).get("merges", [])
        return tokenizer.get_vocab(with_added_tokens=True), [one if isinstance(one, str) else " ".join(one)
                                                              for one in merges]

    (vocabulary, merges), (ours, our_merges) = parts(subject.checkpoint.root), parts(Path(subject.tokenizer))
    moved = sorted(token for token in {*vocabulary, *ours} if vocabulary.get(token) != ours.get(token))
    first = next((at for at, (one, other) in enumerate(zip(merges, our_merges)) if one != other), None)
    apart = abs(len(merges) - len(our_merges)) + (first is not None)
    where = f"the first {moved[0]!r}" if moved else ""
    return [_count("vocabulary", len(moved), f"{len(vocabulary)} tokens, {len(moved)} with another id {where}".rstrip()),
            _count("merges", apart, f"{len(merges)} merges" + (f", differing from merge {first} on" if apart else "")),
            _same_template(_template(subject.checkpoint.root), _template(Path(subject.tokenizer)))]


def _template(folder: Path) -> str | None:
    """The chat template of a tokenizer's directory, in whichever of its files it stands."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    records = [read_json(folder / name) for name in ("chat_template.json", "tokenizer_config.json")
               if (folder / name).is_file()]
    return next((record["chat_template"] for record in records if record.get("chat_template")), None)


def _same_template(right: str | None, held: str | None) -> Verdict:
    if held is None or right is None:
        return _count("template", 0, "no chat template beside the tokenizer: the host renders by itself")
    return _count("template", int(held != right), "the chat template is " + (
        "the checkpoint's" if held == right else "not the checkpoint's"))


def _count(seam: str, wrong: int, reason: str) -> Verdict:
    return Verdict(NAME, TOKENIZER, seam, Outcome.FAIL if wrong else Outcome.PASS, reason, "mismatches", float(wrong), 0.0)


def _patches(case: str, seam: str, frozen: np.ndarray, made: np.ndarray) -> Verdict:
    if frozen.shape != made.shape:
        return Verdict(NAME, case, seam, Outcome.FAIL, f"shape {made.shape} where {frozen.shape} is right")
    apart = made - frozen.astype(np.float64)
    difference = np.abs(apart)
    if _bfloat16(made) and not _bfloat16(frozen):
        return Verdict(NAME, case, seam, Outcome.FAIL, "every value fits bfloat16, and the processor's do not: the host "
                       "rounded them; float16, which a bundle takes, would keep every pixel level")
    bias = float(abs(apart.mean()))
    value = max(float(difference.max()), 2 * bias) if np.isfinite(difference).all() else float("inf")
    at = [int(part) for part in np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), frozen.shape)]
    return Verdict(NAME, case, seam, Outcome.PASS if value <= LEVEL else Outcome.FAIL,
                   f"largest difference {np.nan_to_num(difference, nan=np.inf).max():.3g} at {at}, {bias:.3g} on average; "
                   f"one pixel level is {LEVEL:.3g}", "max_abs", value, LEVEL)


def _bfloat16(patches: np.ndarray) -> bool:
    """Whether every value has the digits of a bfloat16 only."""
    return not (np.ascontiguousarray(patches, dtype=np.float32).view(np.uint32) & 0xFFFF).any()
