"""Replay: an `.aimodel` judged by executing its own program, in torch, on any CPU or GPU.

`program` reads the shipped bytes into plain records, `compile` turns a function of it into straight-line torch source,
`arithmetic` says how each operation is computed, `engine` runs the result like any other engine.
"""
