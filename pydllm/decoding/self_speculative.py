"""Self-speculation: a model drafts by diffusion and verifies autoregressively, on one cache.

A round of two forwards: the draft forward sees the last token and masks after it, all of each
other, and stores nothing; every mask predicts its own position. The verify forward is causal over
the drafts and stores its rows: what it picks is what autoregressive decoding would pick, as long as
the drafts before it are right. Its picks are written, never the drafts, so the answer is
``Autoregressive``'s token by token at every temperature, whatever the drafts: they draw under the
noise of the same position, and a bad draft costs speed alone. Rows stored for wrong drafts are
overwritten by the next round, which begins there.

A round of one forward verifies the drafts and, in the same forward, drafts the next round after
each of them, for every outcome that the verification may have.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydllm._checks import check_bool, check_int, check_number
from pydllm.decoding.autoregressive import expect_causal, expect_prompts
from pydllm.decoding.call import Call
from pydllm.decoding.driver import Algorithm
from pydllm.decoding.speculative_rounds import OneForwardDecoder, SpeculativeDecoder
from pydllm.models import Model

_DRAFTS = {2: 31, 1: 7}  # by default, of rounds of that many forwards


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Algorithm):
    """The tokens of ``Autoregressive`` in fewer forwards, drafted by the model's own diffusion.

    For diffusion models that were trained to be read causally (``ModelSpec.causal``):
    ``"shifted"``, such as Nemotron-Labs-Diffusion and Fast-dLLM v2, or ``"masked"``, such as SDAR.

    Attributes:
        drafts: masks that a round drafts, at least 1; a round writes up to one token more. None: 31
            with two forwards, 7 with one.
        forwards: of a round. 2: a draft of ``drafts + 1`` rows and a verification of as many
            (twice as many for a ``"masked"`` model). 1, for ``"shifted"`` models: both in one of
            ``(drafts + 1) (drafts + 2)`` rows. It is faster where rows cost little.
        threshold: probability in [0, 1]; drafts below it are drafted again, given those above and
            the best one, until none is left. None: one forward drafts all. With two forwards.
        adapter: draft with the model's draft adapter, where it has one.
        align: end a draft forward where a block of the model ends, as its training did. With two
            forwards, for models that have blocks.

    ``Generation.nfe`` counts all forwards, ``Generation.rounds`` rounds.
    """

    drafts: int | None = None
    forwards: int = 2
    threshold: float | None = None
    adapter: bool = True
    align: bool = False

    def __post_init__(self) -> None:
        if self.drafts is not None:
            check_int("drafts", self.drafts, 1)
        check_int("forwards", self.forwards, 1, 2)
        check_bool("adapter", self.adapter)
        check_bool("align", self.align)
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0, 1)
        for name, default in (("threshold", None), ("align", False)):
            value = getattr(self, name)
            if self.forwards == 1 and value != default:
                raise ValueError(f"{name}: expected {default} with forwards=1, got {value!r}")

    def check(self, model: Model, max_new_tokens: int) -> None:
        spec = model.spec
        expect_causal("SelfSpeculative", spec)
        if spec.attention == "causal":
            raise ValueError("SelfSpeculative: expected a diffusion model, got 'causal' attention")
        if spec.causal == "masked" and self.forwards == 1:
            raise ValueError(
                "forwards: expected 2 with a model whose causal forward predicts a token at a mask "
                "(causal='masked'), got 1"
            )
        if spec.causal == "masked" and not getattr(model, "has_leaves", True):
            raise ValueError(
                "SelfSpeculative: expected a model whose experts are not admitted by block, "
                "or causal='shifted'"
            )
        if self.align and not spec.block_size:
            raise ValueError("align: expected False for a model without blocks, got True")

    def decoder(self, call: Call) -> SpeculativeDecoder:
        expect_prompts(call)
        kind = SpeculativeDecoder if self.forwards == 2 else OneForwardDecoder
        return kind(
            drafts=_DRAFTS[self.forwards] if self.drafts is None else self.drafts,
            adapter=self.adapter and getattr(call.model, "has_draft_adapter", False),
            threshold=self.threshold,
            aligned=self.align,
            is_masked=call.model.spec.causal == "masked",
        )
