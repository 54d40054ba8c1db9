"""No activation comes near the fp16 limit."""

RUNG = "headroom"


def test_seam(verdict, holds):
    holds(verdict)
