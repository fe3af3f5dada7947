"""The linear layer whose rows do not depend on each other, with 16-bit or 8-bit weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_is_tensor,
    check_no_grad,
    check_number,
    check_shape,
    check_tensor,
    check_written,
)
from pydllm.reference.linear import SCALE_BLOCK, dequantize

# Largest magnitude of each type of quantised weight.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
QUANTIZATIONS = ("fp8", "fp8_channel", "int8")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of one byte per element and its scales; the weight is ``scale * values``.

    Attributes:
        values: ``(N, K)`` e4m3fn or int8, rows of contiguous elements, without NaN; or
            ``(E, N, K)``, the matrices of E experts.
        scale: fp32 on the device of ``values``; ``(N,)``, one per output channel, or, for e4m3fn,
            ``(ceil(N / 128), ceil(K / 128))``, one per block of 128 x 128; E of them for experts.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype that is not supported.
    """

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_dtype("values", self.values, *_LARGEST)
        if self.values.ndim != 3:
            check_shape("values", self.values, "N", "K")
        check_dtype("scale", self.scale, torch.float32)
        check_device("scale", self.scale, "values", self.values)
        *lead, rows, columns = self.values.shape
        allowed: list[tuple[int, ...]] = [(*lead, rows)]
        if self.values.dtype == torch.float8_e4m3fn:
            allowed.append((*lead, -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)))
        if tuple(self.scale.shape) not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"scale: expected shape {wanted}, got {tuple(self.scale.shape)}")

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, ``(N, K)`` or ``(E, N, K)``, in a floating-point dtype."""
        return dequantize(self.values, self.scale, dtype)


def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
    """Round a weight to one byte per element.

    The scale is the largest magnitude of a block or channel over that of the type (448 or 127), or
    1 where all weights are 0; values are ``weight / scale``, rounded to nearest even.

    Args:
        weight: ``(N, K)`` or ``(E, N, K)`` fp32, fp16, bf16 or fp64.
        kind: ``"fp8"`` (e4m3fn, one scale per block of 128 x 128), ``"fp8_channel"`` (e4m3fn, one
            per output channel) or ``"int8"`` (one per output channel).

    Raises:
        ValueError: an unknown kind, another shape, or a weight that is not finite.
        TypeError: a dtype that is not supported.

    Reads a value on the host: for loading, not for decoding.
    """
    check_choice("kind", kind, QUANTIZATIONS)
    check_is_tensor("weight", weight)
    if weight.ndim == 3 and len(weight):
        parts = [quantize(part, kind) for part in weight]
        # As bytes: not every device stacks e4m3.
        values = torch.stack([part.values.view(torch.uint8) for part in parts])
        scales = torch.stack([part.scale for part in parts])
        return QuantizedWeight(values.view(parts[0].values.dtype), scales)
    check_tensor("weight", weight, ("N", "K"), FLOATS)
    rows, columns = weight.shape
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    magnitude = weight.detach().abs().float()
    if kind == "fp8":
        blocks = (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
        padded = magnitude.new_zeros(blocks[0] * SCALE_BLOCK, blocks[1] * SCALE_BLOCK)
        padded[:rows, :columns] = magnitude
        largest = padded.unflatten(1, (-1, SCALE_BLOCK)).unflatten(0, (-1, SCALE_BLOCK))
        largest = largest.amax((1, 3))
    else:
        largest = magnitude.amax(1) if columns else magnitude.new_zeros(rows)
    if not bool(largest.isfinite().all()):
        raise ValueError("weight: expected finite numbers, got infinity or NaN")
    scale = (largest / _LARGEST[dtype]).masked_fill_(largest == 0, 1.0)
    exact = weight.detach().double() / dequantize(torch.ones_like(magnitude), scale, torch.float64)
    exact.clamp_(-_LARGEST[dtype], _LARGEST[dtype])
    values = (exact.round() if dtype == torch.int8 else exact.float()).to(dtype)
    return QuantizedWeight(values, scale)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiply rows by a weight, such that the bits of a row depend on no other row.

    ``y = x @ weight.T + bias``, accumulated in fp32 (fp64 for fp64) and rounded once. The order of
    a sum is decided by ``(N, K)``, the dtypes and the architecture, never by the number of rows:
    a row has the same bits alone, among 256 others, and at any place. ``F.linear`` promises
    nothing of the kind, and on CPUs and GPUs does not do it.

    Args:
        x: ``(..., K)`` fp32, fp16, bf16 or (torch backend) fp64.
        weight: ``(N, K)`` in the dtype of ``x``, or a ``QuantizedWeight`` of that shape, which is
            multiplied as it is: ``x`` stays in its dtype, and nothing dequantised is stored.
        bias: ``(N,)`` in the dtype of ``x``, or None.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``(..., N)`` contiguous, dtype of ``x``.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: bits of a row as above. Between backends, architectures and quantisations they
    differ. The torch backend multiplies 32 rows at a time with the matrix library's kernel for 32
    rows; that a row's place among the 32 does not matter is tested, not promised, by the library.
    CUDA graphs: safe. ``torch.compile``: one op.

    Kernels: ``kernels/linear.py``, ``csrc/linear.cu`` (fp16 and bf16, depths of a multiple of 16).

    Example:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[11.,  2.]])
    """
    return _OP(*_checked("linear", x, weight, bias), backend=backend)


