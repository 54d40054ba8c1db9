"""The host under test: what it makes of a case, with the tokenizer and image numbers that go with the bundle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.checkpoint import read_json
from harness.subject.bundle import BundleSide
from harness.subject.given import kept

if TYPE_CHECKING:
    from harness.cases import FrozenInputs
    from harness.graph.contract import HostInputs
    from harness.host import Preprocessing


class HostSide(BundleSide):
    """Token ids, patches, and the host's part of the contract."""

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Image numbers of preprocessor_config.json: the bundle's own where it carries one, else the checkpoint's."""
        from harness.host import Preprocessing

        name = "preprocessor_config.json"
        root = self.tokenizer if (self.tokenizer / name).is_file() else self.checkpoint.root
        return Preprocessing.from_config(read_json(root / name))

    @property
    def tokenizer(self) -> Path:
        """Tokenizer directory that the host uses: the bundle's own where one was given."""
        given = self.bundle.tokenizer if self.options.bundle is not None else None
        return given or self.checkpoint.root

    @kept
    def decode_text(self, token: int) -> str:
        """Text of one token id."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    @cached_property
    def _tokenizer(self) -> Any:
        from harness.host import load_tokenizer

        return load_tokenizer(self.tokenizer)

    def made_inputs(self, case: str) -> FrozenInputs:
        """What the host under test makes of a case."""
        from harness.host import host_inputs_for

        return host_inputs_for(self.cases[case], self.tokenizer, self.preprocessing)

    def made_patches(self, image: Any) -> tuple[np.ndarray, tuple[int, int, int]]:
        """What it makes of an RGB image: patches and grid."""
        from harness.host import make_patches

        return make_patches(image, self.preprocessing)

    @property
    def host(self) -> Callable[..., HostInputs]:
        """Its part of the contract: `harness.graph.contract.host_inputs`."""
        from harness.graph.contract import host_inputs

        return host_inputs
