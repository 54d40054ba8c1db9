"""What a run is given and judged by: checkpoint, cases, bounds, policy, oracle; each opened when asked for, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import numpy as np

from harness import threads
from harness.bounds import BOUNDS, REPLAY, Bounds, load_bounds
from harness.cases import Case, load_cases
from harness.checkpoint import Checkpoint, open_checkpoint
from harness.errors import HarnessError
from harness.geometry import Geometry
from harness.options import Options, readable
from harness.policy import Policy, load_policy
from harness.store import Oracle, OracleCase, open_oracle
from harness.streaming.room import Watch

RECORDED = Path(__file__).resolve().parent.parent.parent / "oracles" / "recorded"


def kept(method: Callable) -> Callable:
    """Compute once for each object and arguments, and remember it on the object, so that it goes when the object goes."""
    @wraps(method)
    def remember(self: Any, *arguments: Any) -> Any:
        key = (method.__name__, arguments)
        if key not in self.memory:
            self.memory[key] = method(self, *arguments)
        return self.memory[key]
    return remember


@dataclass
class Given:
    """Lazy: asking for the plan of a rung opens the checkpoint's header and the cases, nothing else.

    `progress(step, done, total)` is called while long steps run, `say(text)` where a plan is to be told.
    """

    options: Options
    progress: Callable[[str, int, int], None] = lambda step, done, total: None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    say: Callable[[str], None] = lambda text: None
    watch: Watch | None = None
    """Of memory, from when something was streamed first."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint under conversion; its width decides how many threads torch may use."""
        with readable(self.options.checkpoint):
            found = open_checkpoint(self.options.checkpoint, self.options.revision)
        threads.settle(found.geometry)
        return found

    @property
    def geometry(self) -> Geometry:
        """Its geometry."""
        return self.checkpoint.geometry

    @cached_property
    def cases(self) -> dict[str, Case]:
        """Cases by name."""
        with readable(self.options.cases):
            return {case.name: case for case in load_cases(self.options.cases)}

    @cached_property
    def bounds(self) -> Bounds:
        """Bounds in force; by default with those of the replay engines, where one of them runs the bundle."""
        with readable(self.options.bounds):
            found = load_bounds(self.options.bounds)
        return found.beside(load_bounds(REPLAY)) if self.options.replays and self.options.bounds == BOUNDS else found

    @cached_property
    def policy(self) -> Policy:
        """Policy in force."""
        with readable(self.options.policy):
            return load_policy(self.options.policy)

    @cached_property
    def oracle(self) -> Oracle:
        """The oracle given, or one recorded (or resumed) now."""
        if self.options.oracle is not None:
            return open_oracle(self.options.oracle, self.checkpoint.digest, self.geometry.record())
        from harness.oracle import record

        return record(self.checkpoint, list(self.cases.values()), recorded_folder(self.checkpoint, self.options.device),
                      device=self.options.device, memory=self.options.memory,
                      progress=lambda what, done, total: self.progress("record", done, total), say=self.say)

    @property
    def by_sketch(self) -> bool:
        """Whether a sketch stands for the oracle."""
        return self.options.oracle is not None and not self.oracle.exact

    @property
    def has_oracle(self) -> bool:
        """Whether there is an oracle without recording one now."""
        return self.options.oracle is not None or "oracle" in self.__dict__

    @kept
    def recorded(self, case: str) -> OracleCase:
        """What the oracle holds of a case. Raises HarnessError where it lacks it or the case has changed since."""
        if case not in self.oracle.cases:
            raise HarnessError("the oracle has no such case", where=case, fix="record it again")
        changed = self.oracle.stale(self.cases[case])
        if changed:
            raise HarnessError(changed, where=case, fix="record the oracle again")
        found = self.oracle.case(case)
        flaw = found.flaw()
        if flaw:
            raise HarnessError(flaw, where=case, fix="record the oracle again")
        return found

    def sequence(self, case: str) -> np.ndarray:
        """Prompt and oracle rollout, HF ids [T + n] int64."""
        recorded = self.recorded(case)
        return np.concatenate([recorded.inputs.ids, recorded.rollout.tokens]).astype(np.int64)

    def regions(self, case: str) -> dict[str, np.ndarray]:
        """Token indices of the prompt and rollout: image and text apart."""
        image = self.sequence(case) == self.geometry.image_token
        return {"image": np.flatnonzero(image), "text": np.flatnonzero(~image)}

    def grid(self, case: str) -> tuple[int, int]:
        """Patch grid (rows, columns) the case needs; a text case runs on the bundle's."""
        grid = self.recorded(case).inputs.grid
        return (grid[1], grid[2]) if grid else self.options.grid

    def keep_cases(self, names: Sequence[str] | None) -> None:
        """Judge only the named cases. Raises HarnessError for a name that no case has."""
        unknown = sorted(set(names or ()) - set(self.cases))
        if unknown:
            raise HarnessError("no such case", where=unknown[0], fix=f"the cases are {', '.join(self.cases)}")
        if names:
            self.cases = {name: case for name, case in self.cases.items() if name in names}

    def image_cases(self) -> list[str]:
        """Names of the cases with an image."""
        return [name for name, case in self.cases.items() if case.images]

    def engine_cases(self) -> list[str]:
        """Names of the cases that the bundle runs too."""
        return [name for name, case in self.cases.items() if case.engine]


def recorded_folder(checkpoint: Checkpoint, device: str = "cpu") -> Path:
    """Where an oracle goes unless the user says otherwise: one folder for all that an oracle must not mix."""
    from harness.oracle.recording import identity
    from harness.store.identity import digest

    made_with = replace(identity(checkpoint, device, "sdpa"), checkpoint_digest=checkpoint.digest)
    return RECORDED / f"{checkpoint.name}-{digest(made_with.record())[:12]}"
