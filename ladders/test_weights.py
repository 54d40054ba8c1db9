"""Every tensor of the graph and of the bundle is the checkpoint's."""

RUNG = "weights"


def test_tensor(verdict, holds):
    holds(verdict)
