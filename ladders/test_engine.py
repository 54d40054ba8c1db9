"""Inside the bundle, on its real runtime, every layer is the twin's."""

RUNG = "engine"


def test_layer(verdict, holds):
    holds(verdict)
