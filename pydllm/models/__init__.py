"""Models: what decoding asks of one, the native transformer, and how it is loaded."""

from pydllm.models.agreement import Agreement, check
from pydllm.models.cache import StaticCache
from pydllm.models.chat import ChatTemplate, encode
from pydllm.models.load import load
from pydllm.models.native import NativeModel
from pydllm.models.protocol import Model
from pydllm.models.spec import ModelSpec

__all__ = [
    "Agreement",
    "ChatTemplate",
    "Model",
    "ModelSpec",
    "NativeModel",
    "StaticCache",
    "check",
    "encode",
    "load",
]
