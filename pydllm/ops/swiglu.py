"""The gated activation between the two matrix products of a feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.dispatch import choose, launcher
from pydllm._backend.library import register
from pydllm.ops._checks import FLOATS, check_dtype, check_no_grad


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply the second half of each row by the SiLU of the first half.

    ``y = silu(gate) * up`` with ``gate, up = gate_up.chunk(2, -1)`` and ``silu(g) = g / (1 +
    exp(-g))`` in fp32, rounded to the dtype of ``gate_up`` before the product, as Hugging Face's
    models do.

    Args:
        gate_up: ``(..., 2H)`` fp32, fp16, bf16 or (torch backend) fp64; the output of one matrix
            product with the gate's weight over the up-projection's.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``(..., H)`` contiguous, dtype of ``gate_up``.

    Raises:
        ValueError: the last dimension is odd or missing, a gradient is wanted, or an unknown
            backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: an element's bits depend on its gate and up alone. CUDA graphs: safe.
    ``torch.compile``: one op.

    Kernels: ``kernels/swiglu.py``, ``csrc/swiglu.cu``.

    Example:
        >>> swiglu(torch.tensor([[1.0, 2.0, 10.0, 100.0]]))
        tensor([[  7.3106, 176.1594]])
    """
    check_dtype("gate_up", gate_up, *FLOATS)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected shape (..., 2H), got {tuple(gate_up.shape)}")
    check_no_grad("swiglu", gate_up=gate_up)

    def cuda() -> str | None:
        from pydllm._backend.cuda import swiglu as kernel

        return kernel.supports(gate_up)

    def triton() -> str | None:
        from pydllm.kernels import swiglu as kernel

        return kernel.supports(gate_up)

    chosen = choose("swiglu", backend, gate_up.device, triton=triton, cuda=cuda)
    if chosen == "torch":
        return reference.swiglu(gate_up)
    return torch.ops.pydllm.swiglu(gate_up, chosen)


def _run(gate_up: Tensor, backend: str) -> Tensor:
    if backend == "torch":
        return reference.swiglu(gate_up)
    return launcher("swiglu", backend)(gate_up)


def _fake(gate_up: Tensor, backend: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


register("swiglu(Tensor gate_up, str backend) -> Tensor", _run, _fake)
