"""One attention call of a patched model: the op where it can say what is asked, else as before."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pydllm import ops
from pydllm.integrations.patch.checks import DTYPES, Check, wants_grad
from pydllm.integrations.patch.masks import CAUSAL, DENSE, Form, Masks

_MAX_HEAD_DIM = 512  # of the Triton kernel


@dataclass
class Options:
    """What all replacements of one model share.

    Attributes:
        backend: that of the ops; None where they are left to a CPU's torch.
        self_check: compare the first call of each replacement with the original.
        wanted: the backend that was asked for.
        calls: how many calls went where.
    """

    backend: str | None
    self_check: bool
    wanted: str
    masks: Masks = field(default_factory=Masks)
    calls: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    def count(self, what: str) -> None:
        if torch.compiler.is_compiling():  # of the trace, not of the calls
            return
        with self.lock:
            self.calls[what] += 1

    def miss(self, name: str) -> None:
        """A forward of the module ``name`` called no SDPA."""
        self.count(f"as before: {name} called no scaled_dot_product_attention")

    def takes(self, op: str, x: Tensor, *weights: Tensor) -> bool:
        """Whether the op of a layer can take this call; counted."""
        like, reason = weights[-1], None
        if wants_grad(x, *weights):
            reason = "a gradient is wanted"
        elif torch.is_autocast_enabled(x.device.type):
            reason = "autocast"
        elif x.dtype != like.dtype or x.device != like.device or x.dtype not in DTYPES:
            reason = "mixed devices or dtypes"
        elif op == "experts" and x.ndim != 2:
            reason = "tokens in more than one dimension"
        elif x.device.type == "cpu" and self.backend == "auto":
            reason = "patched elsewhere, called on a CPU"
        self.count(op if reason is None else f"as before: {reason}")
        return reason is None

    def number(self, value: int, like: Tensor) -> Tensor:
        """``value`` for each sequence of ``like`` (B, ...): ``(B,)`` int32, a view of a table.

        Tables grow and are never freed, a captured graph may read them; under capture none is kept.
        """
        batch = like.shape[0]
        compiling = torch.compiler.is_compiling()
        if compiling or (like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return torch.full((batch,), value, dtype=torch.int32, device=like.device)
        with self.lock:
            table = self.numbers.get((like.device, batch))
            if table is None or len(table) <= value:
                size = max(256, 2 * value)
                table = torch.arange(size, dtype=torch.int32, device=like.device)
                table = table[:, None].expand(-1, batch).contiguous()
                self.numbers[like.device, batch] = table
        return table[value]


class Attention:
    """The attention of one module.

    Args:
        name: of the module, for messages.
        options: of the model.
        block_size: tokens of a block where the model is block-causal, tried on masks.
    """

    def __init__(self, name: str, options: Options, block_size: int | None = None) -> None:
        self._options, self._block_size = options, block_size
        self._check = Check(f"attention of {name}") if options.self_check else None

    def __call__(
        self,
        original: Callable[[], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attention of ``q (B, Hq, T, D)`` over ``k, v (B, Hkv, S, D)``: ``(B, Hq, T, D)``.

        Args:
            original: gives what the module would have computed.
            mask: as ``scaled_dot_product_attention`` takes it.
            causal: of T equal to S; anything else is left to ``original``.
            window: of a sliding mask, tried on masks.
        """
        options = self._options
        if wants_grad(q, k, v):
            options.count("as before: a gradient is wanted")
            return original()
        if torch.is_autocast_enabled(q.device.type):
            options.count("as before: autocast")
            return original()
        if not (q.device == k.device == v.device and q.dtype == k.dtype == v.dtype):
            options.count("as before: mixed devices or dtypes")
            return original()
        if q.shape[0] != k.shape[0] or k.shape != v.shape or q.shape[1] % k.shape[1]:
            options.count("as before: shapes of another kind")
            return original()
        if options.backend is None:
            if q.device.type != "cpu":
                options.count("as before: patched on a CPU, called elsewhere")
                return original()
            if k.shape[1] == q.shape[1]:
                options.count("as before: no groups of heads")
                return original()
            options.count("SDPA, grouped")
            got = grouped(q, k, v, mask, causal=causal, scale=scale)
            return self._checked(got, original, q, k, v, mask, causal, scale, None)
        if q.device.type == "cpu" and options.backend == "auto":
            options.count("as before: patched elsewhere, called on a CPU")
            return original()
        form, reason = self._form(q, k, v, mask, causal, window)
        if form is None:
            options.count(f"as before: {reason}")
            return original()
        options.count("window_attention")
        got = self._run(form, q, k, v, scale)
        return self._checked(got, original, q, k, v, mask, causal, scale, form)

    def leave(self, reason: str) -> None:
        """Count a call that was not even tried."""
        self._options.count(f"as before: {reason}")

    def _form(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        window: int | None,
    ) -> tuple[Form | None, str]:
        """How the op says it, or None and why it cannot; metadata first."""
        rows, keys = q.shape[2], k.shape[2]
        if not 0 < rows <= keys:
            return None, "no rows, or more rows than keys"
        if self._options.backend == "auto":  # a backend by name never falls back: the op raises
            if q.dtype not in DTYPES:
                return None, f"{q.dtype}"
            if q.shape[3] > _MAX_HEAD_DIM or q.shape[3] % 2:
                return None, f"head size {q.shape[3]}"
            if any(t.stride(3) != 1 for t in (q, k, v)):
                return None, "heads that are not contiguous"
        elif self._options.backend == "torch" and any(_shared(t) for t in (k, v)):
            return None, "expanded keys"  # the reference puts the window into its cache
        if mask is None:
            if not causal:
                return DENSE, ""
            return (CAUSAL, "") if rows == keys else (None, "causal, with fewer rows than keys")
        if causal:
            return None, "causal and a mask"
        form = self._options.masks.form(mask, rows, keys, self._block_size, window)
        return form, "a mask that the op has no argument for"

    def _run(self, form: Form, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        number = self._options.number
        rows, keys, batch = q.shape[2], k.shape[2], q.shape[0]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        end = None if form.end is None else form.end.expand(batch).contiguous()
        first = None if form.first is None else form.first.expand(batch).contiguous()
        nothing = q.new_empty(keys, 0, dtype=torch.promote_types(q.dtype, torch.float32))
        out = ops.window_attention(
            q,
            k[:, keys - rows :],
            v[:, keys - rows :],
            k,
            v,
            start=number(keys - rows, q),
            length=number(rows, q) if end is None else end,
            kv_len=number(keys, q) if end is None else end,
            commit=number(0, q),
            cos=nothing,  # rotated already
            sin=nothing,
            pad=first,
            scale=scale,
            causal=form.causal,
            block_size=form.block_size,
            window=form.window,
            backend=self._options.backend,
        )
        return out.transpose(1, 2)

    def _checked(
        self,
        got: Tensor,
        original: Callable[[], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        form: Form | None,
    ) -> Tensor:
        if self._check is None or self._check.done:
            return got
        used = None
        if form is not None and form.first is not None and form.end is not None:
            row = torch.arange(q.shape[2], device=q.device)
            used = (row >= form.first[:, None]) & (row < form.end[:, None])
            used = used.expand(q.shape[0], -1)[:, None, :, None]

        def exact() -> Tensor:
            wide = None if mask is None else mask
            if wide is not None and wide.is_floating_point():
                wide = wide.double()
            return grouped(q.double(), k.double(), v.double(), wide, causal=causal, scale=scale)

        self._check(got, original(), exact(), used)
        return got


def _shared(states: Tensor) -> bool:
    """Whether two elements are one in memory."""
    return any(s == 0 and n > 1 for s, n in zip(states.stride(), states.shape, strict=True))


def grouped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
) -> Tensor:
    """``scaled_dot_product_attention``, each KV head read once for its group of query heads."""
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
