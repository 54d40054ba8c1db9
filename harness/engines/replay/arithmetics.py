"""The arithmetics by name."""

from __future__ import annotations

from harness.engines.replay.arithmetic import Arithmetic, Fp16, Fp32
from harness.errors import HarnessError

NAMES = ("fp32", "fp16", "coreai-cpu")


def arithmetic(name: str) -> Arithmetic:
    """Raises HarnessError for a name that is not known."""
    if name not in NAMES:
        raise HarnessError(f"{name!r} is not known", where="arithmetic", fix=f"known are {', '.join(NAMES)}")
    if name == "coreai-cpu":
        from harness.engines.replay.coreai_cpu import CoreAICpu

        return CoreAICpu()
    return Fp32() if name == "fp32" else Fp16()
