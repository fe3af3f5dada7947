"""Dream's ``diffusion_generate``, on kernels: a function, or a method of a loaded model.

model.diffusion_generate = types.MethodType(dream.diffusion_generate, model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm.decoding.call import Call
from pydllm.integrations._arguments import follows
from pydllm.integrations._dream import DreamLoop, DreamModelOutput, read_call
from pydllm.integrations._published import LoopState, Pass
from pydllm.integrations._rules import drawn, top

__all__ = ["DreamModelOutput", "diffusion_generate"]

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
Hook = Callable[[int | None, Tensor, Tensor | None], Tensor]


@torch.no_grad()
def diffusion_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: str | None = "dream",
    backend: str | None = None,
    **kwargs: Any,
) -> DreamModelOutput | Tensor:
    """Fill all masks after the inputs in ``steps`` forwards of the whole sequence.

    Args:
        model: a loaded Dream module, whose weights are shared, or a pydllm model.
        inputs: ``(B, P)`` token ids.
        generation_config: an object with attributes among ``temperature``, ``top_p``, ``top_k``,
            ``max_length``, ``max_new_tokens``, ``eps``, ``steps``, ``alg``, ``alg_temp``,
            ``num_return_sequences``, ``return_dict_in_generate``, ``output_history`` and the token
            ids; Dream's defaults for what it lacks.
        compat: ``"dream"``: at a temperature or with ``alg_temp``, torch's generator in the
            original's order: the same seed gives the same tokens. None: tokens are drawn in the
            kernel (the same distribution, a function of ``torch.manual_seed``), and the mask is
            never predicted.
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
    said = read_call(
        "diffusion_generate", model, inputs, generation_config, kwargs, hooks, ALGORITHMS
    )
    loop = _Loop(
        settings=said.settings,
        temperature=said.settings.temperature,
        on_tokens=said.options["generation_tokens_hook_func"],
        on_logits=said.options["generation_logits_hook_func"],
        history=said.history(),
        pad=said.pad,
        published=follows(compat, "dream"),
    )
    return said.result(loop.run(said.model, said.prompt, said.new, backend).x, loop.history)


@dataclass(kw_only=True)
class _Loop(DreamLoop):
    on_tokens: Hook | None
    on_logits: Hook | None
    history: list[Tensor] | None
    shown: Tensor | None = None  # the logits of this step, where a hook wants them

    @property
    def hooked(self) -> bool:
        return self.on_tokens is not None or self.on_logits is not None

    def begin(self, call: Call, prompts: list[int]) -> tuple[LoopState, Tensor]:
        state, counts = super().begin(call, prompts)
        self._show(state, None)
        return state, counts

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, steps = state.call.max_len, self.settings.steps
        # What torch draws or ranks depends on the shape; otherwise masks alone are looked at.
        whole = self.stored or self.hooked or self.settings.alg_temp
        first = 0 if whole else state.first_mask()
        state.left = state.masked(0, length).sum(1).tolist()
        for number in range(steps):
            quota = self.quota(sum(state.left), len(state.x), number, steps)
            yield Pass(stop=length, first=first, last=length, quota=quota, number=number)

    def choose(self, state: LoopState, plan: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        masked, logits = state.masked(plan.first, plan.last), None
        if self.stored or self.hooked:
            logits = self.logits(state, plan, hidden)
            if self.on_logits is not None:
                logits = self.on_logits(plan.number, state.x, logits)
            self.shown = logits
        if self.settings.alg == "origin":  # every mask with the same probability
            chosen = masked.clone()
            share = torch.rand(sum(state.left), device=masked.device)
            chosen[masked] = share < self.parts(self.settings.steps)[plan.number]
            token, _ = self.propose(state, plan, hidden, logits, chosen)
            return token, chosen
        score_name = {"topk_margin": "margin", "entropy": "entropy"}.get(self.settings.alg, "prob")
        token, score = self.propose(state, plan, hidden, logits, masked, score_name)
        if self.settings.alg_temp:
            return token, drawn(score, masked, plan.quota, self.settings.alg_temp)
        # In a batch with unequal numbers of masks the original also writes masks over tokens.
        width = state.x.shape[1]
        return token, top(score, masked, plan.quota, front=plan.first, width=width) & masked

    def wrote(self, state: LoopState, plan: Pass) -> None:
        self._show(state, plan.number)
        if self.history is not None:
            self.history.append(state.x.clone())

    def _show(self, state: LoopState, number: int | None) -> None:
        if self.on_tokens is not None:
            state.x = self.on_tokens(number, state.x, self.shown).to(state.x)
