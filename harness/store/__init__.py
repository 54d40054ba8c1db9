"""Oracles on disk: versioned, content-addressed, written atomically, resumable, read without torch.

    <oracle>/manifest.json                  schema, Identity, when it was created
    <oracle>/pending.json                   stands for it until the checkpoint's digest is known: no case counts by then
    <oracle>/cases/<case>/<part>.safetensors
    <oracle>/cases/<case>/<part>.json       sha256, shape and dtype of every tensor; a part counts once this exists
    <oracle>/cases/<case>/case.json         the frozen Case; a case counts once this exists
    <oracle>/cases/<case>/note.json         how far a run that is under way has come

Parts are inputs, rollout, and one for each stage of the model (vision.08, decoder.17, norm, logits.003), so what a killed
run had finished of a case is kept layer by layer.

Each file appears whole or not at all: it is written beside its place under a temporary name, flushed, and renamed.
What a killed run leaves behind is a temporary file, which the next run removes, or a part, which it can take over.
"""

from __future__ import annotations

from harness.store.identity import Identity, definition
from harness.store.reader import Oracle, OracleCase
from harness.store.sketches import open_oracle, write_sketch
from harness.store.writer import CaseWriter, OracleWriter

__all__ = ["CaseWriter", "Identity", "Oracle", "OracleCase", "OracleWriter", "definition", "open_oracle",
           "write_sketch"]
