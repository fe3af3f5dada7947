"""DiffusionGemma's denoising step on kernels, for the model of transformers 5.12 and later.

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(...)
    with accelerate(model):
        model.generate(...)

A step of the original takes about ten passes over the logits: softcap, temperature, softmax,
multinomial, arg-max, and two entropies that normalise each again.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from torch import Tensor

from pydllm import ops
from pydllm._backend.signatures import check_called, check_replaced
from pydllm.integrations._arguments import draw_seed, follows
from pydllm.integrations._rules import within

__all__ = ["Accelerated", "EntropyBoundSampler", "accelerate"]

_CLASS = "DiffusionGemmaForBlockDiffusion"
_MODULE = "transformers.models.diffusion_gemma.generation_diffusion_gemma"
_REPLACED = ("_denoising_step", "_prepare_sampler")
# What the cache is called: "cache" since transformers 5.24.
_CACHES = ("cache", "past_key_values")
_STEP = {
    cache: "*, decoder_forward, current_canvas, argmax_canvas, input_ids, decoder_position_ids, "
    f"self_conditioning_logits, mask_mapping, {cache}, finished_denoising, cur_step, sampler, "
    "logits_processor, diffusion_stopping_criteria, **model_kwargs"
    for cache in _CACHES
}
_FORWARD = (
    "*, decoder_input_ids, self_conditioning_logits, decoder_attention_mask, "
    "decoder_position_ids, {cache}"
)
_SAMPLER = {
    "initialize_canvas": "batch_size, device",
    "accept_canvas": "current_canvas, denoiser_canvas, logits, cur_step",
    "renoise_canvas": "accepted_canvas, cur_step",
}


class EntropyBoundSampler:
    """The sampler of transformers by the same name: same arguments, methods and attributes.

    It can stand alone in the original's loop (``model._prepare_sampler``) and draws what the
    original draws, in its order. Entropies come from one read of the logits.

    Args:
        config: has ``entropy_bound``, nats: tokens are accepted, lowest entropy first, while the
            entropies before sum to at most this.
        canvas_length: tokens of a canvas.
        vocab_size: random ids are below it.
        max_denoising_steps: not read, as in the original.
        backend: as in ``pydllm.ops``.
    """

    def __init__(
        self,
        config: Any,
        canvas_length: int,
        vocab_size: int,
        max_denoising_steps: int,
        *,
        backend: str | None = None,
    ) -> None:
        self.entropy_bound = config.entropy_bound
        self.canvas_length, self.vocab_size = canvas_length, vocab_size
        self.accepted_token_mask: Tensor | None = None
        self.backend = backend

    def initialize_canvas(self, batch_size: int, device: torch.device) -> Tensor:
        """``(B, canvas_length)`` int64, uniform random ids."""
        shape = (batch_size, self.canvas_length)
        return torch.randint(self.vocab_size, shape, device=device)

    def accept_canvas(
        self, current_canvas: Tensor, denoiser_canvas: Tensor, logits: Tensor, cur_step: Any
    ) -> Tensor:
        """The accepted tokens of ``denoiser_canvas``, elsewhere ``current_canvas``."""
        flat = logits.reshape(-1, logits.shape[-1])
        entropy = ops.vocab_stats(flat, backend=self.backend).entropy
        return self.accept(current_canvas, denoiser_canvas, entropy.view(current_canvas.shape))

    def accept(self, current_canvas: Tensor, denoiser_canvas: Tensor, entropy: Tensor) -> Tensor:
        """``accept_canvas`` where the entropies ``(B, canvas_length)`` are known."""
        self.accepted_token_mask = within(entropy, self.entropy_bound)
        return torch.where(self.accepted_token_mask, denoiser_canvas, current_canvas)

    def renoise_canvas(self, accepted_canvas: Tensor, cur_step: Any) -> Tensor:
        """Random ids where ``accept_canvas`` accepted nothing."""
        if self.accepted_token_mask is None:
            raise ValueError("accepted_token_mask: expected accept_canvas to be called before")
        random = self.initialize_canvas(accepted_canvas.shape[0], accepted_canvas.device)
        return torch.where(self.accepted_token_mask, accepted_canvas, random)


class Accelerated:
    """What ``accelerate`` did, as a context manager: leaving it, or ``undo()``, reverts it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._before = {name: model.__dict__.get(name) for name in _REPLACED}

    def undo(self) -> None:
        for name, method in self._before.items():
            self.model.__dict__.pop(name, None)
            if method is not None:
                self.model.__dict__[name] = method

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.undo()


