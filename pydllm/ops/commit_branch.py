"""Write the accepted branch of a window to the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pydllm import reference
from pydllm._backend.library import Op
from pydllm._checks import check_is_tensor, check_no_grad, check_number, check_tensor
from pydllm.ops.window_attention import check_heads, check_tables, check_weight


def commit_branch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    branch: Tensor,
    start: Tensor,
    commit: Tensor,
    cos: Tensor,
    sin: Tensor,
    branches: int,
    pad: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Write one branch's fresh keys, rotated, and values into the cache, in one launch.

    ``K_cache[start:start+commit], V_cache[start:start+commit] = rope(k[branch])[:commit],
    v[branch][:commit]`` per sequence, where ``k`` and ``v`` are what ``window_attention`` was given
    with ``branches`` candidates of ``T / branches`` rows, and ``commit`` 0.

    Args:
        k, v: ``(B, T, Hkv, D)`` fp32, fp16, bf16 or (torch backend) fp64, not rotated.
        k_cache, v_cache: ``(B, L, Hkv, D)``, or ``(pages, page, Hkv, D)`` with a ``block_table``;
            **updated in place**.
        branch: ``(B,)`` int32, 0 to ``branches - 1``; any other number writes nothing.
        start: ``(B,)`` int32, slot of row 0 of each branch.
        commit: ``(B,)`` int32, rows to write, 0 to ``T / branches``.
        cos, sin, pad, k_norm, eps, block_table: as in ``window_attention``.
        branches: candidates in ``k`` and ``v``.
        backend: None (``PYDLLM_BACKEND``), ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is wanted, or an unknown backend.
        TypeError: a dtype that is not supported, or dtypes that differ.
        BackendError: the named backend cannot run the call.

    Determinism: without ``k_norm`` the stored bits are those that ``window_attention`` stores and
    attends to, on the same backend. CUDA graphs: safe. ``torch.compile``: one op.

    Kernels: ``kernels/commit_branch.py``, ``csrc/commit_branch.cu``.

    Example:
        >>> k = v = torch.tensor([5.0, 6.0, 7.0, 8.0]).view(1, 4, 1, 1).expand(1, 4, 1, 2)
        >>> cache = torch.zeros(2, 1, 3, 1, 2)
        >>> at = lambda n: torch.tensor([n], dtype=torch.int32)
        >>> commit_branch(k, v, *cache, branch=at(1), start=at(0), commit=at(2), branches=2,
        ...               cos=torch.ones(3, 1), sin=torch.zeros(3, 1))
        >>> cache[1, 0, :, 0, 0]
        tensor([7., 8., 0.])
    """
    check_is_tensor("k", k)
    check_number("eps", eps, 0)
    check_heads(k, k, v, k_cache, v_cache, branches, block_table)
    check_tables(cos, sin, k, k_cache, branches, block_table)
    numbers = {"branch": branch, "start": start, "commit": commit}
    for name, tensor in (numbers if pad is None else numbers | {"pad": pad}).items():
        check_tensor(name, tensor, k.shape[:1], torch.int32, k, "k")
    check_weight("k_norm", k_norm, k)
    check_no_grad("commit_branch", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    tensors = (k, v, k_cache, v_cache, branch, start, commit, cos, sin, pad, k_norm, block_table)
    _OP(*tensors, branches, eps, backend=backend)


def _fake(*_: object) -> None:
    return None


_OP = Op(
    "commit_branch(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor branch, "
    "Tensor start, Tensor commit, Tensor cos, Tensor sin, Tensor? pad, Tensor? k_norm, "
    "Tensor? block_table, int branches, float eps, str backend) -> ()",
    _fake,
    reference.commit_branch,
)
