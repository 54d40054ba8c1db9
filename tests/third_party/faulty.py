"""The port with one mistake each, of a kind that ports have shipped with; nothing else differs."""

from third_party.port import Port


def swapped(checkpoint, grid):
    """Row and column of an image slot exchanged in the rotary positions."""
    port = Port(checkpoint, grid)
    port.c["row"], port.c["col"] = port.c["col"], port.c["row"]
    return port


def late(checkpoint, grid):
    """Every DeepStack addition one decoder layer late."""
    port = Port(checkpoint, grid)
    port.spec["add_after"] = [layer + 1 for layer in port.spec["add_after"]]
    return port


def stale(checkpoint, grid):
    """One row of k inside the fused matrix of layer 2 left over from layer 1."""
    port = Port(checkpoint, grid)
    row = port.spec["H"] * port.spec["D"] + 5
    port.w["t2.wqkv"][row] = port.w["t1.wqkv"][row]
    return port


def silent(checkpoint, grid):
    """Promises a seam that it never hands to the tap."""
    port = Port(checkpoint, grid)
    names = [*port.seams(), "decoder.norm"]
    port.seams = lambda: names
    return port
