"""Models that are larger than memory: stages that are given their weights in turn, and forwards that wait for them.

Nothing here knows a model: the oracle's stages are made of Hugging Face's modules, the graph's of ours.
"""
