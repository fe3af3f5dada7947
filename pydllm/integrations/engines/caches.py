"""Engines' paged caches as ``window_attention`` takes them: views and block tables, no copies."""

from __future__ import annotations

from torch import Tensor


def vllm_pages(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one of vLLM's layers, each ``(pages, page, Hkv, D)``.

    The block table is vLLM's own, ``(B, n)`` int32.

    Args:
        kv_cache: ``(2, pages, page, Hkv, D)``, or ``(pages, 2, page, Hkv, D)`` as newer releases
            have it. A cache of two pages could be either and counts as the first.

    Raises:
        ValueError: another shape.
    """
    if kv_cache.ndim == 5 and kv_cache.shape[0] == 2:
        return kv_cache[0], kv_cache[1]
    if kv_cache.ndim == 5 and kv_cache.shape[1] == 2:
        return kv_cache[:, 0], kv_cache[:, 1]
    raise ValueError(
        "kv_cache: expected (2, pages, page, Hkv, D) or (pages, 2, page, Hkv, D), "
        f"got {tuple(kv_cache.shape)}"
    )


def sglang_pages(
    k_buffer: Tensor, v_buffer: Tensor, slots: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values ``(pages, page, Hkv, D)`` and block table of one of SGLang's layers.

    Args:
        k_buffer, v_buffer: ``(slots, Hkv, D)``, of its token-to-KV pool.
        slots: ``(B, n)`` int32, rows of its request-to-token table: the slot of each position.
        page: SGLang's ``--page-size``, 16 or more for the kernels; positions of a page have slots
            that follow each other.

    Raises:
        ValueError: the buffers are not made of such pages.
    """
    if page < 1 or k_buffer.ndim != 3 or k_buffer.shape != v_buffer.shape:
        raise ValueError(
            "k_buffer, v_buffer: expected two of shape (slots, Hkv, D) and a page of at least 1, "
            f"got {tuple(k_buffer.shape)}, {tuple(v_buffer.shape)} and {page}"
        )
    if k_buffer.shape[0] % page:
        raise ValueError(
            f"k_buffer: expected a multiple of the page's {page} slots, got {k_buffer.shape[0]}"
        )
    keys, values = (t.unflatten(0, (-1, page)) for t in (k_buffer, v_buffer))
    return keys, values, slots[:, ::page] // page
