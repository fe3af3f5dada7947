"""Dream's ``diffusion_generate``, on kernels: a function, or a method of a loaded model.

model.diffusion_generate = types.MethodType(dream.diffusion_generate, model)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm.integrations._board import Board, draw_seed
from pydllm.integrations._dream import (
    Call,
    DreamModelOutput,
    read_call,
    transfer_part,
)
from pydllm.integrations.samplers import sample_tokens
from pydllm.ops import VocabStats

__all__ = ["DreamModelOutput", "diffusion_generate"]

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
Hook = Callable[[int | None, Tensor, Tensor | None], Tensor]


@torch.no_grad()
def diffusion_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: bool = True,
    backend: str | None = None,
    **kwargs: Any,
) -> DreamModelOutput | Tensor:
    """Fill all masks behind the inputs in ``steps`` forwards of the whole sequence.

    Args:
        model: a loaded Dream module, whose weights are shared, or a pydllm model.
        inputs: ``(B, P)`` token ids.
        generation_config: an object with attributes among ``temperature``, ``top_p``, ``top_k``,
            ``max_length``, ``max_new_tokens``, ``eps``, ``steps``, ``alg``, ``alg_temp``,
            ``num_return_sequences``, ``return_dict_in_generate``, ``output_history`` and the token
            ids; Dream's defaults for what it lacks.
        compat: at a temperature or with ``alg_temp``, torch's generator in the original's order:
            the same seed gives the same tokens. False: tokens are drawn in the kernel (the same
            distribution, a function of ``torch.manual_seed``), and the mask is never predicted.
        backend: as in ``pydllm.ops``.
        kwargs: the same names, which go before the config; ``attention_mask (B, P)`` with zeros on
            the left for padding; ``generation_tokens_hook_func(step, x, logits)``, first called
            with step None, and ``generation_logits_hook_func(step, x, logits)``, whose results
            replace ``x`` and the logits ``(B, L, V)``.

    Returns:
        ``(B, max_length)`` int64 on the model's device, or ``DreamModelOutput(sequences, history)``
        where ``return_dict_in_generate`` asks for it. Without hooks, filters and temperature no
        logits are stored and confidences are fp32 (there in the dtype of the logits), so tokens can
        differ where two of them agree to rounding. In a batch whose rows have unequal numbers of
        masks the original also overwrites known tokens with masks; this does not.

    Raises:
        ValueError, TypeError: an unknown argument or value, or lengths that do not fit.
    """
    hooks: dict[str, Hook | None] = {
        "generation_tokens_hook_func": None,
        "generation_logits_hook_func": None,
    }
    call = read_call(
        "diffusion_generate", model, inputs, generation_config, kwargs, hooks, ALGORITHMS
    )
    board = Board.behind(
        call.prompt,
        call.new,
        call.model,
        pad=call.pad,
        banned=[] if compat else [call.settings.mask_token_id or 0],
        backend=backend,
    )
    if not compat:
        board.seed = draw_seed()
    loop = _Loop(call, board, compat)
    history = call.history()
    loop.show(None, None)
    for step in range(call.settings.steps):
        logits = loop.step(step)
        loop.show(step, logits)
        if history is not None:
            history.append(board.x.clone())
    return call.result(board.x, history)


class _Loop:
    """Dream's step: forward, tokens for the masks, and how many of them are written."""

    def __init__(self, call: Call, board: Board, compat: bool) -> None:
        self.board, self.compat, self.settings = board, compat, call.settings
        self.on_tokens: Hook | None = call.options["generation_tokens_hook_func"]
        self.on_logits: Hook | None = call.options["generation_logits_hook_func"]
        settings = call.settings
        filtered = settings.top_k is not None or (settings.top_p or 1) < 1
        # What is drawn in torch is drawn in the dtype of the logits, as there.
        drawn = compat and (settings.temperature > 0 or bool(settings.alg_temp))
        self.hooked = self.on_tokens is not None or self.on_logits is not None
        self.stored = self.hooked or filtered or drawn
        # What is drawn in torch depends on the shape; otherwise masks alone are looked at.
        whole = self.stored or bool(settings.alg_temp)
        self.first = 0 if whole else board.first_mask(board.length)
        self.part = transfer_part(settings, settings.steps, board.x.device)

    def show(self, step: int | None, logits: Tensor | None) -> None:
        if self.on_tokens is not None:
            x = self.on_tokens(step, self.board.x, logits)
            if x is not self.board.x:
                self.board.x = x.to(self.board.x)

    def step(self, step: int) -> Tensor | None:
        """Returns the logits where a hook wants them."""
        board, settings = self.board, self.settings
        masked = board.masked(0, board.length)
        board.forward(0, board.length)
        logits = None
        if self.hooked:
            logits = board.logits(0, board.length)
            if self.on_logits is not None:
                logits = self.on_logits(step, board.x, logits)
        part = self.part(step)
        if settings.alg == "origin":
            self._write_any(masked, part, logits)
            return logits
        token, score = self._propose(masked, logits)
        quota = (masked.sum() / len(masked) * part).int()
        if settings.alg_temp:
            self._write_drawn(masked, token, score, int(quota))
        elif self.stored:
            board.write_top(0, token, score, int(quota))
        else:
            rule = "margin" if settings.alg == "topk_margin" else "quota"
            quota = quota.expand(len(masked)).contiguous()
            board.write(self.first, token, score, rule=rule, quota=quota, semantics="dream")
        return logits

    def _propose(self, masked: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token and confidence of every mask from ``self.first`` on, ``(B, L - self.first)``."""
        settings = self.settings
        margin, entropy = settings.alg == "topk_margin", settings.alg == "entropy"
        if not self.stored:
            stats = self._stats()
            score = -stats.entropy if entropy else stats.margin if margin else stats.prob
            return stats.token, score
        confidence, drawn = self._sample(masked, logits, margin=margin, entropy=entropy)
        token = torch.zeros_like(self.board.x)
        token[masked] = drawn
        score = torch.zeros(masked.shape, dtype=confidence.dtype, device=masked.device)
        score[masked] = confidence
        return token, score

    def _stats(self) -> VocabStats:
        length, temperature = self.board.length, self.settings.temperature
        return self.board.stats(self.first, length, temperature=temperature)

    def _sample(
        self, masked: Tensor, logits: Tensor | None, *, margin: bool = False, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Confidence and token of the masks, in order, from their stored logits."""
        settings = self.settings
        if logits is None:
            logits = self.board.logits(0, self.board.length)
        rows = logits[masked]
        if self.board.banned:
            rows[:, list(self.board.banned)] = -torch.inf
        return sample_tokens(
            rows,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            margin_confidence=margin,
            neg_entropy=entropy,
        )

    def _write_any(self, masked: Tensor, part: Tensor, logits: Tensor | None) -> None:
        """Every mask with the same probability, as in the paper's process."""
        board = self.board
        count = int(masked.sum())
        chosen = masked.clone()
        chosen[masked] = torch.rand(count, device=masked.device) < part
        if self.stored:
            token = torch.zeros_like(board.x)
            token[chosen] = self._sample(chosen, logits)[1]
        else:
            token = F.pad(self._stats().token, (self.first, 0))
        board.x = torch.where(chosen, token, board.x)

    def _write_drawn(self, masked: Tensor, token: Tensor, score: Tensor, count: int) -> None:
        """So many masks drawn by softmax(confidence / alg_temp), without replacement."""
        if count == 0:
            return
        score = score.masked_fill(~masked, -torch.inf) / (self.settings.alg_temp or 1.0)
        index = torch.multinomial(F.softmax(score, -1), count)
        x, mask_id = self.board.x, self.board.mask_id
        new = torch.where(masked, token, mask_id).gather(1, index)
        self.board.x = x.scatter(1, index, new)
