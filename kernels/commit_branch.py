"""Write the fresh keys and values of one branch of a window into the cache, keys after RoPE.

By the kernel that rotates and commits a long window of ``window_attention``: the stored bits are
the ones it attended to.
"""

from __future__ import annotations

from typing import Any

import torch

from . import window_attention
from ._attention_rotate import rotate_and_commit


def supports(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    branch: torch.Tensor,
    start: torch.Tensor,
    commit: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *options: Any,
) -> str | None:
    """None if the kernel can run this call, otherwise why not; arguments as of the launcher."""
    if not branch.is_contiguous():
        return f"branch must be contiguous, got strides {branch.stride()}"
    pad, k_norm, block_table, *_ = options
    rest = (cos, sin, pad, k_norm, k_norm, block_table)
    return window_attention.supports(k, k, v, k_cache, v_cache, start, start, start, commit, *rest)


def commit_branch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    branch: torch.Tensor,
    start: torch.Tensor,
    commit: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pad: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    block_table: torch.Tensor | None,
    branches: int,
    eps: float,
) -> None:
    """Launch the kernel; arguments as in ``pydllm.ops.commit_branch``."""
    if k.numel():
        rope = cos, sin, pad, k_norm, block_table
        rotate_and_commit(
            None, k, v, k_cache, v_cache, branch, start, None, commit, *rope, branches, eps
        )
