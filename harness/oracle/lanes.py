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
from harness.oracle.rollout import Draft, extend_positions, mismatch, settle
from harness.store import CaseWriter
from harness.store.identity import digest
from harness.streaming.stages import Stage

RECORD, REFINE = "record", "refine"


class Lane:
    """tokens [n] int32 as they are guessed now; settled: how many of them stand; phase; passes: over the weights, begun.

    drafted: whether a draft was given.
    """

    def __init__(self, case: Case, inputs: FrozenInputs, seams: Sequence[str], out: CaseWriter, geometry: Geometry,
                 draft: Sequence[int] | None) -> None:
        self.case, self.inputs, self.seams, self.out, self.geometry = case, inputs, seams, out, geometry
        if inputs.ids[-1] == geometry.image_token:
            raise HarnessError("the prompt ends with its image", where=case.name, fix="write a word behind it")
        state = out.noted() or {}
        self.drafted = state.get("drafted", draft is not None)
        self.tokens = np.array(state.get("tokens", self._guess(draft)), dtype=np.int32)
        self.phase, self.passes = state.get("phase", RECORD), state.get("passes", 0)
        self.settled = state.get("settled", 0)
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
        self.out.note({"tokens": self.tokens.tolist(), "phase": self.phase, "passes": self.passes, "settled": self.settled,
                       "drafted": self.drafted})
        self.passes += 1
        record = self.phase == RECORD
        self.whole = Whole(bench, self.inputs, self.tokens, self.seams, self.out, self.key) if record else None
        # Beside a recording, one step as decoding takes it says how much two ways of computing differ: the noise.
        first = len(self.tokens) - 1 if record else 0
        self.chunk = Chunk(bench, self.inputs, self.tokens, first, self.out, self.key if record else None)

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
            self.phase = RECORD
            return
        # A draft may have one wrong token; then all of it but that one is right, and the next pass is the last.
        hopeful = self.phase == RECORD and self.drafted and self.passes == 1 and self.geometry.image_token not in self.tokens
        chosen, kept = rows.argmax(-1), wrong + 1 if hopeful else len(self.tokens)
        self.tokens = np.concatenate([self.tokens[:wrong], chosen[wrong:kept], self.tokens[kept:]]).astype(np.int32)
        self.phase = RECORD if hopeful else REFINE

    def _finish(self, rows: np.ndarray, other: np.ndarray) -> None:
        rollout, noise = settle(self.case.name, Draft(self.tokens, other), rows, self.geometry.image_token)
        self.out.part("rollout", {
            "tokens": rollout.tokens, "margins": rollout.margins, "ties": np.array(rollout.ties, dtype=np.int32),
            "positions": extend_positions(self.inputs.positions, self.case.decode), "noise": np.array([noise])})
        self.out.finish({"prompt_tokens": self.inputs.length, "decoded": self.case.decode, "passes": self.passes,
                         "drafted": self.drafted}, ["inputs", "rollout", *self.whole.parts])