def linear_swiglu(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiply rows by the weights of gate and up, and apply the gated activation.

    ``y = swiglu(linear(x, weight, bias))``, bit for bit on each backend. The kernels store ``y``
    alone, not the gate and the up-projection that it is made of.

    Args:
        x: ``(..., K)`` fp32, fp16, bf16 or (torch backend) fp64.
        weight: ``(2H, K)``, the gate's weight over the up-projection's, as ``linear`` takes it.
        bias: ``(2H,)`` in the dtype of ``x``, or None.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``(..., H)`` contiguous, dtype of ``x``.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported.
        BackendError: the named backend cannot run the call.

    Determinism: as ``linear``; bits of a row depend on no other row. CUDA graphs: safe.
    ``torch.compile``: one op.

    Kernels: ``kernels/linear.py``, ``csrc/linear.cu`` (fp16 and bf16, depths of a multiple of 16).
    One launch where ``linear`` has one, two where it splits the depth and in fp32.

    Example:
        >>> linear_swiglu(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[21.9996]])
    """
    parts = _checked("linear_swiglu", x, weight, bias)
    if parts[1].shape[0] % 2:
        raise ValueError(f"weight: expected shape (2H, K), got {tuple(parts[1].shape)}")
    return _SWIGLU_OP(*parts, backend=backend)


def linear_rms_norm(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    norm: Tensor,
    eps: float,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiply rows by a weight, add them to the residual and normalise the sum.

    ``y = rms_norm(linear(x, weight, bias), norm, eps, residual=residual)``, bit for bit on each
    backend. Where ``linear`` splits the depth, the norm adds the splits, and the product is not
    stored.

    Args:
        x: ``(..., K)`` fp32, fp16, bf16 or (torch backend) fp64.
        weight: ``(N, K)``, as ``linear`` takes it.
        norm: ``(N,)``, dtype of ``x``; the norm's weight.
        eps: added to the mean square, at least 0.
        residual: ``(..., N)``, dtype of ``x``; **updated in place** to the sum.
        bias: ``(N,)`` in the dtype of ``x``, or None; of the product.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``(..., N)`` contiguous, dtype of ``x``.

    Raises:
        ValueError: shapes or devices do not fit, ``eps`` is negative or not finite, a gradient is
            wanted, or an unknown backend.
        TypeError: a dtype that is not supported, or dtypes that differ.
        BackendError: the named backend cannot run the call.

    Determinism: as ``linear``; bits of a row depend on no other row. CUDA graphs: safe.
    ``torch.compile``: one op.

    Kernels: ``kernels/linear.py``, ``kernels/rms_norm.py``, ``csrc/linear.cu`` (fp16 and bf16,
    depths of a multiple of 16), ``csrc/rms_norm.cu``. Two launches, with splits or without.

    Example:
        >>> residual = torch.tensor([[1.0, 4.0]])
        >>> linear_rms_norm(torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0]]), torch.ones(2), 0.0,
        ...                 residual)
        tensor([[0.8485, 1.1314]])
        >>> residual
        tensor([[3., 4.]])
    """
    parts = _checked("linear_rms_norm", x, weight, bias)
    width = parts[1].shape[0]
    check_tensor("norm", norm, (width,), x.dtype, x, "x")
    check_number("eps", eps, 0)
    check_tensor("residual", residual, (*x.shape[:-1], width), x.dtype, x, "x")
    check_written("residual", residual)
    check_no_grad("linear_rms_norm", norm=norm, residual=residual)
    return _RMS_NORM_OP(*parts, norm, eps, residual, backend=backend)


def _checked(
    name: str, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``x``, the weight's values and scale, and ``bias``."""
    check_is_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    if x.ndim == 0:
        raise ValueError("x: expected shape (..., K), got ()")
    scale = None
    if isinstance(weight, QuantizedWeight):
        scale, weight = weight.scale, weight.values
        check_tensor("weight", weight, ("N", x.shape[-1]), weight.dtype, x, "x")
    else:
        check_tensor("weight", weight, ("N", x.shape[-1]), x.dtype, x, "x")
    if 0 in weight.shape:
        raise ValueError(f"weight: expected N and K of at least 1, got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x.dtype, x, "x")
    check_no_grad(name, x=x, weight=weight, bias=bias)
    return x, weight, scale, bias


def _fake(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_OP = Op(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str backend) -> Tensor",
    _fake,
    reference.linear,
    pdl=("triton", "cuda"),
)


def _swiglu_fake(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


_SWIGLU_OP = Op(
    "linear_swiglu(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str backend) -> Tensor",
    _swiglu_fake,
    reference.linear_swiglu,
    file="linear",
    pdl=("triton", "cuda"),
)


def _rms_norm_fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_RMS_NORM_OP = Op(
    "linear_rms_norm(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor norm, float eps, "
    "Tensor(a!) residual, str backend) -> Tensor",
    _rms_norm_fake,
    reference.linear_rms_norm,
    file="linear",
    supports="supports_rms_norm",
    pdl=("triton", "cuda"),
)
