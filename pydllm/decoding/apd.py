"""Adaptive parallel decoding (arXiv 2506.00413)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from pydllm._checks import check_choice, check_each, check_int, check_number, each, renamed
from pydllm.decoding.arguments import expect_nucleus
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.rounds import DraftVerifyDecoder
from pydllm.models import Model, NativeModel
from pydllm.models.protocol import expect_model

EMITS = ("draft", "draft_then_target", "target")
# Two tokenizers that are meant to be the same differ in a few ids at the end.
_LEAST_SHARED = 0.99
_LEAST_SQUARED = 1e-3  # its square has to be a temperature, too


@renamed(rule="compat")
@dataclass(frozen=True, kw_only=True)
class APD(Algorithm):
    """Left to right, as many drafts of one forward as a small causal model agrees with: adaptive
    parallel decoding (arXiv 2506.00413).

    A round drafts all masks that are shown from one forward of the diffusion model, lets the
    verifier score them in one forward, and draws a target for each from the product
    ``p_D^R p_A^(1 - R)`` of the two models' distributions with the noise that drew the draft. The
    drafts before the first that differs from its target are accepted. The first draft of a round is
    free: given all tokens before it, it is what the diffusion model alone would have said.

    Attributes:
        verifier: a causal model with the same tokenizer, for instance ``pydllm.load`` of a Qwen2;
            dtype and device as the diffusion model's. Or a diffusion model that can be read
            causally (``ModelSpec.causal``), the one that is decoded included; a ``"masked"`` one
            computes a mask after each draft besides. None where every mixture is 1.
        mixture: R, the weight of the diffusion model in the target, in [0, 1]: 1 accepts all.
        window: W, at least 1: tokens before the last round's that are computed anew along with
            them, less one; what lies before keeps its keys and values. None computes everything.
            0, where the verifier is the model itself: nothing, the masks see the keys and values of
            the causal forwards. Then each round stores what it writes, at mixture 1 as well, and
            the model may have any attention but a causal one.
        lookahead: M, at least 1: masks that the diffusion model sees, and drafts. None: all that
            are left. Fewer masks are another input, and change what the model says.
        top_p: probability in (0, 1] of the nucleus that drafts and targets are drawn from, at
            temperatures above 0; None: that of ``generate``, one for all prompts or one each.
        emit: ``"draft"``, the paper's: at a mismatch nothing is written, and the next round drafts
            the position again. ``"draft_then_target"``: the target is written. ``"target"``: that,
            and the first draft has to be accepted as the others; with mixture 0 the tokens are the
            verifier's, drawn with the same noise.
        compat: None; or ``"apd"``, what the published code computes: drafts at the square
            of the temperature, targets without noise and nucleus. The same at temperature 0.

    ``mixture``, ``window`` and ``lookahead`` are one value for all or a list with one per prompt.

    The tokens do not follow either model's distribution, nor the product's (only accepted drafts
    are written). ``Generation.nfe`` counts forwards of the diffusion model, one per round;
    ``Generation.verifier_nfe`` those of the verifier, which a round of one draft does not need; the
    pieces in which a round is verified on a CPU count as one.
    """

    takes_top_k: ClassVar[bool] = False
    has_logprobs: ClassVar[bool] = False

    verifier: Model | None = field(kw_only=False)
    mixture: float | Sequence[float] = 0.7
    window: int | None | Sequence[int | None] = 16
    lookahead: int | None | Sequence[int | None] = 64
    top_p: float | None = None
    emit: str = "draft"
    compat: str | None = None
    # Comparing two tokenizers takes a while for large vocabularies.
    _shared: WeakKeyDictionary[Any, int] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_each("mixture", self.mixture, lambda name, r: check_number(name, r, 0, 1))
        check_each("window", self.window, _expect_window)
        check_each("lookahead", self.lookahead, expect_reach)
        expect_nucleus("top_p", self.top_p)
        check_choice("emit", self.emit, EMITS)
        check_choice("compat", self.compat, (None, "apd"))
        if self.verifier is None:
            mixture = each(self.mixture)
            if any(value < 1 for value in mixture) or self.compat:
                raise ValueError(
                    "verifier: expected a causal model (None needs mixture 1 and compat None), "
                    f"got None with mixture {self.mixture} and compat {self.compat!r}"
                )
            return
        expect_model(self.verifier, "verifier")
        spec = self.verifier.spec
        if spec.attention != "causal" and spec.causal is None:
            raise ValueError(
                "verifier: expected a model with causal attention, or one that can be read "
                "causally (pydllm.load(..., causal='shifted' or 'masked')), "
                f"got {spec.attention!r} attention"
            )
        if spec.causal == "masked" and not getattr(self.verifier, "has_leaves", True):
            raise ValueError(
                "verifier: expected a model whose experts are not admitted by block, "
                "or causal='shifted'"
            )
        reaches = [0 if value == 0 else 1 for value in each(self.window)]
        if len(set(reaches)) > 1:
            raise ValueError(f"window: expected 0 for all prompts or for none, got {self.window!r}")

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found out about models: weak references cannot be copied."""
        return {name: value for name, value in vars(self).items() if name != "_shared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _shared=WeakKeyDictionary())

    def check(self, model: Model, max_new_tokens: int) -> None:
        verifier = self.verifier
        if not self._has_own_cache:
            expect_full(self, model)
        elif verifier is None or not _is_copy(model, verifier):
            raise ValueError(
                "window: expected at least 1 or None with a verifier that is not the model itself, "
                f"got {self.window!r}"
            )
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

    def decoder(self, call: Call) -> DraftVerifyDecoder:
        expect_one_nucleus(self.top_p, call)
        count = len(call.prompt_lengths)
        shared = None
        if self.verifier is not None:
            shared = self._shared_vocab(call.model, self.verifier)
            _check_prompts(call, shared, self.verifier.spec.max_positions)
        temperature = torch.as_tensor(call.temperature)
        squared = self.compat == "apd"
        if squared and ((temperature > 0) & (temperature < _LEAST_SQUARED)).any():
            raise ValueError(
                f"temperature: expected 0 or at least {_LEAST_SQUARED} with compat 'apd', "
                f"got {temperature.tolist()}"
            )
        # A copy of the model may compute otherwise, as a deterministic one does.
        verifier = call.model if self._has_own_cache else self.verifier
        return DraftVerifyDecoder(
            verifier,
            per_prompt("mixture", self.mixture, count),
            per_prompt("window", self.window, count),
            per_prompt("lookahead", self.lookahead, count),
            top_p=self.top_p,
            emit=self.emit,
            rule="reference" if self.compat else "paper",
            shared_vocab=shared,
            own_cache=self._has_own_cache,
        )

    @property
    def _has_own_cache(self) -> bool:
        return 0 in each(self.window)

    def _shared_vocab(self, model: Model, verifier: Model) -> int:
        if model not in self._shared:
            self._shared[model] = shared_vocab(model, verifier)
        return self._shared[model]


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


def _check_prompts(call: Call, shared: int, limit: int) -> None:
    """What the verifier cannot take of prompts that suit the model."""
    if call.longest > limit:
        raise ValueError(
            f"prompts: expected at most the verifier's {limit} positions with max_new_tokens, "
            f"got {call.longest}"
        )
    rows = zip(call.prompt_lengths, call.x.tolist(), strict=True)
    for row, (length, ids) in enumerate(rows):
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


def expect_full(algorithm: object, model: Model) -> None:
    if model.spec.attention != "full":
        raise ValueError(
            f"{type(algorithm).__name__}: expected a model with full attention, "
            f"got {model.spec.attention!r}"
        )


def expect_reach(name: str, value: object) -> None:
    if value is not None:
        check_int(name, value, 1)


def _expect_window(name: str, value: object) -> None:
    if value is not None:
        check_int(name, value, 0)


def _is_copy(model: Model, other: Model) -> bool:
    """Whether two models are one, or one a copy of the other with the same weights."""
    if isinstance(model, NativeModel) and isinstance(other, NativeModel):
        return model.shares_weights(other)
    return model is other


def expect_one_nucleus(top_p: float | None, call: Call) -> None:
    if top_p is not None and call.top_p is not None:
        raise ValueError(
            f"top_p: expected it of generate or of the algorithm, got both ({top_p} of the latter)"
        )


def per_prompt(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value for each of ``count`` prompts."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one value for each of {count} prompts, got {value!r}")
    return value
