"""The expert layer of a mixture of experts: each row through the experts that it was routed to."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import FLOATS, check_choice, check_is_tensor, check_no_grad, check_tensor
from pydllm.ops.linear import QuantizedWeight

ACTIVATIONS = ("silu", "gelu_tanh")


def experts(
    hidden: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    ids: Tensor,
    weights: Tensor,
    *,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Add up the outputs of the experts of each row, and of the shared expert.

    ``y_e = (act(x gate_e^T) * (x up_e^T)) down_e^T`` and ``out = sum_k weights[k] * y_ids[k]``, in
    the order of the slots. The products and the activation are rounded to the dtype of ``hidden``,
    weighting and sum are fp32 with one rounding, and the shared expert's output is added after it.

    Args:
        hidden: ``(..., H)`` fp32, fp16, bf16 or (torch backend) fp64.
        gate_up: ``(E, 2I, H)``, dtype of ``hidden``: the rows of each expert's gate, then of its
            up-projection. Or a ``QuantizedWeight`` of that shape, which is multiplied as it is:
            ``hidden`` stays in its dtype, and nothing dequantised is stored.
        down: ``(E, H, I)``, dtype of ``hidden``; a ``QuantizedWeight`` if ``gate_up`` is one, with
            scales of the same kind.
        ids: ``(..., K)`` int32 in [0, E); any other is no expert. As ``route`` returns them.
        weights: ``(..., K)`` fp32 (fp64 with fp64).
        shared_gate_up: ``(2S, H)`` or None: an expert of every row that has at least one expert.
        shared_down: ``(H, S)``, with ``shared_gate_up``.
        activation: ``"silu"`` or ``"gelu_tanh"``.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``(..., H)`` contiguous, dtype of ``hidden``; 0 in rows without an expert.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: no atomics; in the kernels per row's bits depend on its hidden state
    and routes alone, not on the number of rows. The torch backend on a GPU is ``grouped_mm``, which
    chooses its tiles by the shape. CUDA graphs: safe, and a replay may route elsewhere than the
    capture. No host read on a GPU; on a CPU the torch backend reads which experts were chosen, and
    touches no others. ``torch.compile``: one op.

    Kernels: ``kernels/experts.py``; ``csrc/experts.cu`` takes fp16, bf16 and multiples of 16.

    Example:
        >>> gate_up, down = torch.ones(3, 2, 1), torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
        >>> ids, weights = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([[0.75, 0.25]])
        >>> experts(torch.tensor([[2.0]]), gate_up, down, ids, weights)
        tensor([[265.1256]])
    """
    check_is_tensor("hidden", hidden)
    check_tensor("hidden", hidden, tuple(hidden.shape), FLOATS)
    if hidden.ndim < 2:
        raise ValueError(f"hidden: expected shape (..., H), got {tuple(hidden.shape)}")
    dtype, width = hidden.dtype, hidden.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    gate_up, gate_up_scale, stored = _parts(gate_up, dtype)
    down, down_scale, stored_down = _parts(down, dtype)
    if stored != stored_down:
        raise TypeError(
            "down: expected a weight stored as gate_up, "
            f"{_stored_as(*stored)}, got {_stored_as(*stored_down)}"
        )
    check_tensor("down", down, ("E", width, "I"), stored[0], hidden, "hidden")
    count, _, inner = down.shape
    check_tensor("gate_up", gate_up, (count, 2 * inner, width), stored[0], hidden, "hidden")
    check_tensor("ids", ids, (*hidden.shape[:-1], "K"), torch.int32, hidden, "hidden")
    check_tensor("weights", weights, tuple(ids.shape), wide, hidden, "hidden")
    if count == 0 or ids.shape[-1] == 0:
        raise ValueError(
            "ids: expected at least 1 expert and 1 slot for each row, got "
            f"{count} experts and {ids.shape[-1]} slots"
        )
    if (shared_gate_up is None) != (shared_down is None):
        raise ValueError("shared_down: expected it with shared_gate_up, and neither without")
    if shared_gate_up is not None and shared_down is not None:
        check_tensor("shared_down", shared_down, (width, "S"), dtype, hidden, "hidden")
        rows = 2 * shared_down.shape[1]
        check_tensor("shared_gate_up", shared_gate_up, (rows, width), dtype, hidden, "hidden")
    check_choice("activation", activation, ACTIVATIONS)
    check_no_grad(
        "experts",
        hidden=hidden,
        gate_up=gate_up,
        down=down,
        weights=weights,
        shared_gate_up=shared_gate_up,
        shared_down=shared_down,
    )
    arguments = (hidden, gate_up, down, ids, weights, shared_gate_up, shared_down, activation)
    return _OP(*arguments, gate_up_scale, down_scale, backend=backend)


def _parts(
    weight: Tensor | QuantizedWeight, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, tuple[torch.dtype, int]]:
    """A weight's numbers and scales, and how it is stored: dtype, dimensions of the scales."""
    if isinstance(weight, QuantizedWeight):
        return weight.values, weight.scale, (weight.values.dtype, weight.scale.ndim)
    return weight, None, (dtype, 0)


def _stored_as(dtype: torch.dtype, dimensions: int) -> str:
    per = {2: " with a scale per channel", 3: " with a scale per block"}
    return f"{dtype}{per.get(dimensions, '')}"


def _fake(hidden: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


_OP = Op(
    "experts(Tensor hidden, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, "
    "Tensor? shared_gate_up, Tensor? shared_down, str activation, Tensor? gate_up_scale, "
    "Tensor? down_scale, str backend) -> Tensor",
    _fake,
    reference.experts,
    # On a CPU the definition reads how many rows each expert has.
    opaque=True,
)
