"""LLaDA's ``generate``, on kernels.

from pydllm.integrations.llada import generate  # instead of LLaDA's generate.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm.decoding.checks import expect
from pydllm.integrations._board import (
    Board,
    check_blocks,
    check_prompt,
    check_temperature,
    draw_seed,
    full_attention,
    left_padding,
)
from pydllm.integrations.samplers import add_gumbel_noise, get_num_transfer_tokens

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    eos_id: int = 126081,
    eot_id: int = 126348,
    compat: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Fill ``gen_length`` masks behind the prompt, block by block, the most confident first.

    Args:
        model: a loaded LLaDA module, whose weights are shared, or a pydllm model.
        prompt: ``(B, P)`` token ids. Masks in it compete with those of the block for its schedule,
            so some may be left, as in the original; ``compat=False`` fills all of them.
        attention_mask: ``(B, P)``, zeros on the left for padding, or None.
        steps: forwards in all, a multiple of the number of blocks.
        gen_length: new tokens, a multiple of ``block_length``.
        block_length: tokens in a block.
        temperature: 0 takes the arg-max; confidences are those of the plain logits.
        cfg_scale: weight of guidance by the same sequence with a masked prompt; 0: none.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_id: the mask's token id.
        logits_eos_inf: never predict ``eos_id``.
        confidence_eos_eot_inf: write ``eos_id`` and ``eot_id`` last.
        eos_id, eot_id: written into the original.
        compat: the original's noise (torch's generator, in its order: the same seed gives the same
            tokens) and its reading of ``confidence_eos_eot_inf``: the probability is that of the
            plain logits without the two ids, at a temperature without ``eot_id`` alone. False:
            noise drawn in the kernel from the logits' one read (the same distribution, a function
            of ``torch.manual_seed``), confidence -inf for the two ids, the mask never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        ``(B, P + gen_length)`` int64 on the model's device. Equal to the original where confidences
        differ by more than rounding: they are fp32 here, in the dtype of the logits there. Where
        the original fails (guidance without an attention mask) guidance is what it says.

    Raises:
        ValueError, TypeError: an argument that the original asserts, or does not know.
    """
    blocks, steps = check_blocks(gen_length, block_length, steps)
    check_temperature(temperature)
    expect("remasking", remasking, ("low_confidence", "random"))
    if not cfg_scale >= 0:
        raise ValueError(f"cfg_scale: expected a number of at least 0, got {cfg_scale!r}")
    own = full_attention(model, "LLaDA's generate", mask_id, shifted=False)
    if logits_eos_inf or confidence_eos_eot_inf:
        vocab = own.spec.vocab_size
        for name, token in (("eos_id", eos_id), ("eot_id", eot_id)):
            if not 0 <= token < vocab:
                raise ValueError(f"{name}: expected a token id in [0, {vocab}), got {token}")
    prompt = check_prompt("prompt", prompt, own, gen_length)
    banned = [eos_id] if logits_eos_inf else []
    board = Board.behind(
        prompt,
        gen_length,
        own,
        pad=left_padding(attention_mask, prompt),
        banned=banned if compat else [*banned, mask_id],
        backend=backend,
    )
    if not compat:
        board.seed = draw_seed()
    last_ids = (eos_id, eot_id) if confidence_eos_eot_inf else ()
    loop = _Loop(board, temperature, remasking, last_ids, compat, cfg_scale)
    for last in range(prompt.shape[1] + block_length, board.length + 1, block_length):
        first = last - block_length
        counted = board.masked(first if compat else 0, last)
        quota = get_num_transfer_tokens(counted, steps).int()
        begin = board.first_mask(last)
        for step in range(steps):
            proposed, score = loop.propose(begin, last)
            if loop.tied:
                loop.write_top(begin, proposed, score, quota[:, step].tolist())
                continue
            random = remasking == "random" and not compat
            board.write(
                begin,
                proposed,
                score,
                rule="random" if random else "quota",
                semantics="exact" if random else "llada",
                quota=quota[:, step].contiguous(),
            )
    return board.x


