"""``window_attention`` at the shapes of LLaDA-8B, Dream-7B, SDAR-8B, a 100M and the tiny model.

A name says the model, sequences, the window's rows and the cache's slots; ``refresh`` is a window
over all of it, ``8of32`` is 8 branches of 32 rows, ``8+8of8`` a causal window of 8 rows with 8
leaves of 8 rows each, one forward of self-speculation. ``python -m bench.ops.attention_bytes``
prints the bytes that the kernel moves against the least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench.ops import peers
from pydllm import ops, reference
from pydllm._backend.errors import BackendError
from pydllm.testing import random_normal

_MODELS = {
    "llada-8b": {"heads": 32, "kv_heads": 32, "head_dim": 128},
    "sdar-8b": {"heads": 32, "kv_heads": 8, "head_dim": 128},
    "dream-7b": {"heads": 28, "kv_heads": 4, "head_dim": 128},
    "llada-100m": {"heads": 12, "kv_heads": 12, "head_dim": 64},
    "tiny": {"heads": 2, "kv_heads": 2, "head_dim": 64},
}
_WINDOWS = (
    *((batch, rows, slots) for rows in (4, 32, 128) for batch, slots in ((1, 2048), (32, 2048))),
    *((batch, 8, slots) for batch, slots in ((1, 512), (8, 8192))),
    *((batch, 64, slots) for batch, slots in ((1, 8192), (1, 32768), (8, 2048))),
    *((1, slots, slots) for slots in (512, 2048, 8192)),
)
_SIZES = {
    "llada-8b": _WINDOWS,
    "dream-7b": _WINDOWS,
    "sdar-8b": _WINDOWS,
    "llada-100m": ((1, 32, 256), (1, 256, 256)),
    "tiny": ((1, 32, 64), (8, 64, 64)),
}
SHAPES = {
    f"{name}-{batch}x{'refresh' if rows == slots else rows}-{slots}": {
        "batch": batch,
        "rows": rows,
        "slots": slots,
        **_MODELS[name],
    }
    for name, sizes in _SIZES.items()
    for batch, rows, slots in sizes
}
# Every window, cache and batch of a decoder that matters: an hour on a GPU, hopeless on a CPU.
GRID = {
    f"{name}-{batch}x{rows}-{slots}": {
        "batch": batch,
        "rows": rows,
        "slots": slots,
        **_MODELS[name],
    }
    for name in ("llada-8b", "dream-7b", "sdar-8b")
    for slots in (512, 2048, 8192, 32768)
    for batch in (1, 8, 32)
    for rows in (4, 8, 32, 64, 128)
}
SHAPES |= {
    f"{name}-{batch}x8of{rows}-2048": {
        "batch": batch,
        "rows": rows,
        "slots": 2048,
        "branches": 8,
        **_MODELS[name],
    }
    for name, rows in (("llada-8b", 32), ("sdar-8b", 4))
    for batch in (1, 32)
}
SHAPES |= {
    f"{name}-{batch}x8+8of8-2048": {
        "batch": batch,
        "rows": 8,
        "slots": 2048,
        "leaves": 8,
        "leaf_rows": 8,
        **_MODELS[name],
    }
    for name, batch in (("llada-8b", 1), ("sdar-8b", 1), ("sdar-8b", 8))
}


def make(
    dtype: torch.dtype,
    device: str,
    *,
    batch: int,
    rows: int,
    slots: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    branches: int = 1,
    leaves: int = 0,
    leaf_rows: int = 0,
) -> dict[str, Tensor | int]:
    """A dual-cache step: the window ends at three quarters of the cache, a branch is committed."""
    attached = leaves * leaf_rows
    shape = batch, branches * rows + attached, heads + 2 * kv_heads, head_dim
    qkv = random_normal(*shape, seed=0, dtype=dtype, device=device)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    cache = (batch, slots, kv_heads, head_dim)
    cos, sin = rotary_tables(slots + leaf_rows, head_dim, device)
    start = max(0, slots * 3 // 4 - rows)
    tree = {"leaves": leaves, "leaf_rows": leaf_rows, "causal": True} if leaves else {}
    numbers = {
        "start": start,
        "length": rows,
        "kv_len": start + rows if leaves else slots,
        "commit": rows,
    }
    return {
        "q": q,
        "k": k,
        "v": v,
        "k_cache": random_normal(*cache, seed=1, dtype=dtype, device=device),
        "v_cache": random_normal(*cache, seed=2, dtype=dtype, device=device),
        **{
            name: torch.full((batch,), value, dtype=torch.int32, device=device)
            for name, value in numbers.items()
        },
        "cos": cos,
        "sin": sin,
        **({"branches": branches} if branches > 1 else {}),
        **tree,
    }


def rotary_tables(positions: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    """fp32 tables with base 1e4."""
    rate = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return angle.cos().float().to(device), angle.sin().float().to(device)


def call(inputs: dict[str, Tensor], backend: str) -> Tensor:
    return ops.window_attention(**inputs, backend=backend)


def _prepared(inputs: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of all visible positions, heads first: RoPE op by op, then torch.cat."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

    def spread(cache: Tensor, branches: int) -> Tensor:
        return cache.repeat_interleave(branches, 0) if branches > 1 else cache

    if "leaves" in inputs:
        raise BackendError("no baseline but torch.compile has leaves")
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    branches = inputs.get("branches", 1)
    q, k, v = (x.unflatten(1, (branches, -1)).flatten(0, 1) for x in (q, k, v))
    end = start + q.shape[1]
    tables = (inputs["cos"][start:end], inputs["sin"][start:end])
    cos, sin = (torch.cat((table, table), -1)[:, None] for table in tables)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = (
        torch.cat((cache[:, :start], fresh, cache[:, end:]), 1).transpose(1, 2)
        for cache, fresh in (
            (spread(inputs["k_cache"], branches), k),
            (spread(inputs["v_cache"], branches), v),
        )
    )
    return q.transpose(1, 2), keys, values


def _published() -> Callable[[dict[str, Tensor]], Tensor]:
    """What published code does in every layer."""
    starts: dict[tuple[int, ...], int] = {}

    def run(inputs: dict[str, Tensor]) -> Tensor:
        sizes = _sizes(inputs)
        if sizes not in starts:  # read once: a published loop knows it on the host
            starts[sizes] = int(inputs["start"][0])
        q, k, v = _prepared(inputs, starts[sizes])
        grouped = q.shape[1] != k.shape[1]
        return _rows_first(F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped), inputs)

    return run


def _sizes(inputs: dict[str, Tensor]) -> tuple[int, ...]:
    return (*inputs["q"].shape, *inputs["k_cache"].shape, inputs.get("branches", 1))


def _rows_first(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return y.transpose(1, 2).unflatten(0, (inputs["q"].shape[0], -1)).flatten(1, 2)


def _attention_alone(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], *, rows_first: bool = False
) -> Callable[[], Callable[[dict[str, Tensor]], Tensor]]:
    """A baseline that is given rotated, concatenated keys: the attention is all that is timed.

    It takes and returns ``(B, H, T, D)``, or with ``rows_first`` ``(B, T, H, D)``.
    """

    def make() -> Callable[[dict[str, Tensor]], Tensor]:
        ready: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

        def run(inputs: dict[str, Tensor]) -> Tensor:
            key = (_sizes(inputs), inputs["q"].dtype)
            if key not in ready:
                ready.clear()
                prepared = _prepared(inputs, int(inputs["start"][0]))
                ready[key] = tuple(
                    (x.transpose(1, 2) if rows_first else x).contiguous() for x in prepared
                )
            y = attend(*ready[key])
            return _rows_first(y.transpose(1, 2) if rows_first else y, inputs)

        return run

    return make


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        except RuntimeError as error:
            reason = str(error).strip().split(".")[0]
            raise BackendError(f"{backend.name} does not run this: {reason}") from error

    return attend


def _flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            raise BackendError("FlexAttention is timed on GPUs only")
        return compiled(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _compiled() -> Callable[[dict[str, Tensor]], Tensor]:
    compiled = torch.compile(reference.window_attention)

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return compiled(**inputs, pad=None, scale=inputs["q"].shape[-1] ** -0.5)

    return run


# The first two do what the op does; the others have it half done: no RoPE, no cache write, keys
# and values already in one piece.
BASELINES = {
    "RoPE, torch.cat and SDPA": _published,
    "torch.compile": _compiled,
    "SDPA flash alone": _attention_alone(_sdpa(SDPBackend.FLASH_ATTENTION)),
    "SDPA cuDNN alone": _attention_alone(_sdpa(SDPBackend.CUDNN_ATTENTION)),
    "SDPA efficient alone": _attention_alone(_sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    "FlexAttention alone": _attention_alone(_flex()),
    "flash-attn alone": _attention_alone(peers.flash_attn, rows_first=True),
    "FlashInfer alone": _attention_alone(peers.flashinfer_attention(), rows_first=True),
}


def bytes_moved(inputs: dict[str, Tensor]) -> int:
    """Each visible cached row once, the fresh rows once, the output, and the committed rows."""
    q, k, cache = inputs["q"], inputs["k"], inputs["k_cache"]
    rows = _window_rows(inputs)
    slots, visible = cache.shape[1], _visible(inputs)
    cached = 2 * cache.numel() * (visible - rows) // slots
    fresh, committed = 2 * k.numel(), 2 * k.numel() // k.shape[1] * rows
    return (2 * q.numel() + cached + fresh + committed) * q.element_size()


def operations(inputs: dict[str, Tensor]) -> int:
    """Two products per visible key. A branch sees its own rows and the cache around them; a leaf
    also the rows of the window before it, counted as if these were all.
    """
    seen = _visible(inputs) + inputs.get("leaf_rows", 0)
    return 4 * inputs["q"].numel() * seen


def _window_rows(inputs: dict[str, Tensor]) -> int:
    attached = inputs.get("leaves", 0) * inputs.get("leaf_rows", 0)
    return (inputs["k"].shape[1] - attached) // inputs.get("branches", 1)


def _visible(inputs: dict[str, Tensor]) -> int:
    """Cached slots of a window that is committed, up to the last visible one."""
    slots = inputs["k_cache"].shape[1]
    return slots * 3 // 4 if "leaves" in inputs else slots


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile row; head sizes that are no power of two, partial rotary, groups and options."""
    from pydllm.kernels import window_attention as kernel

    few, many, grouped = (16, 4, 4), (256, 4, 4), (32, 28, 4)  # many rows are not split
    shared, all_splits = (16, 32, 8), (32, 64, 64)  # programs that walk several splits, or all
    branches, causal, norms = {"branches": 4}, {"causal": True}, {"norms": True}
    tree = {"causal": True, "leaves": 8, "leaf_rows": 8}  # one forward of self-speculation
    checked = {"causal": True, "leaves": 5, "leaf_rows": 1}  # and of masked verification
    prompt = {"causal": True, "leaves": 1, "leaf_rows": 8}
    everything = {**causal, **branches, **norms, "block_size": 4, "window": 100, "softcap": 30.0}
    cases: list[tuple[torch.dtype, int, int, tuple[int, int, int], dict]] = [
        (dtype, head_dim, head_dim, rows, {})
        for dtype, head_dims in (
            (torch.bfloat16, (64, 80, 128, 256, 512)),
            (torch.float16, (128,)),
            (torch.float32, (64, 128, 256, 512)),
        )
        for head_dim in head_dims
        for rows in (few, many)
    ]
    for head_dim, rotary, rows, options in (
        (96, 96, grouped, {}),
        (128, 64, few, {"pad": True}),
        (128, 64, grouped, {"pad": True}),
        (128, 128, grouped, {}),
        (256, 64, grouped, {}),
        (64, 64, grouped, branches),
        (128, 128, few, branches),
        (128, 128, grouped, branches),
        (256, 256, grouped, branches),
        (128, 128, grouped, causal),
        (128, 128, grouped, {"block_size": 4}),
        (128, 128, few, {"paged": True}),
        (128, 128, all_splits, {}),
        (128, 128, few, norms),
        (128, 128, grouped, norms),
        (128, 128, shared, norms),
        (128, 128, all_splits, norms),
        (128, 128, grouped, everything | {"paged": True, "pad": True}),
        (128, 128, many, everything),
        (128, 128, many, {"branches": 2}),
        (64, 64, (72, 4, 4), tree),
        (128, 128, (72, 4, 4), tree),
        (128, 128, (72, 32, 8), tree | norms | {"paged": True, "pad": True}),
        (128, 128, (10, 32, 8), checked),
        (128, 128, (264, 32, 8), prompt),
        (256, 256, (72, 4, 4), tree),
        (256, 256, grouped, {"window": 1024}),
        (512, 128, grouped, {"softcap": 50.0}),
    ):
        cases.append((torch.bfloat16, head_dim, rotary, rows, options))
    for dtype, head_dim, rotary, (rows, heads, kv_heads), options in cases:
        name = str(dtype).removeprefix("torch.")
        label = f"{name} D{head_dim}/{rotary} T{rows} H{heads}/{kv_heads} {' '.join(options)}"
        arguments = _meta(dtype, rows, heads, kv_heads, head_dim, rotary, **options)
        yield label, lambda arguments=arguments: kernel.window_attention(**arguments)


def _meta(
    dtype: torch.dtype,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    pad: bool = False,
    norms: bool = False,
    paged: bool = False,
    **options: object,
) -> dict[str, object]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = empty(4, rows, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), 2)
    numbers = {
        name: empty(4, dtype=torch.int32) for name in ("start", "length", "kv_len", "commit")
    }
    cache = (512, 16) if paged else (4, 2048)
    return {
        **{"q": q, "k": k, "v": v, **numbers},
        "k_cache": empty(*cache, kv_heads, head_dim),
        "v_cache": empty(*cache, kv_heads, head_dim),
        "cos": empty(2064, rotary // 2, dtype=torch.float32),
        "sin": empty(2064, rotary // 2, dtype=torch.float32),
        "pad": empty(4, dtype=torch.int32) if pad else None,
        "q_norm": empty(head_dim) if norms else None,
        "k_norm": empty(head_dim) if norms else None,
        "block_table": empty(4, 128, dtype=torch.int32) if paged else None,
        "scale": head_dim**-0.5,
        **options,
    }
