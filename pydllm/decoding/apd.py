"""Adaptive parallel decoding (arXiv 2506.00413), and the left-to-right baseline it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pydllm.decoding.generation import Decoded, Request
from pydllm.decoding.rounds import Rounds
from pydllm.decoding.static import expect, expect_int, expect_number
from pydllm.models import Model

EMITS = ("draft", "draft_then_target", "target")
RULES = ("paper", "reference")
# Two tokenizers that are meant to be the same differ in a few ids at the end.
_LEAST_SHARED = 0.99
_LEAST_SQUARED = 1e-3  # its square has to be a temperature, too


@dataclass(frozen=True)
class APD:
    """Left to right, as many drafts of one forward as a small causal model agrees with: adaptive
    parallel decoding (arXiv 2506.00413).

    A round drafts all masks that are shown from one forward of the diffusion model, lets the
    verifier score them in one forward, and draws a target for each from the product
    ``p_D^R p_A^(1 - R)`` of the two models' distributions with the noise that drew the draft. The
    drafts before the first that differs from its target are accepted. The first draft of a round is
    free: given all tokens before it, it is what the diffusion model alone would have said.

    Attributes:
        verifier: a causal model with the same tokenizer, for instance ``pydllm.load`` of a Qwen2;
            dtype and device as the diffusion model's. None where every mixture is 1.
        mixture: R, the weight of the diffusion model in the target, in [0, 1]: 1 accepts all.
        window: W, at least 1: tokens before the last round's that are computed anew along with
            them, less one; what lies before keeps its keys and values. None computes everything.
        lookahead: M, at least 1: masks that the diffusion model sees, and drafts. None: all that
            are left. Fewer masks are another input, and change what the model says.
        top_p: probability in (0, 1] of the nucleus that drafts and targets are drawn from, at
            temperatures above 0; None for all ids.
        emit: ``"draft"``, the paper's: at a mismatch nothing is written, and the next round drafts
            the position again. ``"draft_then_target"``: the target is written. ``"target"``: that,
            and the first draft has to be accepted as the others; with mixture 0 the tokens are the
            verifier's, drawn with the same noise.
        rule: ``"paper"``; or ``"reference"``, what the published code computes: drafts at the
            square of the temperature, targets without noise and nucleus. The same at temperature 0.

    ``mixture``, ``window`` and ``lookahead`` are one value for all or a list with one a prompt.

    The tokens do not follow either model's distribution, nor the product's (only accepted drafts
    are written). ``Generation.nfe`` counts forwards of the diffusion model, one a round;
    ``Generation.verifier_nfe`` those of the verifier, which a round of one draft does not need.
    """

    verifier: Model | None
    mixture: float | Sequence[float] = 0.7
    window: int | None | Sequence[int | None] = 16
    lookahead: int | None | Sequence[int | None] = 64
    top_p: float | None = None
    emit: str = "draft"
    rule: str = "paper"
    # Comparing two tokenizers takes a while for large vocabularies.
    _shared: WeakKeyDictionary[Any, int] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        _expect_each("mixture", self.mixture, lambda name, r: expect_number(name, r, 0.0, 1.0))
        _expect_each("window", self.window, _expect_reach)
        _expect_each("lookahead", self.lookahead, _expect_reach)
        _expect_top_p(self.top_p)
        expect("emit", self.emit, EMITS)
        expect("rule", self.rule, RULES)
        if self.verifier is None:
            mixture = _each(self.mixture)
            if any(value < 1 for value in mixture) or self.rule != "paper":
                raise ValueError(
                    "verifier: expected a causal model (None needs mixture 1 and rule 'paper'), "
                    f"got None with mixture {self.mixture} and rule {self.rule!r}"
                )
        elif self.verifier.spec.attention != "causal":
            raise ValueError(
                "verifier: expected a model with causal attention, "
                f"got {self.verifier.spec.attention!r}"
            )

    def check(self, model: Model, max_new_tokens: int) -> None:
        _expect_full(self, model)
        verifier = self.verifier
        if verifier is None:
            return
        for name in ("device", "dtype"):
            wanted, got = getattr(model, name), getattr(verifier, name)
            if wanted != got:
                raise ValueError(f"verifier: expected {name} {wanted}, the model's, got {got}")
        shared = self._shared_vocab(model, verifier)
        foreign = [token for token in model.spec.eos_ids if token >= shared]
        if foreign:
            raise ValueError(
                f"verifier: expected a tokenizer that has the ends of sequence {foreign}, "
                f"got one that shares the ids below {shared}"
            )

    def run(self, request: Request) -> Decoded:
        batch, slots = request.x.shape
        mixture, window, lookahead = (
            _per_prompt(name, getattr(self, name), batch, request.rows)
            for name in ("mixture", "window", "lookahead")
        )
        shared = None
        if self.verifier is not None:
            shared = self._shared_vocab(request.model, self.verifier)
            _check_prompts(request, shared, self.verifier.spec.max_positions)
        temperature = torch.as_tensor(request.temperature)
        squared = self.rule == "reference"
        if squared and ((temperature > 0) & (temperature < _LEAST_SQUARED)).any():
            raise ValueError(
                f"temperature: expected 0 or at least {_LEAST_SQUARED} with rule 'reference', "
                f"got {temperature.tolist()}"
            )
        return Rounds(
            self.verifier,
            mixture,
            window,
            lookahead,
            limit=None,
            top_p=self.top_p,
            emit=self.emit,
            rule=self.rule,
            shared_vocab=shared,
        ).run(request)

    def _shared_vocab(self, model: Model, verifier: Model) -> int:
        if model not in self._shared:
            self._shared[model] = shared_vocab(model, verifier)
        return self._shared[model]


@dataclass(frozen=True)
class LeftToRight:
    """A fixed number of tokens a forward, from left to right: the baseline of arXiv 2506.00413.

    Equal to ``APD`` with mixture 1 that accepts at most ``tokens_per_step`` drafts a round, under
    the same noise.

    Attributes:
        tokens_per_step: K, tokens written a forward, at most ``lookahead``. The LM head is
            evaluated at these positions alone.
        window, lookahead, top_p: as in ``APD``; by default everything is computed anew and all
            masks are shown.
    """

    tokens_per_step: int = 1
    window: int | None | Sequence[int | None] = None
    lookahead: int | None | Sequence[int | None] = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        expect_int("tokens_per_step", self.tokens_per_step, 1)
        _expect_each("window", self.window, _expect_reach)
        _expect_each("lookahead", self.lookahead, _expect_reach)
        _expect_top_p(self.top_p)
        least = min((value for value in _each(self.lookahead) if value is not None), default=None)
        if least is not None and least < self.tokens_per_step:
            raise ValueError(
                f"lookahead: expected at least the {self.tokens_per_step} tokens_per_step, "
                f"got {least}"
            )

    def check(self, model: Model, max_new_tokens: int) -> None:
        _expect_full(self, model)

    def run(self, request: Request) -> Decoded:
        batch = request.x.shape[0]
        return Rounds(
            None,
            [1.0] * batch,
            _per_prompt("window", self.window, batch, request.rows),
            _per_prompt("lookahead", self.lookahead, batch, request.rows),
            limit=self.tokens_per_step,
            top_p=self.top_p,
            emit="draft",
            rule="paper",
            shared_vocab=None,
        ).run(request)


def shared_vocab(model: Model, verifier: Model) -> int:
    """How many leading ids mean the same token to both models.

    Raises:
        ValueError: the tokenizers are different ones; or one model has no tokenizer, and the
            vocabularies differ in size.
    """
    sizes = model.spec.vocab_size, verifier.spec.vocab_size
    tokenizers = model.tokenizer, verifier.tokenizer
    if None in tokenizers:
        if sizes[0] != sizes[1]:
            raise ValueError(
                "verifier: expected a tokenizer for both models, or vocabularies of one size, "
                f"got sizes {sizes[0]} and {sizes[1]} and a model without a tokenizer"
            )
        return sizes[0]
    ours, theirs = (
        {token: text for text, token in each.get_vocab(with_added_tokens=True).items()}
        for each in tokenizers
        if each is not None
    )
    ids = range(min(sizes))
    shared = next((token for token in ids if ours.get(token) != theirs.get(token)), len(ids))
    # Ids that neither tokenizer has are no tokens.
    while shared and shared - 1 not in ours:
        shared -= 1
    known = sum(token in ours for token in ids)
    if shared == 0 or shared < _LEAST_SHARED * known:
        raise ValueError(
            f"verifier: expected the tokenizer of the model, got one whose token {shared} is "
            f"{theirs.get(shared)!r} instead of {ours.get(shared)!r}"
        )
    return shared


def _check_prompts(request: Request, shared: int, limit: int) -> None:
    """What the verifier cannot take of prompts that suit the model."""
    slots = request.x.shape[1]
    if slots > limit:
        raise ValueError(
            f"prompts: expected at most the verifier's {limit} positions with "
            f"max_new_tokens={request.max_new_tokens}, got {slots}"
        )
    lengths = request.prompt_length.tolist()
    for row, (length, ids) in enumerate(zip(lengths, request.x.tolist(), strict=True)):
        if length == 0:
            raise ValueError(
                f"prompts[{row}]: expected at least one token (the verifier predicts position i "
                "from i - 1), got none"
            )
        for place, token in enumerate(ids[:length]):
            if token >= shared:
                raise ValueError(
                    f"prompts[{row}][{place}]: expected an id below {shared}, which the verifier "
                    f"shares, got {token}"
                )


def _expect_full(algorithm: object, model: Model) -> None:
    if model.spec.attention != "full":
        raise ValueError(
            f"{type(algorithm).__name__}: expected a model with full attention, "
            f"got {model.spec.attention!r}"
        )


def _expect_reach(name: str, value: object) -> None:
    if value is not None:
        expect_int(name, value, 1)


def _expect_top_p(value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1] or None, got {value!r}")


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _expect_each(name: str, value: Any, expect_one: Callable[[str, Any], None]) -> None:
    for one in _each(value):
        expect_one(name, one)


def _per_prompt(name: str, value: Any, batch: int, rows: int) -> Sequence[Any]:
    """One value for each sequence of the batch; those behind the ``rows`` are as the first."""
    if not isinstance(value, list | tuple):
        return [value] * batch
    rows = rows or batch
    if len(value) != rows:
        raise ValueError(f"{name}: expected one value for each of {rows} prompts, got {value!r}")
    return [*value, *value[:1] * (batch - rows)]
