"""A conversion with a fault to take a picture of: every DeepStack row stands one slot late."""

from harness.graph.reference import factory as healthy


def factory(checkpoint, grid):
    port = healthy(checkpoint, grid)
    right = port.decode

    def decode(ids, positions, image, deepstack, *rest, **options):
        return right(ids, positions, image, deepstack.roll(1, 0), *rest, **options)
    port.decode = decode
    return port