class _Loop:
    """A forward and what it proposes; with guidance, of two sequences a row."""

    def __init__(
        self,
        board: Board,
        temperature: float,
        remasking: str,
        last_ids: tuple[int, ...],
        compat: bool,
        cfg_scale: float,
    ) -> None:
        self.board, self.temperature, self.remasking = board, temperature, remasking
        self.last_ids, self.compat, self.cfg_scale = last_ids, compat, cfg_scale
        self.stored = cfg_scale > 0 or (compat and temperature > 0)
        if cfg_scale > 0:
            # As in the original, padding counts as prompt.
            self.given = board.x != board.mask_id
            pad = None if board.pad is None else board.pad.repeat(2)
            self.pair = Board(
                board.model, self._unguided(), pad=pad, banned=board.banned, backend=board.backend
            )

    def propose(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Token and confidence ``(B, S)`` of positions [first, last)."""
        board = self.board
        if self.cfg_scale > 0:
            self.pair.x.copy_(self._unguided())
            self.pair.forward(0, board.length)
            board.forwards += 1
        else:
            board.forward(0, board.length)
        token, score = (
            self._from_logits(first, last) if self.stored else self._from_stats(first, last)
        )
        if self.last_ids and not self.compat:
            ends = torch.isin(token, torch.tensor(self.last_ids, device=token.device))
            score = score.masked_fill(ends, -torch.inf)
        if self.remasking == "random" and self.compat:
            score = torch.rand(board.x.shape, device=board.x.device)[:, first:last]
        return token, score

    @property
    def tied(self) -> bool:
        """Whether equal confidences are the rule: those of the ids that are to come last are 0."""
        return bool(self.last_ids) and self.compat and self.remasking == "low_confidence"

    def write_top(self, first: int, token: Tensor, score: Tensor, counts: list[int]) -> None:
        """Write the best masks of each row, of equals those that ``torch.topk`` takes."""
        board, stop = self.board, first + token.shape[1]
        masked = board.masked(first, stop)
        wide = score.new_full(board.x.shape, -torch.inf)
        wide[:, first:stop] = score.masked_fill(~masked, -torch.inf)
        for row, count in enumerate(counts):
            chosen = torch.zeros_like(wide[row], dtype=torch.bool)
            chosen[wide[row].topk(count).indices] = True
            chosen = chosen[first:stop] & masked[row]
            board.x[row, first:stop] = torch.where(chosen, token[row], board.x[row, first:stop])

    def _unguided(self) -> Tensor:
        x = self.board.x
        return torch.cat((x, x.masked_fill(self.given, self.board.mask_id)))

    def _from_stats(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        board = self.board
        stats = board.stats(first, last, temperature=self.temperature)
        if not (self.last_ids and self.compat) or self.remasking == "random":
            return stats.token, stats.prob
        # The original removes the two ids between its arg-max and its softmax.
        rest = board.stats(first, last, banned=self.last_ids)
        return stats.token, torch.where(stats.token == rest.token, rest.prob, 0.0)

    def _from_logits(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        # The original's noise is drawn for all positions.
        board, span = self.board, (0, self.board.length) if self._noisy else (first, last)
        logits = self.pair.logits(*span) if self.cfg_scale > 0 else board.logits(*span)
        if self.cfg_scale > 0:
            guided, unguided = logits.chunk(2)
            logits = unguided + (self.cfg_scale + 1) * (guided - unguided)
        if board.banned:
            logits[..., list(board.banned)] = -torch.inf
        if self.temperature > 0 and not self.compat:
            return self._sampled(logits)
        token = add_gumbel_noise(logits, self.temperature).argmax(-1)
        if self._noisy:
            token, logits = token[:, first:last], logits[:, first:last]
        if self.last_ids and self.compat:
            gone = self.last_ids if self.temperature == 0 else self.last_ids[1:]
            logits[..., list(gone)] = -torch.inf
        prob = logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1)
        return token, prob

    @property
    def _noisy(self) -> bool:
        return self.temperature > 0 and self.compat

    def _sampled(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Guided logits with the kernel's noise."""
        batch, width, vocab = logits.shape
        device = logits.device
        counter = torch.cartesian_prod(
            torch.arange(batch, device=device), torch.arange(width, device=device)
        )
        draw = torch.full_like(counter[:, :1], self.board.forwards)
        counter = torch.cat((counter.flip(1), draw), 1).int()
        stats = ops.vocab_stats(
            logits.reshape(-1, vocab),
            temperature=self.temperature,
            seed=self.board.seed,
            counter=counter,
            backend=self.board.backend,
        )
        return stats.token.view(batch, width), stats.prob.view(batch, width)
