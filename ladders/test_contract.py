"""Ids, positions, rope shift and DeepStack slots are the port's contract, exactly."""

RUNG = "contract"


def test_integers(verdict, holds):
    holds(verdict)
