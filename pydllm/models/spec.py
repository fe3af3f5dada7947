"""What an algorithm has to know of a model."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTIONS = ("full", "block_causal", "causal")


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
        pad_id: id of the padding token, or None.
    """

    vocab_size: int
    mask_id: int | None
    eos_ids: tuple[int, ...]
    shift_logits: bool
    attention: str
    block_size: int | None
    max_positions: int
    pad_id: int | None

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"attention: expected one of {', '.join(ATTENTIONS)}, got {self.attention!r}"
            )
        if (self.attention == "block_causal") != (self.block_size is not None):
            raise ValueError(
                "block_size: expected a number with attention 'block_causal' and None without, "
                f"got {self.block_size} with {self.attention!r}"
            )
