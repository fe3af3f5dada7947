"""What decoding asks of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pydllm.models.cache import StaticCache
from pydllm.models.spec import ModelSpec
from pydllm.ops import VocabStats

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# Keys before RoPE and values of every layer, each ``(B, T, Hkv, D)``.
Fresh = list[tuple[Tensor, Tensor]]


class Model(Protocol):
    """A model: its facts, and hidden states of a window of positions given cached keys and values.

    Attributes:
        spec: the facts.
        tokenizer: a ``tokenizers.Tokenizer``, or None where the model came without one.
    """

    spec: ModelSpec
    tokenizer: Tokenizer | None

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def new_cache(self, batch: int, max_len: int) -> StaticCache:
        """A cache for ``batch`` sequences of ``max_len`` slots.

        ``max_len`` 0 is a cache that keeps nothing: windows then start at 0, see themselves alone
        and commit nothing.
        """

    def forward(
        self,
        ids: Tensor,
        start: Tensor,
        cache: StaticCache,
        *,
        length: Tensor,
        kv_len: Tensor,
        commit: Tensor,
        pad: Tensor | None = None,
        branches: int = 1,
        fresh: Fresh | None = None,
        attention: str | None = None,
        adapter: bool = False,
        block_offset: Tensor | None = None,
        whole: bool = False,
        read_only: bool = False,
        rows: Tensor | None = None,
        leaves: int = 0,
        leaf_rows: int = 1,
        backend: str | None = None,
    ) -> Tensor:
        """Hidden states of a window of each sequence, final norm applied.

        Args:
            ids: ``(B, T)`` int64, tokens of the window. Rows from ``length`` on are computed and
                mean nothing; they need valid ids.
            start: ``(B,)`` int32, slot of the window's row 0.
            cache: what the window sees besides itself, and where it commits.
            length: ``(B,)`` int32, window rows in use, 0 to ``T``.
            kv_len: ``(B,)`` int32, end of the slots that are seen: cached ones before the window
                and after it, fresh ones inside it.
            commit: ``(B,)`` int32, how many of the window's rows are written to the cache.
            pad: ``(B,)`` int32, slots of left padding, or None for none.
            branches: number of candidates of the window in ``ids``, ``T / branches`` rows each, one
                after the other, all at ``start``; each sees the cache and itself. ``commit`` is of
                the first.
            fresh: a list that is given what ``commit_branch`` needs of this forward.
            attention: of this forward: ``"full"``, ``"causal"`` or ``"block_causal"``; None: as the
                spec says, which a model with ``context="causal"`` leaves open.
            adapter: with the model's draft adapter, a LoRA that is not merged.
            block_offset: ``(B,)`` int32, the block of position p is
                ``(p + block_offset) // block_size``; a model whose blocks begin at the prompt's
                end needs it.
            whole: a promise: every ``length`` is ``T / branches`` and every ``kv_len`` the
                cache's ``max_len``, if it has slots. What masks then mask nothing may be left out.
            read_only: a promise: ``commit`` is 0 everywhere.
            rows: ``(N,)`` int64, or None for all: the rows, counted through the batch, whose hidden
                states are wanted.
            leaves, leaf_rows: groups of rows in ``ids`` after the window's, each after one of its
                last rows, as in ``pydllm.ops.window_attention``; with ``attention="causal"``.
                ``start``, ``length`` and ``commit`` are of the window without them, and an
                ``adapter`` is that of the leaves alone.
            backend: as in ``pydllm.ops``.

        Returns:
            ``(B, T, hidden)``, or ``(N, hidden)`` of ``rows``, in the model's dtype.
        """

    def commit_branch(
        self,
        fresh: Fresh,
        cache: StaticCache,
        *,
        branch: Tensor,
        start: Tensor,
        commit: Tensor,
        branches: int,
        backend: str | None = None,
    ) -> None:
        """Write a candidate's keys and values to the cache, after the forward that made them.

        Args:
            fresh: from a forward with that number of ``branches`` at ``start``.
            branch: ``(B,)`` int32, which candidate.
            commit: ``(B,)`` int32, how many of its rows, from the first on; 0 writes nothing.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)`` of hidden states ``(..., hidden)``, in the model's dtype."""

    def head_stats(self, hidden: Tensor, rows: Tensor | None = None, **options: Any) -> VocabStats:
        """Token and statistics of hidden states ``(R, hidden)``, or of the rows named in ``rows``.

        Args:
            hidden: as ``forward`` returns them, in the model's dtype.
            rows: ``(N,)`` int32 or int64 on the device, or None for all in order.
            options: as in ``pydllm.ops.head_stats``.
        """


def expect_model(model: object, name: str = "model") -> None:
    """What ``pydllm.load`` returns, or another model with the protocol."""
    if isinstance(model, type) or not isinstance(getattr(model, "spec", None), ModelSpec):
        got = repr(model) if isinstance(model, str) else f"{type(model).__name__}"
        raise TypeError(f"{name}: expected what pydllm.load returns, got {got:.80}")
