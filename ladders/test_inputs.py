"""The host makes the ids, patches and grid that the HF processor makes."""

RUNG = "inputs"


def test_host(verdict, holds):
    holds(verdict)
