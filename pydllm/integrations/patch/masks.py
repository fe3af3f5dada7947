"""What a dense attention mask says, in the words of ``window_attention``; asked once a mask."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_KEPT = 8  # masks remembered; a forward has one or two
_TRIES = 4  # analyses before their share of the calls counts


@dataclass(frozen=True)
class Form:
    """A mask that ``window_attention`` has arguments for.

    Attributes:
        first, end: ``(B,)`` int32, the tokens of each row that are no padding; None: all are.
        causal, block_size, window: as in ``window_attention``.
    """

    first: Tensor | None = None
    end: Tensor | None = None
    causal: bool = False
    block_size: int | None = None
    window: int | None = None


DENSE, CAUSAL, BLOCKS = Form(), Form(causal=True), Form(block_size=1)


class Masks:
    """The forms of the masks that a model's layers are called with.

    A mask is looked at once: the answer is kept for as long as its storage lives and is not
    written, so all layers of a forward, and all steps that reuse a mask, share one look and its one
    wait for the device. A model that makes its masks anew in every layer is found out after a few
    and its masks are not looked at any more; nor are any under ``torch.compile`` or in the capture
    of a CUDA graph, where the host cannot know a value.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple, tuple[StorageWeakRef, Form | None]] = {}
        self.calls = self.looks = 0
        self._given_up = False

    def form(
        self, mask: Tensor, rows: int, keys: int, block_size: int | None, window: int | None
    ) -> Form | None:
        """The form of ``mask`` over ``rows`` queries at the end of ``keys`` keys; None: unknown."""
        if torch.compiler.is_compiling() or mask.is_inference() or _capturing(mask):
            return None
        storage = mask.untyped_storage()
        key = (
            storage._cdata,
            mask.storage_offset(),
            tuple(mask.shape),
            mask.stride(),
            mask.dtype,
            mask._version,
            (rows, keys, block_size, window),
        )
        with self._lock:
            self.calls += 1
            held = self._known.get(key)
            if held is not None and not held[0].expired():
                return held[1]
            if self.looks > _TRIES and 2 * self.looks > self.calls:
                self._given_up = True
            if self._given_up:
                return None
            self.looks += 1
        form = read(mask, rows, keys, block_size, window)
        with self._lock:
            for old in [k for k, (ref, _) in self._known.items() if ref.expired()]:
                del self._known[old]
            while len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            self._known[key] = (StorageWeakRef(storage), form)
        return form


def _capturing(mask: Tensor) -> bool:
    return mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def read(
    mask: Tensor, rows: int, keys: int, block_size: int | None = None, window: int | None = None
) -> Form | None:
    """The form of a mask; waits for the device once.

    Args:
        mask: ``(B or 1, 1, T or 1, S)`` or ``(T, S)``; bool, True is visible, or additive: 0 is
            visible, the dtype's lowest number or -inf hidden. A mask that adds anything else has
            no form.
        rows: T; the queries are those of the last T keys.
        keys: S.
        block_size: of the model, tried where T is below S; otherwise the mask tells.
        window: of the model, tried.

    Rows that see nothing and rows of padding may differ from the mask: they give zeros.
    """
    if mask.ndim == 2:
        mask = mask[None, None]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != keys or rows > keys:
        return None
    if mask.shape[2] not in (1, rows):
        return None
    sane = torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dtype == torch.bool:
        seen = mask[:, 0]
    elif mask.is_floating_point():
        seen = mask[:, 0] == 0
        sane = (seen | (mask[:, 0] <= torch.finfo(mask.dtype).min / 2)).all()
    else:
        return None
    seen = seen.expand(-1, rows, -1)  # (B, T, S)
    key = torch.arange(keys, device=mask.device)
    query = key[keys - rows :, None]
    causal = key <= query
    tries: list[tuple[Form, Tensor]] = [(DENSE, torch.ones_like(causal)), (CAUSAL, causal)]
    # Row 0 of a block-causal mask sees one block.
    block = seen[:1, 0].sum().clamp(min=1) if rows == keys else key.new_tensor(block_size or 1)
    tries.append((BLOCKS, key // block <= query // block))
    if window is not None:
        tries.append((Form(causal=True, window=window), causal & (query - key < window)))
    any_key = seen.any(1)
    first = any_key.int().argmax(1)
    end = keys - any_key.flip(1).int().argmax(1)
    run = (key >= first[:, None]) & (key < end[:, None])  # (B, S)
    if rows < keys:  # the queries' own keys are seen: where the queries stand does not matter
        fits = ((first <= keys - rows) & (end == keys)).all()
        tries.append((Form(first=first.int()), run[:, None] & fits))
    else:
        inside = run[:, None] & run[:, :, None]
        padded, both = Form(first.int(), end.int()), Form(first.int(), end.int(), causal=True)
        tries.append((padded, run[:, None].expand_as(seen)))
        tries.append((padded, inside))
        tries.append((both, causal & run[:, None]))
        tries.append((both, causal & inside))
    flags = [sane & (seen == wanted).all() for _, wanted in tries]
    size, *answers = torch.stack([block, *(flag.to(block.dtype) for flag in flags)]).tolist()
    form = next((form for (form, _), fit in zip(tries, answers, strict=True) if fit), None)
    return Form(block_size=size) if form is BLOCKS else form
