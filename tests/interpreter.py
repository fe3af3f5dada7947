"""Test-only repairs of Triton's interpreter, without which it is silently wrong.

bf16: the interpreter (3.6 to 3.9) keeps bf16 values as uint16 bit patterns and computes on the bits
in ``tl.dot`` and in arithmetic without an upcast, and truncates where it should round. Repaired
here: operands are widened, results rounded to nearest even.

triton 3.6 with numpy >= 2.4: ``range`` over a run-time argument dies converting a one-element
array.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle) -> np.ndarray:
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _repair_bf16() -> None:
    plain_dot, plain_binary = _Builder.create_dot, _Builder.binary_op
    plain_cast, plain_convert = _Builder.cast_impl, _Builder.create_fp_to_fp

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (_Handle(_widen(t), tl.float32) if _is_bf16(t) else t for t in (a, b))
        return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return plain_binary(self, lhs, rhs, op)
        result = op(_widen(lhs), _widen(rhs))
        if result.dtype == np.bool_:
            return _Handle(result, tl.int1)
        return _Handle(_narrow(result), tl.bfloat16)

    def narrows(src, dst_type) -> bool:
        return src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16

    def cast_impl(self, src, dst_type):
        if narrows(src, dst_type):
            return _Handle(_narrow(src.data), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        nearest = rounding_mode is None or "rtne" in str(rounding_mode).lower()
        if narrows(src, dst_type) and nearest:
            return _Handle(_narrow(src.data), tl.bfloat16)
        return plain_convert(self, src, dst_type, rounding_mode)

    _Builder.create_dot, _Builder.binary_op = create_dot, binary_op
    _Builder.cast_impl, _Builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_scalars() -> None:
    scope = interpreter._LangPatchScope
    plain_set = scope.set_attr

    def set_attr(self, obj, name, value):
        if name == "__index__":
            return plain_set(self, obj, name, lambda t: int(t.handle.data.item()))
        if name == "__bool__":
            plain_bool = value

            def to_bool(t):
                data = t.handle.data
                return bool(data.item()) if data.size == 1 else plain_bool(t)

            return plain_set(self, obj, name, to_bool)
        return plain_set(self, obj, name, value)

    scope.set_attr = set_attr


def repair() -> None:
    """Apply both repairs to the imported interpreter."""
    _repair_bf16()
    if hasattr(interpreter, "_LangPatchScope"):
        _repair_scalars()
