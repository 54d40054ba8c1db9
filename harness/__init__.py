"""Numerics verification for models converted to Core AI.

A **Case** is run by an **Engine** into a **Trace**; the **Ladder** judges it against the oracle's Trace into
**Verdicts**; the **Gate** folds Verdicts under a policy into a **Certificate**; a **Report** renders what was decided
and decides nothing.
"""

__version__ = "0.1.0"
