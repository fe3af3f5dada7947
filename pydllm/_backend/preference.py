"""Where kernels were measured to be faster than what ``auto`` would take without a measurement.

A row is written by hand, from ``python -m bench.ops OP --backend cuda --backend triton`` on that
GPU, and names the file in bench/results/ that shows it. Where nothing was measured, ``auto`` takes
Triton.
"""

from __future__ import annotations

import torch

from pydllm._backend.constants import capability

# op -> compute capability (90 for sm_90) -> the results
CUDA_FASTER: dict[str, dict[int, str]] = {}
# compute capability -> (most rows, the results): ``ops.linear`` faster than ``F.linear`` in 16 bits
LINEAR_FASTER: dict[int, tuple[int, str]] = {}


def prefers_cuda(op: str, device: torch.device) -> bool:
    """Whether ``auto`` asks the CUDA kernel of ``op`` before the Triton one on ``device``."""
    return op in CUDA_FASTER and capability(device.index) in CUDA_FASTER[op]


def prefers_linear(x: torch.Tensor) -> bool:
    """Whether a model multiplies ``x (..., K)`` with ``ops.linear`` where only speed decides."""
    if not LINEAR_FASTER or x.device.type != "cuda" or x.dtype.itemsize != 2:
        return False
    limit, _ = LINEAR_FASTER.get(capability(x.device.index), (0, ""))
    return x.shape[:-1].numel() <= limit


def why(op: str, architecture: int) -> str:
    """Why ``auto`` asks which one first, in a sentence for ``python -m pydllm.env``."""
    results = CUDA_FASTER.get(op, {}).get(architecture)
    if results is None:
        return f"CUDA is not measured to be faster on sm_{architecture}"
    return f"CUDA is faster on sm_{architecture}: {results}"
