"""One case on its way to its greedy tokens: what the next pass over the weights has to do for it.

A pass either records (prompt and tokens in one forward, every seam stored, a row computed a second way beside it, to know
the noise) or refines (the rows that choose tokens only, behind the prompt's stored cache). A draft that is right is
recorded once and is done. From its first wrong token on, what the model itself chose takes its place, and the next pass
says whether that holds; each pass settles one token more at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.cases import Case, FrozenInputs
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.oracle.jobs import Bench, Chunk, Whole
from harness.oracle.rollout import Draft, extend_positions, mismatch, refuse_images, settle
from harness.store import CaseWriter
from harness.store.identity import digest
from harness.streaming.stages import Stage

RECORD, REFINE = "record", "refine"
GIVEN, OWN, NONE = "given", "own", "none"


class Lane:
    """tokens [n] int32 as they are guessed now; settled: how many of them stand; phase; passes: over the weights, begun.

    draft: where the tokens came from at first (GIVEN, OWN, NONE). known: how many of `tokens` are chosen or guessed; a
    lane that `guesses` is given the others by a draft of our own before its next pass.
    """

    def __init__(self, case: Case, inputs: FrozenInputs, seams: Sequence[str], out: CaseWriter, geometry: Geometry,
                 draft: Sequence[int] | None) -> None:
        self.case, self.inputs, self.seams, self.out, self.geometry = case, inputs, seams, out, geometry
        if inputs.ids[-1] == geometry.image_token:
            raise HarnessError("the prompt ends with its image", where=case.name, fix="write a word behind it")
        state = out.noted() or {}
        self.draft = state.get("draft", NONE if draft is None else GIVEN)
        self.guesses = False
        self.tokens = np.array(state.get("tokens", self._guess(draft)), dtype=np.int32)
        self.phase, self.passes = state.get("phase", RECORD), state.get("passes", 0)
        self.settled, self.known = state.get("settled", 0), state.get("known", case.decode)
        self.whole: Whole | None = None
        self.chunk: Chunk | None = None

    def _guess(self, draft: Sequence[int] | None) -> list[int]:
        """The draft, as long as it must be; without one, the prompt's last token over and over: any guess is a start."""
        filler, known = [int(self.inputs.ids[-1])] * self.case.decode, [int(token) for token in draft or ()]
        known = [token if token < self.geometry.vocab and token != self.geometry.image_token else filler[0]
                 for token in known]
        return (known + filler)[:self.case.decode]

    @property
    def key(self) -> str:
        """What the decoder's parts depend on besides the case."""
        return digest(self.tokens.tolist())

    def begin(self, bench: Bench) -> None:
        """Start the forwards of the next pass, and note what they are for."""
        self.note()
        self.passes += 1
        record = self.phase == RECORD
        self.whole = Whole(bench, self.inputs, self.tokens, self.seams, self.out, self.key) if record else None
        # Beside a recording, one step as decoding takes it says how much two ways of computing differ: the noise.
        first = len(self.tokens) - 1 if record else 0
        self.chunk = Chunk(bench, self.inputs, self.tokens, first, self.out, f"{self.phase} {self.key}")

    @property
    def open(self) -> bool:
        """Whether tokens are to be guessed before the next pass."""
        return self.guesses and self.known < self.case.decode

    def guess(self, tokens: Sequence[int]) -> None:
        """The first of the tokens as they are known so far; also kept for the next run."""
        self.known = len(tokens)
        self.tokens[:self.known] = tokens
        self.note()

    def note(self) -> None:
        """Keep how far this has come, should the run be killed."""
        self.out.note({"tokens": self.tokens.tolist(), "phase": self.phase, "passes": self.passes, "settled": self.settled,
                       "draft": self.draft, "known": self.known})

    def needs(self, stage: Stage) -> bool:
        """Whether this pass wants a stage's weights."""
        return any(job is not None and job.needs(stage) for job in (self.whole, self.chunk))

    def run(self, stage: Stage, tensors: Sequence[Any], real: Any) -> None:
        """Bring what waits at a stage through it."""
        fresh = self.whole is not None and self.whole.needs(stage)
        if fresh:
            self.whole.run(stage, tensors, real)
        if self.chunk.needs(stage):
            self.chunk.run(stage, tensors, real, self.whole.kv if fresh else None)
        if fresh:
            self.whole.kv = None

    def end(self) -> None:
        """Let go of forwards, done or not."""
        for job in (self.whole, self.chunk):
            if job is not None:
                job.forward.close()
        self.whole = self.chunk = None

    def judge(self) -> bool:
        """After a pass: whether the case is finished; otherwise its tokens and phase are those of the next pass."""
        other = self.chunk.rows
        rows = other if self.whole is None else self.whole.rows
        if not (np.isfinite(rows).all() and np.isfinite(other).all()):
            raise HarnessError("the reference's own logits are not finite", where=self.case.name, fix="check the checkpoint")
        if self.whole is None:
            wrong = np.flatnonzero(other.argmax(-1) != self.tokens)
            self._go_on(other, next((int(step) for step in wrong if step >= self.settled), None))
            return False
        wrong = mismatch(self.tokens, rows, other)
        if wrong is None:
            self._finish(rows, other)
            return True
        self.settled = wrong + 1  # by the one forward, which has the last word
        self._go_on(rows, wrong)
        return False

    def _go_on(self, rows: np.ndarray, wrong: int | None) -> None:
        """Tokens and phase of the next pass, where the rows choose otherwise from step `wrong` on (None: nowhere)."""
        if wrong is None:
            refuse_images(self.case.name, self.tokens, self.geometry.image_token)
            self.phase = RECORD
            return
        # A draft that was given may have one wrong token; then all of it but that one is right, and the next pass is the
        # last. Ours is made again from there; where none can be made, what the rows choose is the best guess.
        again = self.phase == RECORD and self.draft != NONE and self.passes == 1
        ours = self.guesses and not (again and self.draft == GIVEN)
        kept = wrong + 1 if again or ours else len(self.tokens)
        self.tokens = np.concatenate([self.tokens[:wrong], rows.argmax(-1)[wrong:kept], self.tokens[kept:]]).astype(np.int32)
        self.known = wrong + 1 if ours else self.case.decode
        self.phase = RECORD if again and self.geometry.image_token not in self.tokens else REFINE

    def _finish(self, rows: np.ndarray, other: np.ndarray) -> None:
        rollout, noise = settle(self.case.name, Draft(self.tokens, other), rows, self.geometry.image_token)
        self.out.part("rollout", {
            "tokens": rollout.tokens, "margins": rollout.margins, "ties": np.array(rollout.ties, dtype=np.int32),
            "positions": extend_positions(self.inputs.positions, self.case.decode), "noise": np.array([noise])})
        self.out.finish({"prompt_tokens": self.inputs.length, "decoded": self.case.decode, "passes": self.passes,
                         "draft": self.draft}, ["inputs", "rollout", *self.whole.parts])
