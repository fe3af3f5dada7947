"""The block schedulers of diffusers, on kernels: same configuration, methods and outputs.

    from pydllm.integrations.diffusers import BlockRefinementScheduler
    pipe.scheduler = BlockRefinementScheduler.from_config(pipe.scheduler.config)

diffusers is not imported. What a scheduler draws comes from ``torch`` and the ``generator`` it is
given, in the order of the original; ``compat=None`` in ``step`` draws in the kernel instead, from
the same distribution, with a seed from that generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pydllm._checks import check_choice, check_int, check_number
from pydllm.integrations._arguments import check_temperature, follows
from pydllm.integrations._outputs import Output
from pydllm.integrations._published import spread
from pydllm.integrations._rules import above, within
from pydllm.integrations._sampling import Drawn, check_filters
from pydllm.integrations._scheduling import Config, Scheduler, check_step, propose

__all__ = [
    "BlockRefinementScheduler",
    "BlockRefinementSchedulerOutput",
    "EntropyBoundScheduler",
    "EntropyBoundSchedulerOutput",
]


@dataclass
class BlockRefinementSchedulerOutput(Output):
    """``(B, T)`` each: tokens after the step, what was written and what was edited (bool), tokens
    and probabilities that were proposed; and the logits ``(B, T, V)`` as they came."""

    prev_sample: Tensor
    transfer_index: Tensor
    editing_transfer_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor


@dataclass
class EntropyBoundSchedulerOutput(Output):
    """``(B, T)`` each: tokens after the step, what was accepted (bool), tokens and probabilities
    that were proposed; and the logits ``(B, T, V)`` divided by the step's temperature."""

    prev_sample: Tensor
    accepted_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor


