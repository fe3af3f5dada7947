"""SDAR's and TraDo's ``block_diffusion_generate``, on kernels.

from pydllm.integrations.sdar import block_diffusion_generate  # instead of SDAR's generate.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm.decoding.checks import expect, expect_int, expect_number
from pydllm.integrations._board import (
    Board,
    as_model,
    check_prompt,
    check_temperature,
    draw_seed,
    with_ids,
)
from pydllm.integrations._drawing import Drawn, check_filters, draw
from pydllm.integrations.samplers import MAX_STEPS

__all__ = ["block_diffusion_generate"]

STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bounded")


@torch.no_grad()
def block_diffusion_generate(
    model: Any,
    prompt: Mapping[str, Tensor],
    mask_id: int,
    gen_length: int = 128,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    eb_threshold: float | None = None,
    stopping_criteria_idx: Sequence[int] | None = None,
    *,
    compat: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Fill the blocks behind the prompt one after the other, keys of finished blocks cached.

    Args:
        model: a loaded SDAR module, whose weights are shared, or a pydllm model with block-causal
            attention.
        prompt: has ``input_ids (1, P)``.
        mask_id: the mask's token id.
        gen_length: new tokens; rounded up to whole blocks of the whole sequence.
        block_length: tokens in a block, for this call whatever the model's own is.
        denoising_steps: of a block: the schedule, and the least number of tokens a step writes.
        temperature: of tokens and confidences; 0, on which the original fails, is greedy.
        top_k: only so many ids count; 0: all.
        top_p: of these only the best with this mass.
        remasking_strategy: ``"low_confidence_dynamic"``: all above ``confidence_threshold``, at
            least the schedule's number; ``"low_confidence_static"``: the schedule's number;
            ``"sequential"``: from the left; ``"entropy_bounded"``: the lowest entropies whose sum
            stays below ``eb_threshold``, at least one (here the original fails).
        confidence_threshold: see there.
        eb_threshold: nats, see there.
        stopping_criteria_idx: ids that end the generation with the block they are in.
        compat: tokens drawn by torch's generator as in the original: the same seed gives the same
            tokens. And its defect: a schedule that asks for more tokens than a block has masks, as
            in the first block behind a prompt that fills a part of it, overwrites known tokens,
            of the prompt too. False: drawn in the kernel, logits not stored unless filters need
            them (the same distribution, a function of ``torch.manual_seed``), known tokens stay,
            and the mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(1, T)`` int64 on the model's device, T a multiple of ``block_length``; behind a block
        that ended the generation masks. A finished block's keys are stored by the next block's
        first forward: one forward a block fewer than the original.

    Raises:
        ValueError, TypeError: an argument out of range.
        PydllmError: masks are left behind the schedule's end because the model predicts them; the
            original fails then.
    """
    for name, number in (("gen_length", gen_length), ("block_length", block_length)):
        expect_int(name, number, 1)
    expect_int("denoising_steps", denoising_steps, 1)
    check_temperature(temperature)
    check_filters(top_k, top_p)
    expect("remasking_strategy", remasking_strategy, STRATEGIES)
    expect_number("confidence_threshold", confidence_threshold, 0.0, float("inf"))
    if remasking_strategy == "entropy_bounded":
        expect_number("eb_threshold", eb_threshold, 0.0, float("inf"))
    own = as_model(model)
    if own.spec.attention != "block_causal":
        raise ValueError(
            "block_diffusion_generate: expected a model with block-causal attention, "
            f"got {own.spec.attention}"
        )
    own = with_ids(own, mask_id, block_size=block_length)
    ids = check_prompt("prompt['input_ids']", prompt["input_ids"], own, gen_length)
    if len(ids) != 1:
        raise ValueError(f"prompt: expected one sequence, (1, P), got {tuple(ids.shape)}")
    total = -(-(ids.shape[1] + gen_length) // block_length) * block_length
    check_prompt("prompt['input_ids']", ids, own, total - ids.shape[1])
    banned = [] if compat else [mask_id]
    board = Board.behind(
        ids, total - ids.shape[1], own, cached=True, banned=banned, backend=backend
    )
    if not compat:
        board.seed = draw_seed()
    options, noisy = (temperature, top_k, top_p), compat and temperature > 0
    quotas = spread(block_length, denoising_steps)
    stops = None
    if stopping_criteria_idx is not None:
        stops = torch.tensor(list(stopping_criteria_idx), device=own.device)
    for forwards in each_block(board, ids.shape[1], block_length):
        for step, first in enumerate(forwards):
            if step > denoising_steps + block_length:
                raise PydllmError(
                    "the model predicts masks, and the schedule ends with some of them left; "
                    "compat=False does not allow the prediction"
                )
            quota = quotas[step] if step < denoising_steps else 1
            drawn = propose(board, first, first + block_length, options, compat)
            if remasking_strategy == "low_confidence_dynamic":
                write_confident(
                    board,
                    first,
                    drawn,
                    confidence_threshold,
                    quota,
                    published=noisy,
                    masks_only=False,
                )
            elif remasking_strategy == "low_confidence_static" and noisy:
                board.write_top(first, drawn.token, drawn.prob, quota, masks_only=False)
            else:
                score, rule = _rule(remasking_strategy, drawn, board, quota, eb_threshold)
                board.write(first, drawn.token, score, **rule)
        if stops is not None and bool(torch.isin(board.x[:, ids.shape[1] :], stops).any()):
            break
    return board.x


def spread(block_length: int, steps: int) -> list[int]:
    """The tokens of a block over its steps, the remainder first."""
    if steps > MAX_STEPS:
        raise ValueError(f"steps: expected at most {MAX_STEPS}, got {steps}")
    return [block_length // steps + (step < block_length % steps) for step in range(steps)]


def each_block(board: Board, prompt_length: int, size: int) -> Iterator[Iterator[int]]:
    """For every block that is not all prompt an iterator of its forwards, while masks are left.

    The first forward of a block also stores the keys of what lies before it and is complete.
    """
    start = 0

    def forwards(first: int) -> Iterator[int]:
        nonlocal start
        last = first + size
        while board.masks_left((first, last))[0]:
            board.forward(start, last, seen=last, commit=first - start)
            start = first
            yield first

    for first in range(prompt_length // size * size, board.length, size):
        yield forwards(first)


def propose(board: Board, first: int, last: int, options: tuple, compat: bool) -> Drawn:
    """Tokens for a block from the last forward; ``options``: temperature, top_k, top_p."""
    temperature, top_k, top_p = options
    # The two filters of the op look at the whole row each, those of the original one after the
    # other; and it keeps all rows, where the noise is torch's.
    filtered = temperature > 0 and (bool(top_k) or (top_p or 1.0) < 1)
    if not filtered and not (compat and temperature > 0):
        stats = board.stats(first, last, temperature=temperature, tempered=temperature > 0)
        return Drawn(stats.token, stats.prob, stats.entropy)
    logits = board.logits(first, last)
    if board.banned:
        logits[..., list(board.banned)] = -torch.inf
    return draw(logits, temperature, top_k, top_p)


def write_confident(
    board: Board,
    first: int,
    drawn: Drawn,
    threshold: float,
    quota: int,
    *,
    published: bool,
    masks_only: bool = True,
) -> None:
    """Write the masks whose confidence exceeds the threshold, at least ``quota``.

    ``published``: of equal confidences take those that ``torch.topk`` takes, as filters make many;
    and ``masks_only`` as in ``Board.write_top``.
    """
    if published and quota:
        sure = board.masked(first, first + drawn.prob.shape[1]) & (drawn.prob > threshold)
        if int(sure.sum()) < quota:
            token, prob = drawn.token, drawn.prob
            return board.write_top(first, token, prob, quota, masks_only=masks_only)
    board.write(
        first,
        drawn.token,
        drawn.prob,
        rule="threshold",
        semantics="diffusers",
        threshold=min(float(threshold), 1.0),
        min_tokens=torch.full_like(board.nfe, quota),
    )


def _rule(
    strategy: str, drawn: Drawn, board: Board, quota: int, bound: float | None
) -> tuple[Tensor, dict[str, Any]]:
    if strategy == "entropy_bounded":
        rule = {"rule": "entropy_bound", "semantics": "jetengine", "bound": float(bound or 0.0)}
        return drawn.entropy, rule
    name = "left_to_right" if strategy == "sequential" else "quota"
    number = torch.full_like(board.nfe, quota)
    return drawn.prob, {"rule": name, "semantics": "jetengine", "quota": number}
