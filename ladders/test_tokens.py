"""The engine's greedy tokens are python's."""

RUNG = "tokens"


def test_rollout(verdict, holds):
    holds(verdict)