class BlockRefinementScheduler(Scheduler):
    """Commit what is confident, at least the schedule's number; edit what was committed.

    Args:
        block_length: tokens in a block.
        num_inference_steps: steps of a block, over which its tokens are spread.
        threshold: a probability to exceed.
        editing_threshold: a probability above which a committed token is replaced by another; None,
            0 or less: never.
        minimal_topk: kept in the configuration, not read, as in the original.
    """

    def __init__(
        self,
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float = 0.95,
        editing_threshold: float | None = None,
        minimal_topk: int = 1,
    ) -> None:
        self.config = Config(
            block_length=block_length,
            num_inference_steps=num_inference_steps,
            threshold=threshold,
            editing_threshold=editing_threshold,
            minimal_topk=minimal_topk,
        )
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1)
        self._schedule: list[int] | None = None
        self._committed: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        block_length: int | None = None,
    ) -> None:
        """Spread a block, the configuration's or ``block_length`` tokens, over so many steps."""
        block_length = self.config.block_length if block_length is None else block_length
        check_int("num_inference_steps", num_inference_steps, 1)
        check_int("block_length", block_length, 1)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self._schedule = spread(block_length, num_inference_steps)
        self._committed = None

    def get_num_transfer_tokens(self, block_length: int, num_inference_steps: int) -> Tensor:
        """``(num_inference_steps,)`` int64, tokens a step, the remainder first."""
        steps = max(num_inference_steps, 0)
        return torch.tensor(spread(block_length, steps) if steps else [], dtype=torch.int64)

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        compat: str | None = "diffusers",
        backend: str | None = None,
    ) -> BlockRefinementSchedulerOutput | tuple[Tensor, ...]:
        """Propose a token for every position, commit and edit.

        Args:
            model_output: ``(B, T, V)`` logits.
            timestep: index of the step within the block, from 0.
            sample: ``(B, T)`` int64 tokens, masks where nothing is committed.
            mask_token_id: the mask's id. None: there is none; what is not committed, which the
                scheduler remembers from ``timestep`` 0 on, is replaced by random ids.
            temperature: 0 proposes the arg-max with its plain probability.
            top_p, top_k: filters at a temperature, ``top_k`` first.
            sampling_method: ``"auto"``, ``"greedy"`` or ``"multinomial"``, which a temperature of 0
                makes greedy.
            threshold, editing_threshold: instead of the configuration's.
            minimal_topk: not read, as in the original.
            prompt_mask: ``(T,)`` bool, positions that are never edited.
            generator: of all that is drawn.
            return_dict: False: a tuple in the order of the fields.
            compat: see the module.
            backend: as in ``pydllm.ops``.

        Raises:
            ValueError, TypeError: shapes that do not fit, a number out of range, an unknown method.
        """
        check_choice("sampling_method", sampling_method, ("auto", "greedy", "multinomial"))
        check_temperature(temperature)
        check_filters(top_k, top_p)
        check_step(model_output, sample)
        config = self.config
        threshold = config.threshold if threshold is None else threshold
        check_number("threshold", threshold, -math.inf, infinite=True)
        if editing_threshold is None:
            editing_threshold = config.editing_threshold
        method = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if sampling_method == "greedy":
            method["temperature"] = 0.0
        drawn = propose(model_output, method, generator, follows(compat, "diffusers"), backend)
        if mask_token_id is None:
            outputs = self._step_without_mask(
                drawn, int(timestep), sample, editing_threshold, threshold
            )
            written, edited, keep = outputs
            random = torch.randint(
                model_output.shape[-1], sample.shape, device=sample.device, generator=generator
            )
            tokens = torch.where(written | edited, drawn.token, sample)
            tokens = torch.where(keep, tokens, random)
        else:
            active = sample == mask_token_id
            written = torch.zeros_like(active)
            if self._schedule is not None:
                number = self._schedule[min(int(timestep), len(self._schedule) - 1)]
                least = torch.full_like(sample[:, :1], number)
                written = above(drawn.prob, active, threshold, least)
            edited = torch.zeros_like(active)
            if editing_threshold is not None and editing_threshold > 0:
                edited = ~active & (drawn.prob > editing_threshold) & (drawn.token != sample)
                if prompt_mask is not None:
                    edited &= ~prompt_mask
            tokens = torch.where(written | edited, drawn.token, sample)
        out = BlockRefinementSchedulerOutput(
            tokens, written, edited, drawn.token, drawn.prob, model_output
        )
        return out if return_dict else out.to_tuple()

    def _step_without_mask(
        self,
        drawn: Drawn,
        step: int,
        sample: Tensor,
        editing_threshold: float | None,
        threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is written, edited, and committed after the step."""
        committed = self._committed
        if step == 0 or committed is None or committed.shape != sample.shape:
            committed = torch.zeros_like(sample, dtype=torch.bool)
        steps = self.num_inference_steps
        due = -(-(step + 1) * sample.shape[1] // steps)
        least = (due - committed.sum(1, keepdim=True)).clamp(min=0)
        written = above(drawn.prob, ~committed, threshold, least)
        edited = torch.zeros_like(written)
        if editing_threshold is not None:
            edited = committed & (drawn.token != sample) & (drawn.prob > editing_threshold)
        self._committed = committed | written
        return written, edited, self._committed

    @staticmethod
    def check_eos_finished(
        cur_x: Tensor,
        sampled_tokens: Tensor,
        final_transfer: Tensor,
        finished: Tensor,
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Tensor:
        """``finished (B,)`` bool, set **in place** where a step wrote an end of sequence and no
        mask is left before the first one, which must not be in the prompt."""
        place = torch.arange(cur_x.shape[1], device=cur_x.device)
        wrote = ((sampled_tokens == eos_token_id) & final_transfer).any(1)
        ends = torch.where(cur_x == eos_token_id, place, cur_x.shape[1]).amin(1)
        before = (place >= prompt_length) & (place < ends[:, None])
        open_masks = ((cur_x == mask_token_id) & before).any(1)
        inside = (ends >= prompt_length) & (ends < cur_x.shape[1])
        return finished.logical_or_(wrote & inside & ~open_masks)

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: bool,
        editing_enabled: bool,
        editing_transfer_index: Tensor,
        post_steps: int,
        max_post_steps: int,
        finished: Tensor,
    ) -> bool:
        """Whether the block needs another step: masks and steps are left, or there are edits."""
        if bool(finished.all()):
            return False
        if masks_remaining:
            return step_idx < self.num_inference_steps
        edits = editing_enabled and bool(editing_transfer_index.any())
        return edits and post_steps <= max_post_steps

    def add_noise(
        self,
        original_samples: Tensor,
        attention_mask: Tensor,
        *,
        prompt_length: int,
        block_length: int,
        mask_token_id: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mask a random part of each block after the prompt, and the rest in a second copy.

        Returns the two copies and which positions of each are masked, ``(B, L)`` all.
        """
        batch, length = original_samples.shape
        device = original_samples.device
        masked = torch.zeros_like(original_samples, dtype=torch.bool)
        for start in range(prompt_length, length, block_length):
            stop = min(start + block_length, length)
            part = torch.rand((batch, 1), device=device, generator=generator)
            drawn = torch.rand((batch, stop - start), device=device, generator=generator)
            masked[:, start:stop] = drawn < part
        valid = attention_mask.bool()
        new = torch.arange(length, device=device) >= prompt_length
        rest = ~masked & valid & new
        masked &= valid
        one, two = (original_samples.masked_fill(part, mask_token_id) for part in (masked, rest))
        return one, two, masked, rest


class EntropyBoundScheduler(Scheduler):
    """Accept what is certain while the entropies before sum to a bound; the rest becomes noise.

    Args:
        entropy_bound: nats.
        t_max, t_min: temperature of the first step, and the one that the last step approaches.
        num_inference_steps: most steps.
    """

    def __init__(
        self,
        entropy_bound: float = 0.1,
        t_max: float = 0.8,
        t_min: float = 0.4,
        num_inference_steps: int = 32,
    ) -> None:
        self.config = Config(
            entropy_bound=entropy_bound,
            t_max=t_max,
            t_min=t_min,
            num_inference_steps=num_inference_steps,
        )
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        check_int("num_inference_steps", num_inference_steps, 1)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, device=device)

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        entropy_bound: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        compat: str | None = "diffusers",
        backend: str | None = None,
    ) -> EntropyBoundSchedulerOutput | tuple[Tensor, ...]:
        """Draw a token for every position, accept by entropy, renoise the others.

        Args:
            model_output: ``(B, T, V)`` logits.
            timestep: index of the step, from 0, which sets the temperature.
            sample: ``(B, T)`` int64 tokens.
            entropy_bound: instead of the configuration's.
            generator: of all that is drawn.
            return_dict: False: a tuple in the order of the fields.
            compat: see the module.
            backend: as in ``pydllm.ops``.
        """
        check_step(model_output, sample)
        config = self.config
        bound = config.entropy_bound if entropy_bound is None else entropy_bound
        check_number("entropy_bound", bound, 0, infinite=True)
        left = (self.num_inference_steps - int(timestep)) / self.num_inference_steps
        logits = model_output / (config.t_min + (config.t_max - config.t_min) * left)
        drawn = propose(
            logits, {"temperature": 1.0}, generator, follows(compat, "diffusers"), backend
        )
        accepted = within(drawn.entropy, bound)
        random = torch.randint(
            logits.shape[-1], sample.shape, device=sample.device, generator=generator
        )
        tokens = torch.where(accepted, drawn.token, random)
        out = EntropyBoundSchedulerOutput(tokens, accepted, drawn.token, drawn.prob, logits)
        return out if return_dict else out.to_tuple()
