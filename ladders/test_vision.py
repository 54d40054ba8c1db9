"""Every block, merger and DeepStack output of the graph is the oracle's, locally and accumulated."""

RUNG = "vision"


def test_layer(verdict, holds):
    holds(verdict)
