"""The checks of ``pydllm._checks`` under their former name."""

from pydllm._checks import FLOATS, check_device, check_dtype, check_no_grad, check_shape

__all__ = ["FLOATS", "check_device", "check_dtype", "check_no_grad", "check_shape"]
