"""Fast-dLLM's ``diffusion_generate`` for Dream, the block form with a cache, on kernels.

model.diffusion_generate = types.MethodType(fast_dllm_dream.diffusion_generate, model)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm.decoding.checks import expect_number
from pydllm.integrations._board import Board, draw_seed, raise_stuck
from pydllm.integrations._dream import (
    Call,
    DreamModelOutput,
    read_call,
    transfer_part,
)
from pydllm.integrations.samplers import sample_tokens

__all__ = ["DreamModelOutput", "diffusion_generate"]

# The published loop knows two rules: this one, and by any other name the entropy's.
ALGORITHMS = ("confidence_threshold", "entropy", "origin", "maskgit_plus", "topk_margin")


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
    """Fill the masks behind the inputs block by block, over cached keys and values.

    Args:
        model: a loaded Dream module, whose weights are shared, or a pydllm model.
        inputs: ``(B, P)`` token ids, not padded. With ``"confidence_threshold"`` the original takes
            one sequence; several are decoded side by side, each as if alone.
        generation_config: as in ``pydllm.integrations.dream``. ``alg`` is
            ``"confidence_threshold"``, or any of Dream's names for the lowest entropy first on
            Dream's schedule, or drawn by ``alg_temp``.
        compat: what decides tokens in the original: the first token of a block is taken from the
            block's first forward, whatever its confidence; the others are predicted by a window
            that begins with the block; with ``steps`` equal to the number of blocks nothing but the
            first token is written; and at a temperature torch's generator in its order. False: the
            window starts one token early and every token is chosen by its confidence, noise is
            drawn in the kernel, the mask is never predicted, and the last step of a block writes
            what is left.
        backend: as in ``pydllm.ops``.
        kwargs: the config's names, and ``threshold=0.9``, ``block_length=32`` (None: one block) and
            ``dual_cache=False``; ``attention_mask`` of ones.

    Returns:
        As ``pydllm.integrations.dream.diffusion_generate``; ``history`` stays empty, as there.
        The filters and the confidences in the dtype of the logits as there, or fp32 without them.

    Raises:
        ValueError, TypeError: an unknown argument or value, lengths that do not fit, or padding,
            which the original masks wrongly once keys are cached.
        PydllmError: the model predicts nothing but masks; the original does not return then.
    """
    options = {"threshold": 0.9, "block_length": 32, "dual_cache": False}
    call = read_call(
        "diffusion_generate", model, inputs, generation_config, kwargs, options, ALGORITHMS
    )
    if call.pad is not None:
        raise ValueError("attention_mask: expected ones (no padding with a cache), got zeros")
    size = call.options["block_length"]
    size = call.new if size is None else size
    if not isinstance(size, int) or size < 1 or call.new % size:
        raise ValueError(f"block_length: expected a divisor of the {call.new} new, got {size!r}")
    blocks = call.new // size
    if call.settings.steps % blocks:
        raise ValueError(
            f"steps: expected a multiple of the {blocks} blocks, got {call.settings.steps}"
        )
    expect_number("threshold", call.options["threshold"], 0.0, float("inf"))
    board = Board.behind(
        call.prompt,
        call.new,
        call.model,
        cached=True,
        banned=[] if compat else [call.settings.mask_token_id or 0],
        backend=backend,
    )
    if not compat:
        board.seed = draw_seed()
    loop = _Loop(call, board, size, call.settings.steps // blocks, compat)
    for first in range(call.prompt.shape[1], board.length, size):
        loop.fill(first)
    return call.result(board.x, call.history())


class _Loop:
    def __init__(self, call: Call, board: Board, size: int, steps: int, compat: bool) -> None:
        self.board, self.size, self.steps, self.compat = board, size, steps, compat
        self.settings, self.dual = call.settings, call.options["dual_cache"]
        self.threshold = float(call.options["threshold"])
        self.by_threshold = call.settings.alg == "confidence_threshold"
        settings = call.settings
        filtered = settings.top_k is not None or (settings.top_p or 1) < 1
        self.alg_temp = 0.0 if self.by_threshold else float(settings.alg_temp or 0.0)
        # What is drawn in torch is drawn in the dtype of the logits, as there.
        self.stored = filtered or (compat and (settings.temperature > 0 or self.alg_temp > 0))
        self.part = transfer_part(settings, steps, board.x.device)

    def fill(self, first: int) -> None:
        board, last = self.board, first + self.size
        board.forward(0, board.length, commit=board.length)
        if self.compat:
            board.x[:, first] = self._first_token(first)
        else:
            self._accept(first, last, 0)
        # The window ends with the block or with the sequence and, if it may, starts a token early.
        start, stop = first - int(not self.compat), last if self.dual else board.length
        step = 1
        (left,) = board.masks_left((first, last))
        while left or (self.compat and step == 1):
            board.forward(start, stop, seen=board.length)
            if not self.by_threshold and step == self.steps and self.compat:
                return
            self._accept(first, last, step)
            before, (left,) = left, board.masks_left((first, last))
            if self.by_threshold and left == before > 0 and self.settings.temperature == 0:
                raise_stuck()
            step += 1

    def _first_token(self, first: int) -> Tensor:
        board = self.board
        if not self.stored:
            return board.stats(first, first + 1).token[:, 0]
        if self.settings.temperature == 0:
            return self._sample(board.logits(first, first + 1)).token[:, 0]
        # The original draws a token for every position.
        return self._sample(board.logits(0, board.length)).token[:, first]

    def _sample(self, logits: Tensor) -> _Drawn:
        if self.board.banned:
            logits[..., list(self.board.banned)] = -torch.inf
        settings = self.settings
        confidence, token = sample_tokens(
            logits,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            neg_entropy=not self.by_threshold,
        )
        return _Drawn(token, confidence)

    def _propose(self, first: int, last: int) -> _Drawn:
        board = self.board
        if not self.stored:
            stats = board.stats(first, last, temperature=self.settings.temperature)
            return _Drawn(stats.token, stats.prob if self.by_threshold else -stats.entropy)
        # The rows that the original hands to its sampler: by threshold those of all masks.
        end = last
        if self.by_threshold and self.compat and not self.dual:
            end = board.length
        masked = board.masked(first, end)
        drawn = self._sample(board.logits(first, end)[masked])
        token = torch.zeros_like(board.x[:, first:end])
        token[masked] = drawn.token
        score = torch.zeros(masked.shape, dtype=drawn.score.dtype, device=masked.device)
        score[masked] = drawn.score
        return _Drawn(token[:, : last - first], score[:, : last - first])

    def _accept(self, first: int, last: int, step: int) -> None:
        board = self.board
        masked = board.masked(first, last)
        drawn = self._propose(first, last)
        stop = last if self.dual else board.length
        if self.by_threshold and self.stored:
            return self._write_ranked(first, stop, drawn, masked)
        if self.by_threshold:
            options: dict[str, Any] = {"rule": "threshold", "threshold": min(self.threshold, 1.0)}
            if self.threshold > 1:
                options = {"rule": "quota", "quota": torch.ones_like(board.nfe)}
            board.write(first, drawn.token, drawn.score, semantics="fast_dllm", **options)
            return
        quota = (masked.sum() / len(masked) * self.part(step)).int()
        if self.alg_temp:
            return self._write_drawn(first, stop, drawn, masked, int(quota))
        if self.stored:
            board.write_top(first, drawn.token, drawn.score, int(quota), width=stop - first)
            return
        quota = quota.expand(len(masked)).contiguous()
        board.write(first, drawn.token, drawn.score, rule="quota", quota=quota, semantics="dream")

    def _write_ranked(self, first: int, stop: int, drawn: _Drawn, masked: Tensor) -> None:
        """The best mask and all above the threshold. Of equal confidences, as filters make many,
        the best is the one that ``torch.topk`` puts first."""
        window = self.board.x[:, first : first + masked.shape[1]]
        wide = self._wide(drawn, masked, stop - first)
        for row, count in enumerate(masked.sum(1).tolist()):
            if count:
                best, index = wide[row].topk(count)
                index = index[(best >= self.threshold).index_fill(0, index.new_zeros(1), True)]
                window[row, index] = drawn.token[row, index]

    def _write_drawn(
        self, first: int, stop: int, drawn: _Drawn, masked: Tensor, count: int
    ) -> None:
        """``count`` masks drawn by softmax(confidence / alg_temp), without replacement."""
        if count == 0:
            return
        wide = self._wide(drawn, masked, stop - first)
        index = torch.multinomial((wide / self.alg_temp).softmax(-1), count)
        window = self.board.x[:, first : first + masked.shape[1]]
        window.scatter_(1, index, drawn.token.gather(1, index))

    @staticmethod
    def _wide(drawn: _Drawn, masked: Tensor, width: int) -> Tensor:
        """Confidences of the whole window, -inf where nothing is to be written."""
        score = drawn.score.masked_fill(~masked, -torch.inf)
        return F.pad(score, (0, width - score.shape[1]), value=-torch.inf)


class _Drawn:
    """Token and confidence of rows."""

    def __init__(self, token: Tensor, score: Tensor) -> None:
        self.token, self.score = token, score
