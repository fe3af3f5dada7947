"""Decoding algorithms and the loop they share; they know models only through the protocol."""

from pydllm.decoding.apd import APD
from pydllm.decoding.call import Step
from pydllm.decoding.freedave import FreeDave
from pydllm.decoding.generate import Generation, generate, warmup
from pydllm.decoding.left_to_right import LeftToRight
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
