"""Decoding algorithms and the loop they share; they know models only through the protocol."""

from pydllm.decoding.apd import APD
from pydllm.decoding.autoregressive import Autoregressive
from pydllm.decoding.call import Step
from pydllm.decoding.editing import Editing
from pydllm.decoding.freedave import FreeDave
from pydllm.decoding.generate import generate, warmup
from pydllm.decoding.generation import Generation
from pydllm.decoding.infilling import Infilled, infill
from pydllm.decoding.left_to_right import LeftToRight
from pydllm.decoding.levenshtein import LevenshteinEditing
from pydllm.decoding.multiblock import MultiBlock
from pydllm.decoding.self_speculative import SelfSpeculative
from pydllm.decoding.static import EntropyBound, Factor, Static, Threshold
from pydllm.decoding.streaming import Stream, stream

__all__ = [
    "APD",
    "Autoregressive",
    "Editing",
    "EntropyBound",
    "Factor",
    "FreeDave",
    "Generation",
    "Infilled",
    "LeftToRight",
    "LevenshteinEditing",
    "MultiBlock",
    "SelfSpeculative",
    "Static",
    "Step",
    "Stream",
    "Threshold",
    "generate",
    "infill",
    "stream",
    "warmup",
]
