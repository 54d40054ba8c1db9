"""Every layer, DeepStack addition and the logits of the graph are the oracle's, locally and accumulated."""

RUNG = "decoder"


def test_layer(verdict, holds):
    holds(verdict)