def accelerate(
    model: Any, *, compat: str | None = "diffusion_gemma", backend: str | None = None
) -> Accelerated:
    """Run the denoising steps of ``model.generate`` on kernels; this instance alone, reversibly.

    Args:
        model: transformers' ``DiffusionGemmaForBlockDiffusion``.
        compat: ``"diffusion_gemma"``: draw with torch what the original draws, in its order: the
            same seed gives the same tokens, where no decision depends on the last bits of an
            entropy. The arg-max and both entropies are one read; softmax and multinomial remain.
            None: softcap, temperature, sampling, entropy and renoise happen in the kernels, on the
            head's own logits in their
            dtype: one read for these and one for the arg-max. The distribution is the original's, a
            function of ``torch.manual_seed``; the tokens are others.
        backend: as in ``pydllm.ops``.

    Returns:
        ``Accelerated``, to undo it.

    ``generate`` takes all its arguments. Logits processors besides the temperature schedule, and
    stopping criteria other than the default, are called as they are, on the logits they expect; a
    sampler that the model was given by another ``_prepare_sampler`` is replaced. Sequences that
    have finished a canvas are computed along, as in the original, but the logits they are shown to
    themselves are not held back: nothing of theirs is used any more.

    Raises:
        TypeError: another class of model.
        PydllmError: a transformers whose model has other signatures than those known.
    """
    if not any(kind.__name__ == _CLASS for kind in type(model).__mro__):
        raise TypeError(f"model: expected transformers' {_CLASS}, got {type(model).__name__}")
    _check_signatures(model)
    done = Accelerated(model)
    step = _Step(follows(compat, "diffusion_gemma"), backend)

    def prepare_sampler(self: Any, generation_config: Any) -> EntropyBoundSampler:
        return EntropyBoundSampler(
            generation_config.sampler_config,
            canvas_length=self.config.canvas_length,
            vocab_size=self.config.text_config.vocab_size,
            max_denoising_steps=generation_config.max_denoising_steps,
            backend=backend,
        )

    def denoising_step(self: Any, **arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return step(self, **arguments)

    model._prepare_sampler = types.MethodType(prepare_sampler, model)
    model._denoising_step = types.MethodType(denoising_step, model)
    return done


def _check_signatures(model: Any) -> None:
    """Raise unless all that is called or replaced has a known signature."""
    kind = type(model)
    cache = check_replaced("transformers", kind._denoising_step, _STEP)
    for forward in (kind.forward, type(model.model).forward):
        check_called("transformers", forward, _FORWARD.format(cache=cache))
    check_replaced("transformers", kind._prepare_sampler, "generation_config")
    module = importlib.import_module(_MODULE)
    for name, signature in _SAMPLER.items():
        check_replaced("transformers", getattr(module.EntropyBoundSampler, name), signature)
    stop = module.StableAndConfidentStoppingCriteria.__call__
    check_replaced("transformers", stop, "argmax_canvas, logits, **kwargs")
    schedule = module.LinearTemperatureScheduleLogitsProcessor.__call__
    check_called("transformers", schedule, "input_ids, scores, *, cur_step")


class _Step:
    """The replacement of ``_denoising_step``: its keyword arguments and results.

    ``model_kwargs`` has the cache: the forward takes it under the name that the step does.
    """

    def __init__(self, published: bool, backend: str | None) -> None:
        self.published, self.backend = published, backend

    def __call__(
        self,
        model: Any,
        *,
        decoder_forward: Any,
        current_canvas: Tensor,
        argmax_canvas: Tensor,
        input_ids: Tensor,
        decoder_position_ids: Tensor,
        self_conditioning_logits: Tensor | None,
        mask_mapping: Any,
        finished_denoising: Tensor,
        cur_step: int,
        sampler: EntropyBoundSampler,
        logits_processor: Any,
        diffusion_stopping_criteria: Any,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = {
            "decoder_input_ids": current_canvas,
            "self_conditioning_logits": self_conditioning_logits,
            "decoder_attention_mask": mask_mapping,
            "decoder_position_ids": decoder_position_ids,
            **model_kwargs,  # and the cache, by its name
        }
        temperature = None if self.published else _schedule(logits_processor, cur_step)
        if temperature is not None and _plain_forward(model, decoder_forward):
            softcap = model.final_logit_softcapping
            raw = model.lm_head(model.model(**inputs).last_hidden_state)
            chosen = self._draw(raw, current_canvas, sampler, temperature, softcap)
            logits = raw.float().div_(softcap).tanh_().mul_(softcap / temperature)
        else:
            logits = decoder_forward(**inputs).logits
            step = torch.tensor(cur_step, device=current_canvas.device, dtype=torch.int32)
            logits = logits_processor(input_ids, logits, cur_step=step)
            if self.published:
                chosen = self._draw_as_published(logits, current_canvas, sampler)
            else:
                chosen = self._draw(logits, current_canvas, sampler, 1.0, None)
        canvas, best, entropy = chosen
        if diffusion_stopping_criteria is not None:
            held = finished_denoising[:, None]
            best = torch.where(held, argmax_canvas, best)
            canvas = torch.where(held, current_canvas, canvas)
            stop = _stop(diffusion_stopping_criteria, best, entropy, logits)
            finished_denoising = finished_denoising | stop
        dtype = model.model.decoder.embed_tokens.weight.dtype
        return canvas, best, logits.to(dtype), finished_denoising

    def _draw(
        self,
        logits: Tensor,
        canvas: Tensor,
        sampler: EntropyBoundSampler,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Next canvas, arg-max and entropies ``(B, C)``, the noise of the kernels."""
        batch, length = canvas.shape
        flat, device = logits.reshape(-1, logits.shape[-1]), canvas.device
        row = torch.arange(batch, dtype=torch.int32, device=device)
        place = torch.arange(length, dtype=torch.int32, device=device)
        counter = torch.stack(
            (
                place.expand(batch, length),
                row[:, None].expand(batch, length),
                torch.zeros_like(canvas, dtype=torch.int32),
            ),
            -1,
        ).view(-1, 3)
        seed = draw_seed()  # a new one a step, so that the counter needs no step
        options: dict[str, Any] = {"softcap": softcap, "backend": self.backend}
        best = ops.vocab_stats(flat, **options).token.view(canvas.shape)
        stats = ops.vocab_stats(
            flat, temperature=temperature, tempered=True, seed=seed, counter=counter, **options
        )
        entropy = stats.entropy.view(canvas.shape)
        new = canvas.clone()
        sampler.accepted_token_mask = ops.renoise(
            new,
            stats.token.view(canvas.shape),
            entropy,
            bound=float(sampler.entropy_bound),
            vocab_size=sampler.vocab_size,
            seed=seed,
            request=row,
            step=torch.zeros_like(row),
            backend=self.backend,
        )
        return new, best, entropy

    def _draw_as_published(
        self, logits: Tensor, canvas: Tensor, sampler: EntropyBoundSampler
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = logits.reshape(-1, logits.shape[-1])
        stats = ops.vocab_stats(flat, backend=self.backend)
        drawn = torch.multinomial(flat.softmax(-1, dtype=torch.float32), 1).view(canvas.shape)
        entropy = stats.entropy.view(canvas.shape)
        accepted = sampler.accept(canvas, drawn, entropy)
        return sampler.renoise_canvas(accepted, None), stats.token.view(canvas.shape), entropy


def _schedule(processors: Any, cur_step: int) -> float | None:
    """The temperature, where the linear schedule is the only logits processor."""
    if len(processors) == 0:
        return 1.0
    only = processors[0]
    if len(processors) > 1 or type(only).__name__ != "LinearTemperatureScheduleLogitsProcessor":
        return None
    return only.t_min + (only.t_max - only.t_min) * (cur_step / only.max_denoising_steps)


def _plain_forward(model: Any, decoder_forward: Any) -> bool:
    """Whether the decoder is called through the class's own forward, nothing hooked or compiled."""
    return decoder_forward == model.forward and "forward" not in vars(model)


def _stop(criteria: Any, best: Tensor, entropy: Tensor, logits: Tensor) -> Tensor:
    """Which sequences are finished, ``(B,)``; the default criterion needs no look at the logits."""
    if type(criteria).__name__ != "StableAndConfidentStoppingCriteria":
        return criteria(best, logits)
    confident = entropy.mean(-1) < criteria.confidence_threshold
    if criteria.stability_threshold == 0:
        return confident
    history = criteria.argmax_canvas_history
    if history is None:
        history = best.new_full((criteria.stability_threshold, *best.shape), -1)
    criteria.argmax_canvas_history = torch.cat((history[1:], best[None]))
    return (history == best).all(-1).all(0) & confident
