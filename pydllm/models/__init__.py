"""Models: what decoding asks of one, the native transformer, and how it is loaded."""

from pydllm.models.cache import StaticCache
from pydllm.models.chat import ChatTemplate, encode
from pydllm.models.families import LLAMA_NAMES, Family, Names
from pydllm.models.load import load
from pydllm.models.native import NativeModel
from pydllm.models.parity import Parity, check
from pydllm.models.protocol import Model
from pydllm.models.registry import register_family
from pydllm.models.spec import ModelSpec

__all__ = [
    "Parity",
    "LLAMA_NAMES",
    "ChatTemplate",
    "Family",
    "Model",
    "ModelSpec",
    "Names",
    "NativeModel",
    "StaticCache",
    "check",
    "encode",
    "load",
    "register_family",
]
