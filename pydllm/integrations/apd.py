"""APD's ``diffusion_generate`` for Dream, ``alg="apd"`` and ``"leftright"``, on kernels.

model.diffusion_generate = types.MethodType(apd.diffusion_generate, model)
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm._checks import check_int, check_number
from pydllm.decoding import APD, LeftToRight
from pydllm.decoding.call import Call as DriverCall
from pydllm.decoding.generate import generate
from pydllm.integrations._arguments import as_model, check_token, draw_seed, follows, with_ids
from pydllm.integrations._dream import Call, read_call
from pydllm.integrations._outputs import Output
from pydllm.integrations._published import LoopState, Pass, PublishedLoop
from pydllm.integrations.dream import Hook
from pydllm.integrations.samplers import add_gumbel_noise, keep_likely
from pydllm.models import Model, StaticCache

__all__ = ["DreamModelOutputWithProfile", "ProfileOutput", "diffusion_generate"]

ALGORITHMS = ("apd", "leftright")
KNOBS = ("tokens_per_step", "kv_window", "max_lookahead", "apd_mixture_weight")
# What the published code restricts drafts to before it mixes them with the verifier's logits.
_QWEN_VOCAB = 151936


@dataclass
class ProfileOutput(Output):
    """What was counted, under the original's names; times in seconds, acceptance and the
    verifier's forward in ``verification_time``."""

    num_forward_evals: int | None = None
    num_tokens_generated: int | None = None
    verification_time: float | None = None
    total_time: float | None = None
    acceptance_counts: list[int] | None = None


@dataclass
class DreamModelOutputWithProfile(Output):
    """``sequences (1, L)`` int64, and what was counted; ``history`` is always None."""

    sequences: Tensor
    history: list[Tensor] | None = None
    profile: ProfileOutput | None = None


@torch.no_grad()
def diffusion_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    compat: str | None = "apd",
    backend: str | None = None,
    **kwargs: Any,
) -> DreamModelOutputWithProfile | Tensor:
    """Decode from the left: as many drafts of a forward as a causal model agrees with, or a fixed
    number.

    Args:
        model: a loaded Dream module, whose weights are shared, or a pydllm model.
        inputs: ``(1, P)`` token ids.
        generation_config: as in ``pydllm.integrations.dream``, with ``alg="apd"`` or
            ``"leftright"``, which mean the same: ``apd_mixture_weight`` decides.
        compat: ``"apd"``: the published loop. Drafts are drawn at the square of the temperature by
            torch's generator, targets without noise, temperature and nucleus; an ``eos_token_id``
            anywhere in the sequence, in the prompt too, ends the generation after the round; what
            is not decoded stays masked. None: ``pydllm.APD`` or ``pydllm.LeftToRight``.
        backend: as in ``pydllm.ops``.
        kwargs: the config's names; ``verifier_model``, a loaded Qwen2 or another causal model;
            ``attention_mask``, which is not read under ``compat``: padding counts as text; both
            hooks, whose results are not used. And, of the config or here:

            ``apd_mixture_weight``: R, weight of the model in the target; None: no verifier.
            ``tokens_per_step``: K, without a verifier: tokens that a forward writes.
            ``kv_window``: W, tokens before the last round's that are computed anew, less one; what
            lies before keeps its keys and values. None: all are.
            ``max_lookahead``: M, masks that the model sees; None: all.

    Returns:
        ``(1, max_length)`` int64, or ``DreamModelOutputWithProfile`` where
        ``return_dict_in_generate`` asks for it.

    Raises:
        ValueError, TypeError: an unknown argument or value.
        PydllmError: masks among the tokens, of the prompt or because the model predicts them, on
            which the original fails.
    """
    options: dict[str, Any] = {
        "verifier_model": None,
        "generation_tokens_hook_func": None,
        "generation_logits_hook_func": None,
    }
    options |= {name: _setting(generation_config, name) for name in KNOBS}
    said = read_call(
        "diffusion_generate", model, inputs, generation_config, kwargs, options, ALGORITHMS
    )
    if len(said.prompt) != 1:
        raise ValueError(f"inputs: expected one sequence, (1, P), got {tuple(said.prompt.shape)}")
    verifier = _checked(said)
    if not follows(compat, "apd"):
        return _ours(said, verifier, backend)
    started = time.perf_counter()
    loop = _Loop(
        temperature=said.settings.temperature,
        top_p=said.settings.top_p,
        top_k=said.settings.top_k,
        verifier=verifier,
        mixture=said.options["apd_mixture_weight"],
        tokens_per_step=said.options["tokens_per_step"],
        kv_window=said.options["kv_window"],
        max_lookahead=said.options["max_lookahead"],
        eos_id=said.settings.eos_token_id,
        on_tokens=said.options["generation_tokens_hook_func"],
        on_logits=said.options["generation_logits_hook_func"],
        cached=said.options["kv_window"] is not None,
    )
    decoded = loop.run(said.model, said.prompt, said.new, backend)
    profile = ProfileOutput(
        num_forward_evals=len(loop.counts),
        num_tokens_generated=sum(loop.counts),
        verification_time=loop.seconds,
        total_time=time.perf_counter() - started,
        acceptance_counts=loop.counts,
    )
    return _result(said, decoded.x, profile)


