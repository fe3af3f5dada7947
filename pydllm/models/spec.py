"""What an algorithm has to know of a model."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTIONS = ("full", "block_causal", "causal")
CAUSAL = ("shifted", "masked")
ORIGINS = ("zero", "prompt")
CONTEXTS = ("block", "causal")


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a model that do not depend on its size.

    Attributes:
        vocab_size: columns of the logits; token ids are below it.
        mask_id: id of the mask token; None for a model that has none.
        eos_ids: ids that end a sequence, the one that fills first; may be empty.
        shift_logits: row i predicts token i + 1, as in Dream, instead of token i.
        attention: ``"full"``, ``"block_causal"`` (full within a block, causal between blocks) or
            ``"causal"``.
        block_size: positions of a block of a block-causal model, otherwise None.
        max_positions: longest sequence the model is made for, in tokens.
        causal: how the model decodes one token at a time. ``"shifted"``: row i of a causal forward
            predicts token i + 1; ``"masked"``: a mask at i that sees the tokens before it predicts
            token i; None: it was not trained to.
        block_origin: position where a block begins: ``"zero"``, or ``"prompt"``, the prompt's end.
        context: what the cached keys and values of finished blocks are made by: ``"block"``, the
            forward of the block, or ``"causal"``, a causal forward.
        seeded: the first token of a block is the next token of the forward that stored the block
            before it.
        delete_id, split_id: ids that delete a token and that insert a mask before it, where
            they are predicted; None for models that edit no blocks like this.
    """

    vocab_size: int
    mask_id: int | None
    eos_ids: tuple[int, ...]
    shift_logits: bool
    attention: str
    block_size: int | None
    max_positions: int
    causal: str | None = None
    block_origin: str = "zero"
    context: str = "block"
    seeded: bool = False
    delete_id: int | None = None
    split_id: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ATTENTIONS),
            ("causal", (None, *CAUSAL)),
            ("block_origin", ORIGINS),
            ("context", CONTEXTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(str, allowed))}, "
                    f"got {getattr(self, name)!r}"
                )
        blocks = self.attention == "block_causal"
        if blocks != (self.block_size is not None):
            raise ValueError(
                "block_size: expected a number with attention 'block_causal' and None without, "
                f"got {self.block_size} with {self.attention!r}"
            )
        for name, plain in (("block_origin", "zero"), ("context", "block"), ("seeded", False)):
            if not blocks and getattr(self, name) != plain:
                raise ValueError(
                    f"{name}: expected {plain!r} with attention {self.attention!r}, "
                    f"got {getattr(self, name)!r}"
                )
