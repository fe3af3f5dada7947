"""The definition of ``commit_branch``."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm.reference.rms_norm import rms_norm
from pydllm.reference.window_attention import commit_rows, rotate


def commit_branch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    branch: Tensor,
    start: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    pad: Tensor | None,
    k_norm: Tensor | None,
    block_table: Tensor | None,
    branches: int,
    eps: float,
) -> None:
    """``K_cache[start:start+commit], V_cache[...] = rope(k)[branch][:commit], v[branch][:commit]``.

    Per sequence; rows before ``pad`` and rows that do not fit are left out.
    """
    rows, page = k.shape[1] // branches, k_cache.shape[1]
    slots = page * (1 if block_table is None else block_table.shape[1])
    first = torch.zeros_like(start) if pad is None else pad
    start, commit, first, part = (t[:, None] for t in (start, commit, first, branch))
    row = torch.arange(rows, device=k.device)
    slot = start + row
    position = (slot - first).clamp(0, cos.shape[0] - 1)
    kept = (row < commit) & (slot >= first) & (slot < slots) & (part >= 0) & (part < branches)
    sequence = torch.arange(k.shape[0], device=k.device)[:, None]
    k, v = (t[sequence, part.clamp(0, branches - 1) * rows + row] for t in (k, v))
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, None)
    cos, sin = cos[position][:, :, None], sin[position][:, :, None]
    k = rotate(k, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    for cache, fresh in ((k_cache, k), (v_cache, v)):
        commit_rows(cache, fresh, block_table, slot, kept)
