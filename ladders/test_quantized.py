"""Quantization costs no more than the policy allows."""

RUNG = "quantized"


def test_price(verdict, holds):
    holds(verdict)
