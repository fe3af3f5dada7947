"""Decoding algorithms and the loop they share; they know models only through the protocol."""

from pydllm.decoding.freedave import FreeDave
from pydllm.decoding.generation import Generation, Step, generate
from pydllm.decoding.multiblock import MultiBlock
from pydllm.decoding.static import EntropyBound, Factor, Static, Threshold

__all__ = [
    "EntropyBound",
    "Factor",
    "FreeDave",
    "Generation",
    "MultiBlock",
    "Static",
    "Step",
    "Threshold",
    "generate",
]
