"""The gated activation between the two matrix products of a feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import FLOATS, check_is_tensor, check_no_grad, check_tensor


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
    check_is_tensor("gate_up", gate_up)
    check_tensor("gate_up", gate_up, gate_up.shape, FLOATS)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected shape (..., 2H), got {tuple(gate_up.shape)}")
    check_no_grad("swiglu", gate_up=gate_up)
    return OP(gate_up, backend=backend)


def _fake(gate_up: Tensor, backend: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


OP = Op(
    "swiglu(Tensor gate_up, str backend) -> Tensor",
    _fake,
    reference.swiglu,
    pdl=("triton", "cuda"),
)