def _setting(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _result(said: Call, x: Tensor, profile: ProfileOutput) -> DreamModelOutputWithProfile | Tensor:
    if said.settings.return_dict_in_generate:
        return DreamModelOutputWithProfile(x, profile=profile)
    return x


def _checked(said: Call) -> Model | None:
    """The verifier, if one is used."""
    given, settings = said.options, said.settings
    weight, steps = given["apd_mixture_weight"], given["tokens_per_step"]
    for name, least in (("kv_window", 0), ("max_lookahead", 1)):
        if given[name] is not None:
            check_int(name, given[name], least)
    if settings.top_k is not None:
        check_int("top_k", settings.top_k, 1)
    if settings.eos_token_id is not None:
        check_token("eos_token_id", settings.eos_token_id, said.model)
    if weight is None:
        check_int("tokens_per_step", steps, 1)
        shown = given["max_lookahead"]
        if shown is not None and shown < steps:
            raise ValueError(
                f"max_lookahead: expected at least the {steps} tokens_per_step, got {shown}"
            )
        return None
    check_number("apd_mixture_weight", weight, 0, 1)
    if given["verifier_model"] is None:
        raise ValueError(
            "verifier_model: expected a causal model with apd_mixture_weight, got None"
        )
    verifier = as_model(given["verifier_model"])
    if verifier.spec.attention != "causal":
        raise ValueError(
            f"verifier_model: expected a model with causal attention, got {verifier.spec.attention}"
        )
    if verifier.spec.vocab_size < min(said.model.spec.vocab_size, _QWEN_VOCAB):
        raise ValueError(
            f"verifier_model: expected logits of {said.model.spec.vocab_size} ids (of "
            f"{_QWEN_VOCAB} at most), got {verifier.spec.vocab_size}"
        )
    return verifier


def _ours(
    said: Call, verifier: Model | None, backend: str | None
) -> DreamModelOutputWithProfile | Tensor:
    given, settings, model = said.options, said.settings, said.model
    if settings.top_k is not None:
        raise ValueError(f"top_k: expected None without compat, got {settings.top_k}")
    if settings.eos_token_id is not None:
        model = with_ids(model, model.spec.mask_id or 0, (settings.eos_token_id,))
    reach = {"window": given["kv_window"], "lookahead": given["max_lookahead"]}
    algorithm: APD | LeftToRight
    if verifier is None:
        algorithm = LeftToRight(tokens_per_step=given["tokens_per_step"], **reach)
    else:
        algorithm = APD(verifier, mixture=given["apd_mixture_weight"], **reach)
    started = time.perf_counter()
    hidden = 0 if said.pad is None else int(said.pad[0])
    found = generate(
        model,
        [said.prompt[0, hidden:]],
        algorithm,
        max_new_tokens=said.new,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=draw_seed() if settings.temperature > 0 else 0,
        backend=backend,
    )
    x = torch.cat((said.prompt[:, :hidden], found.sequences[0].to(said.prompt.device)[None]), 1)
    profile = ProfileOutput(
        num_forward_evals=int(found.nfe[0]),
        num_tokens_generated=len(found.new_tokens[0]),
        total_time=time.perf_counter() - started,
    )
    return _result(said, x, profile)


@dataclass(frozen=True, kw_only=True)
class _Check(Pass):
    """A forward of the verifier over ``ids (1, T)``, positions [start, stop)."""

    ids: Tensor = field(compare=False)


@dataclass(kw_only=True)
class _Loop(PublishedLoop):
    """The published loop; ``counts``: tokens of each round, ``seconds``: of verification."""

    top_p: float | None
    top_k: int | None
    verifier: Model | None
    mixture: float | None
    tokens_per_step: int
    kv_window: int | None
    max_lookahead: int | None
    eos_id: int | None
    on_tokens: Hook | None
    on_logits: Hook | None
    counts: list[int] = field(default_factory=list)
    seconds: float = 0.0
    verifier_cache: StaticCache | None = None

    def begin(self, call: DriverCall, prompts: list[int]) -> Any:
        if self.verifier is not None:
            slots = call.max_len
            self.verifier_cache = call.runner.cache("verifier", self.verifier, 1, slots)
        return super().begin(call, prompts)

    def schedule(self, state: LoopState) -> Iterator[Pass]:
        length, cursor, count = state.call.max_len, state.first_mask(), 0
        self._show(None, state, None)
        while cursor < length:
            right = min(cursor + (self.max_lookahead or length), length)
            left = 0
            if self.kv_window is not None and self.counts:
                left = max(cursor - self.kv_window - count + 1, 0)
            commit = right - left if self.cached else 0
            yield Pass(start=left, stop=right, first=left, last=right, commit=commit)
            if self.on_logits is not None:
                self.on_logits(cursor, state.x, None)
            token, logits = state.carried
            started = time.perf_counter()
            count = self.tokens_per_step
            if self.mixture is not None:
                count = yield from self._verify(state, token, logits, cursor, right)
            self._write(state, token[:count], cursor, min(cursor + count, length))
            cursor += count
            self.seconds += time.perf_counter() - started
            self.counts.append(count)
            self._show(cursor, state, self.counts)
            masked = bool(state.masked(0, length).any())
            ended = self.eos_id is not None and bool(state.x.eq(self.eos_id).any())
            if ended or not masked:
                return

    def _write(self, state: LoopState, token: Tensor, first: int, last: int) -> None:
        if len(token) not in (1, last - first):
            raise PydllmError(
                f"expected {last - first} drafts from position {first} on, got {len(token)}: there "
                "are masks before it, and the published loop fails"
            )
        state.x[0, first:last] = token

    def _show(self, cursor: int | None, state: LoopState, counts: Any) -> None:
        if self.on_tokens is not None:
            self.on_tokens(cursor, state.x, counts)

    def _verify(
        self, state: LoopState, token: Tensor, logits: Tensor, cursor: int, right: int
    ) -> Generator[Pass, None, int]:
        """Run the verifier over the drafts; returns how many are accepted, the first always."""
        if cursor == 0 or len(token) != right - cursor:
            raise PydllmError(
                f"expected masks at the end alone, after a token, and found {len(token)} masks "
                f"before position {right} of which {right - cursor} are drafts: the published loop "
                "fails"
            )
        ids = torch.cat((state.x[:, :cursor], token[None]), 1)
        start = cursor if self.counts else 0
        yield _Check(
            start=start,
            stop=right,
            first=right,
            last=right,
            commit=right - start,
            is_forward=False,
            ids=ids[:, start:],
        )
        expert = state.carried[-len(token) :]  # row j predicts the draft after draft j
        width = min(_QWEN_VOCAB, logits.shape[1])
        weight = self.mixture or 0.0
        mixed = weight * logits[1:, :width] + (1 - weight) * expert[:-1, :width]
        agrees = (mixed.argmax(-1) == token[1:]).int().cumprod(0)
        return 1 + int(agrees.sum())

    def step(self, state: LoopState, plan: Any) -> tuple[Tensor, Any]:
        """A forward of the model: tokens and logits ``(n, V)`` of the masks; or of the verifier:
        logits of all its rows."""
        counts = torch.ones(3, 1, dtype=torch.int32, device=state.x.device)
        if isinstance(plan, _Check):
            return counts, self._expert(state, plan)
        hidden = self.forward(state, plan)
        state.nfe += 1
        masked = state.masked(plan.first, plan.last)
        if self.mixture is None and self.temperature == 0:
            return counts, (self.stats(state, plan, hidden).token[masked].long(), None)
        logits = self.logits(state, plan, hidden)[masked]
        return counts, (self._draft(logits), logits)

    def _draft(self, logits: Tensor) -> Tensor:
        """The arg-max of the noisy logits; the temperature counts twice."""
        if self.temperature == 0:
            return logits.argmax(-1)
        kept = keep_likely(logits / self.temperature, self.top_p, self.top_k)
        return add_gumbel_noise(kept, self.temperature).argmax(-1)

    def _expert(self, state: LoopState, plan: _Check) -> Tensor:
        model, cache = self.verifier, self.verifier_cache
        if model is None or cache is None:
            raise ValueError("verifier_model: expected a causal model, got None")
        window = self.window(state, plan)
        hidden = model.forward(
            plan.ids,
            window.start,
            cache,
            length=window.length,
            kv_len=window.kv_len,
            commit=window.commit,
            backend=state.call.backend,
        )
        return model.head(hidden[0])
