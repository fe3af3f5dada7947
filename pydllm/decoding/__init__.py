"""Decoding algorithms and the loop they share; they know models only through the protocol."""

from pydllm.decoding.apd import APD, LeftToRight
from pydllm.decoding.freedave import FreeDave
from pydllm.decoding.generation import Generation, Step, generate, warmup
from pydllm.decoding.multiblock import MultiBlock
from pydllm.decoding.static import EntropyBound, Factor, Static, Threshold

__all__ = [
    "APD",
    "EntropyBound",
    "Factor",
    "FreeDave",
    "Generation",
    "LeftToRight",
    "MultiBlock",
    "Static",
    "Step",
    "Threshold",
    "generate",
    "warmup",
]
