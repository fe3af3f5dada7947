"""Fast-dLLM's loops for LLaDA, on kernels; those for Dream are in ``fast_dllm_dream``.

from pydllm.integrations.fast_dllm import generate_with_dual_cache  # instead of its generate.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm.decoding.checks import expect, expect_number
from pydllm.integrations._board import (
    Board,
    check_blocks,
    check_prompt,
    check_temperature,
    draw_seed,
    full_attention,
    raise_stuck,
)
from pydllm.integrations.samplers import (
    get_num_transfer_tokens,
    get_transfer_index,
    get_transfer_index_dynamic,
)

__all__ = ["generate", "generate_with_dual_cache", "generate_with_prefix_cache"]


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    version: str = "a9b81e4",
    compat: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """Fill masks block by block, every forward over the whole sequence.

    Args:
        model: a loaded LLaDA module, whose weights are shared, or a pydllm model.
        prompt: ``(B, P)`` token ids, not padded. The original takes one sequence; several are
            decoded side by side, each as if alone, until the last has finished a block. Masks in it
            compete with those of the block, so some may be left, as in the original;
            ``compat=False`` fills all of them.
        steps: a multiple of the number of blocks; the schedule where there is neither a threshold
            nor a factor.
        gen_length: new tokens, a multiple of ``block_length``.
        block_length: tokens in a block.
        temperature: 0 takes the arg-max; confidences are those of the plain logits.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_id: the mask's token id.
        threshold: write every token with this probability, and at least one.
        factor: write rank r while its probability is at least ``1 - factor / (r + 1)``; goes before
            ``threshold``.
        version: the commit of NVlabs/Fast-dLLM that is followed: ``"a9b81e4"`` (May 2026) or
            ``"24cc59e"`` (June 2025). In the first the dual cache ends a block after its steps,
            with a threshold or a factor too, and leaves masks where some are left; in the second a
            block that is complete after its first forward costs one more where there is a cache.
        compat: what the version does, with the original's noise (torch's generator, in its order).
            False: no such forward and no such masks, noise is drawn in the kernel, and the mask is
            never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``x (B, P + gen_length)`` int64 on the model's device, and the forwards. Confidences are
        fp32 (fp64 there), so tokens can differ where two of them, or one and the threshold, agree
        to rounding.

    Raises:
        ValueError, TypeError: an argument that the original asserts, or does not know.
        PydllmError: the model predicts nothing but masks; the original does not return then.
    """
    return _decode(
        model,
        prompt,
        (gen_length, block_length, steps),
        _Rule(temperature, remasking, threshold, factor, version, compat),
        mask_id,
        "none",
        backend,
    )


@torch.no_grad()
def generate_with_prefix_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    version: str = "a9b81e4",
    compat: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """``generate``, where keys and values before a block are those of the block's first forward."""
    return _decode(
        model,
        prompt,
        (gen_length, block_length, steps),
        _Rule(temperature, remasking, threshold, factor, version, compat),
        mask_id,
        "prefix",
        backend,
    )


@torch.no_grad()
def generate_with_dual_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    version: str = "a9b81e4",
    compat: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """``generate``, where only the block is recomputed; all around it is of its first forward."""
    return _decode(
        model,
        prompt,
        (gen_length, block_length, steps),
        _Rule(temperature, remasking, threshold, factor, version, compat),
        mask_id,
        "dual",
        backend,
    )


