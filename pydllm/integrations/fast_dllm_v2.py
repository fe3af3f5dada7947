"""Fast-dLLM v2's ``generate``, on kernels.

from pydllm.integrations.fast_dllm_v2 import generate  # generate(model, ids, ...)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm.integrations._board import as_model, check_prompt, check_temperature, with_ids
from pydllm.models import Model

__all__ = ["generate"]

_MASK_BLOCK = 32  # of the published denoising forwards, whatever block_size says


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
    mask_id: int = 151665,
    threshold: float = 1,
    small_block_size: int = 8,
    block_size: int = 32,
    stop_token: int = 151645,
    stopping_criteria: Any = None,
    top_p: float = 0.95,
    temperature: float = 0,
    use_block_cache: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Fill blocks from left to right, sub-block by sub-block; keys of finished blocks are cached.

    Args:
        model: a loaded ``Fast_dLLM_QwenForCausalLM``, whose weights are shared, or a pydllm model.
        input_ids: ``(1, P)`` prompt.
        max_new_tokens: ``max_new_tokens // block_size`` blocks are filled, the first of which holds
            the prompt's rest: in all ``max_new_tokens - P % block_size + 1`` tokens, or fewer.
        max_length: instead, P included.
        tokenizer, stopping_criteria: not used, as in the original.
        mask_id: the mask's token id.
        threshold: probability above which a token is written; the best one always is.
        small_block_size: tokens of a sub-block; a divisor of ``block_size``.
        block_size: tokens of a block.
        stop_token: ends the answer, which is cut after it.
        top_p: at temperatures above 0, ids are drawn from the smallest set with this mass.
        temperature: 0 is greedy. Tokens are drawn by torch's generator, as in the original.
        use_block_cache: forward a sub-block alone, over keys of its block's last full forward.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(1, P + new)`` int64 on the model's device. A prompt of exactly one block, which the
        original loses (it answers no prompt, and from ties), is stored like a longer one.

    Raises:
        ValueError, TypeError: an argument out of range.
        PydllmError: the model predicts the mask itself and the loop, as the original's, would not
            end.
    """
    if max_new_tokens is None:
        if max_length is None:
            raise ValueError("max_new_tokens: expected a number, or max_length, got neither")
        max_new_tokens = max_length - input_ids.shape[1]
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("block_size", block_size),
        ("small_block_size", small_block_size),
    ):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    if block_size % small_block_size:
        raise ValueError(
            f"small_block_size: expected a divisor of block_size {block_size}, "
            f"got {small_block_size}"
        )
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold!r}")
    check_temperature(temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    own = as_model(model)
    if not own.spec.shift_logits:
        raise ValueError("generate: expected a model with shifted logits, got one without")
    own = with_ids(
        own,
        mask_id,
        (stop_token,),
        attention="block_causal",
        block_size=block_size,
        block_origin="zero",
        context="block",
    )
    ids = check_prompt("input_ids", input_ids, own, max_new_tokens + 1)
    if len(ids) != 1 or ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected one prompt (1, P), got {tuple(ids.shape)}")
    call = _Call(own, ids, max_new_tokens, small_block_size, use_block_cache, backend)
    call.options = (threshold, temperature, top_p)
    return call.run(max_new_tokens // block_size)


class _Call:
    """One answer: its tokens, the cache, and how much of it is stored."""

    options: tuple[float, float, float]

    def __init__(
        self,
        model: Model,
        ids: Tensor,
        new: int,
        small: int,
        block_cache: bool,
        backend: str | None,
    ) -> None:
        self.model, self.ids, self.prompt = model, ids, ids.shape[1]
        self.small, self.block_cache, self.backend = small, block_cache, backend
        spec, size = model.spec, model.spec.block_size or 1
        self.size, self.stop = size, spec.eos_ids[0]
        self.mask = -1 if spec.mask_id is None else spec.mask_id
        self.cache = model.new_cache(1, -(-(self.prompt + new + 1) // size) * size + size)
        # Denoising forwards have blocks of their own in the mask.
        self.denoiser = with_ids(model, self.mask, spec.eos_ids, block_size=_MASK_BLOCK)
        self.stored = 0

    def run(self, blocks: int) -> Tensor:
        whole = self.prompt // self.size * self.size
        if whole:
            last = self.forward(self.model, self.ids[:, :whole], 0, whole)[:, -1:]
            self.stored = whole
            if whole == self.prompt:
                self.ids = torch.cat((self.ids, last.argmax(-1)), 1)
        for _ in range(blocks):
            if bool((self.ids[:, self.prompt :] == self.stop).any()):
                break
            self.fill_block()
        new = self.ids[0, self.prompt :]
        stops = (new == self.stop).nonzero()
        end = self.prompt + int(stops[0]) + 1 if len(stops) else self.ids.shape[1]
        return self.ids[:, :end]

    def forward(self, model: Model, rows: Tensor, start: int, commit: int, **mask: Any) -> Tensor:
        """Logits of a window from ``start`` on; it sees what is stored before it.

        ``seen``: the end of what is visible, where that is beyond the window.
        """

        def one(value: int) -> Tensor:
            return torch.tensor([value], dtype=torch.int32, device=rows.device)

        seen = mask.pop("seen", start + rows.shape[1])
        hidden = model.forward(
            rows,
            one(start),
            self.cache,
            length=one(rows.shape[1]),
            kv_len=one(seen),
            commit=one(commit),
            backend=self.backend,
            **mask,
        )
        return model.head(hidden)

    def fill_block(self) -> None:
        """Masks up to the block's end, written sub-block by sub-block; then it is stored."""
        known, size = self.ids.shape[1], self.size
        masks = self.ids.new_full((1, size - known % size), self.mask)
        self.ids = torch.cat((self.ids, masks), 1)
        block = self.ids[:, -size:]  # a view
        start, kept = self.stored, False
        for first in range(0, size, self.small):
            part = block[:, first : first + self.small]
            while bool((part == self.mask).any()) and not self.stopped(known):
                if self.block_cache and kept and bool((part[:, 0] != self.mask).all()):
                    logits = self.forward(
                        self.denoiser,
                        part,
                        start + first,
                        self.small,
                        seen=start + size,
                        attention="full",
                    )
                    logits = _shifted(logits)
                else:
                    kept = True
                    commit = size if self.block_cache else 0
                    logits = self.forward(self.denoiser, block, start, commit)
                    logits = _shifted(logits)[:, first : first + self.small]
                self.write(part, logits)
        if not self.stopped(known):
            last = self.forward(self.model, block, start, size)[:, -1:]
            self.stored = start + size
            self.ids = torch.cat((self.ids, last.argmax(-1)), 1)

    def stopped(self, known: int) -> bool:
        """Whether this block has a stop token with no mask before it."""
        new = self.ids[0, known:]
        stops = (new == self.stop).nonzero()
        return bool(len(stops)) and not bool((new[: int(stops[0])] == self.mask).any())

    def write(self, part: Tensor, logits: Tensor) -> None:
        """Every masked token above the threshold, and the best."""
        threshold, temperature, top_p = self.options
        token, prob = _choose(logits, temperature, top_p)
        masked = part == self.mask
        prob = prob.masked_fill(~masked, -torch.inf)
        accepted = prob > threshold
        accepted[0, prob[0].argmax()] = True
        accepted &= masked
        if temperature == 0 and bool((token[accepted] == self.mask).all()):
            raise PydllmError("the model predicts the mask: the loop would not end")
        part[accepted] = token[accepted]


def _shifted(logits: Tensor) -> Tensor:
    return torch.cat((logits[:, :1], logits[:, :-1]), 1)


def _choose(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens ``(1, T)`` and their probabilities, in the dtype of the logits."""
    if temperature == 0:
        prob, token = logits.softmax(-1).max(-1)
        return token, prob
    probs = (logits / temperature).softmax(-1)
    ordered, order = probs.sort(descending=True)
    beyond = ordered.cumsum(-1) > top_p
    beyond[..., 1:] = beyond[..., :-1].clone()
    beyond[..., 0] = False
    probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0)
    probs = probs / probs.sum(-1, keepdim=True)
    token = torch.multinomial(probs[0], 1).T
    return token, probs.gather(-1, token[..., None])[..., 0]
