"""Registration of the ops with PyTorch: schema, implementation and fake, once each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("pydllm", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``pydllm::<schema>`` with one implementation for CPU and CUDA tensors, and its fake.

    The implementation gets the schema's arguments, the chosen backend's name among them, and
    imports the kernels lazily. Mutated arguments are marked ``Tensor(a!)`` in the schema.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"pydllm::{name}", fake, lib=_LIBRARY)