class _Rule:
    """How a step chooses."""

    def __init__(
        self,
        temperature: float,
        remasking: str,
        threshold: float | None,
        factor: float | None,
        version: str,
        compat: bool,
    ) -> None:
        check_temperature(temperature)
        expect("version", version, ("a9b81e4", "24cc59e"))
        expect("remasking", remasking, ("low_confidence", "random"))
        for name, limit in (("threshold", threshold), ("factor", factor)):
            if limit is not None:
                expect_number(name, limit, 0.0, float("inf"))
        self.temperature, self.remasking, self.compat = temperature, remasking, compat
        self.threshold, self.factor, self.version = threshold, factor, version
        self.stored = compat and (temperature > 0 or remasking == "random")
        self.old = version == "24cc59e" and compat
        self.new = version == "a9b81e4" and compat

    @property
    def scheduled(self) -> bool:
        return self.threshold is None and self.factor is None

    def apply(
        self, board: Board, start: int, last: int, window: tuple[int, int], quota: Tensor
    ) -> None:
        """Write what the forward of ``window`` decides of the masks in [start, last)."""
        if self.stored:
            return self._apply_stored(board, last, window, quota)
        stats = board.stats(start, last, temperature=self.temperature)
        score = stats.prob
        if self.remasking == "random":  # one draw per position, as a confidence
            score = torch.rand(score.shape, device=score.device)
        options: dict[str, Any] = {"rule": "quota", "quota": quota}
        if self.factor is not None:
            options = {"rule": "factor", "factor": float(self.factor)}
        elif self.threshold is not None and self.threshold <= 1:
            options = {"rule": "threshold", "threshold": float(self.threshold)}
        elif self.threshold is not None:  # no confidence exceeds 1: the best alone remains
            options["quota"] = torch.ones_like(quota)
        board.write(start, stats.token, score, semantics="fast_dllm", **options)

    def _apply_stored(
        self, board: Board, last: int, window: tuple[int, int], quota: Tensor
    ) -> None:
        logits, (start, stop) = board.logits(*window), window
        masked = board.masked(start, stop)
        masked[:, last - start :] = False
        x = board.x[:, start:stop]
        arguments = (logits, self.temperature, self.remasking, masked, x)
        if self.factor is not None:
            token, chosen = get_transfer_index_dynamic(*arguments, factor=self.factor)
        else:
            token, chosen = get_transfer_index(
                *arguments, quota, self.threshold, version=self.version
            )
        board.x[:, start:stop] = torch.where(chosen, token, x)


def _decode(
    model: Any,
    prompt: Tensor,
    lengths: tuple[int, int, int],
    rule: _Rule,
    mask_id: int,
    cache: str,
    backend: str | None,
) -> tuple[Tensor, int]:
    gen_length, block_length, _ = lengths
    _, steps = check_blocks(*lengths)
    own = full_attention(model, "Fast-dLLM's generate", mask_id, shifted=False)
    prompt = check_prompt("prompt", prompt, own, gen_length)
    board = Board.behind(
        prompt,
        gen_length,
        own,
        cached=cache != "none",
        banned=[] if rule.compat else [mask_id],
        backend=backend,
    )
    if not rule.compat:
        board.seed = draw_seed()
    for first in range(prompt.shape[1], board.length, block_length):
        last = first + block_length
        begin, step = board.first_mask(last), 0
        # The originals count the masks of the block; those of the prompt may be left.
        low = first if rule.compat else min(begin, first)
        quota = get_num_transfer_tokens(board.masked(low, last), steps).int()
        left, all_left = board.masks_left((low, last), (0, last))
        once = rule.compat and (cache != "none" or rule.new)  # the first forward is always run
        twice = rule.old and cache != "none"
        while left or (once and step == 0) or (twice and step == 1):
            if rule.new and cache == "dual" and step >= max(steps, 1):
                break
            before = all_left
            window = _forward(board, cache, low, last, step, rule)
            start = begin if cache == "none" or step == 0 else low
            # Behind the schedule's end only masks that were predicted are left, one a step.
            now = quota[:, step] if step < steps else torch.ones_like(quota[:, 0])
            rule.apply(board, start, last, window, now.contiguous())
            left, all_left = board.masks_left((low, last), (0, last))
            step += 1
            stuck = left > 0 and all_left == before and rule.temperature == 0
            ends = rule.new and cache == "dual"
            if stuck and not ends and not (rule.scheduled and step <= steps):
                raise_stuck()
    return board.x, board.forwards


def _forward(
    board: Board, cache: str, first: int, last: int, step: int, rule: _Rule
) -> tuple[int, int]:
    """Returns the window that was computed."""
    length = board.length
    if cache == "none" or step == 0:
        board.forward(0, length, commit=0 if cache == "none" else length)
        return 0, length
    stop = last if cache == "dual" else length
    board.forward(first, stop, seen=length)
    if cache == "prefix" and rule.compat and rule.temperature > 0:
        # The original draws the noise of these steps twice and uses the second.
        shape = (*board.x[:, first:].shape, board.model.spec.vocab_size)
        torch.rand(shape, dtype=torch.float64, device=board.x.device)
    return first, stop
