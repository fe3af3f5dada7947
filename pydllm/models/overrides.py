"""A model's facts, from its files and from what the caller says instead of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydllm.models.config import Config
from pydllm.models.families import Family, Sizes
from pydllm.models.spec import ATTENTIONS, CAUSAL, ORIGINS, ModelSpec


@dataclass(frozen=True)
class Overrides:
    """What replaces the files' word, as the arguments of ``pydllm.load``; None: it stands."""

    attention: str | None = None
    block_size: int | None = None
    block_origin: str | None = None
    mask_id: int | None = None
    eos_ids: int | Sequence[int] | None = None
    shift_logits: bool | None = None
    causal: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ATTENTIONS),
            ("block_origin", ORIGINS),
            ("causal", CAUSAL),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        size = self.block_size
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"block_size: expected an integer of at least 1, got {size!r}")
        if self.shift_logits is not None and not isinstance(self.shift_logits, bool):
            raise TypeError(f"shift_logits: expected True or False, got {self.shift_logits!r}")

    def ids(self, name: str, limit: int) -> tuple[int, ...] | None:
        """The ids of an override; ``limit`` rows of the embedding bound them."""
        value = getattr(self, name)
        if value is None:
            return None
        ids = tuple(value) if isinstance(value, list | tuple | set | range) else (value,)
        for token in ids:
            if type(token) is not int or not 0 <= token < limit:
                raise ValueError(f"{name}: expected token ids in [0, {limit}), got {token!r}")
        return ids


def make_spec(
    config: Config,
    family: Family,
    sizes: Sizes,
    mask_id: int | None = None,
    *,
    eos_id: int | None = None,
    generation: Config | None = None,
    overrides: Overrides | None = None,
) -> ModelSpec:
    """The model's facts.

    Args:
        mask_id: the tokenizer's, taken where neither the configuration nor the family has one.
        eos_id: the tokenizer's, added to the files' EOS ids.
        generation: generation_config.json, whose EOS ids are added to those of ``config``.
        overrides: taken where they contradict the files.

    Raises:
        CheckpointError: the files lack something or contradict themselves.
        ValueError: an override that is impossible.
    """
    overrides = overrides or Overrides()
    attention, block_size = _attention(config, family, overrides)
    blocks = attention == "block_causal"
    own = attention == family.attention or (blocks and family.optional_blocks)
    origin = overrides.block_origin or (family.block_origin if blocks and own else "zero")
    if origin == "prompt" and not blocks:
        raise ValueError(
            f"block_origin: expected 'zero' with attention {attention!r}, got {origin!r}"
        )
    causal = overrides.causal
    if causal is None:
        causal = "shifted" if attention == "causal" else family.causal if blocks and own else None
    shift = family.shift_logits if overrides.shift_logits is None else overrides.shift_logits
    if attention == "causal" and causal == "masked":
        raise ValueError("causal: expected 'shifted' with attention 'causal', got 'masked'")
    eos = _eos_ids(config, family, sizes, generation, overrides, eos_id)
    mask = _mask_id(config, family, sizes, mask_id, overrides, attention)
    given = overrides.mask_id is not None or overrides.eos_ids is not None
    if given and mask is not None and mask in eos:
        raise ValueError(f"mask_id: expected another id than those of EOS {eos}, got {mask}")
    long = "max_sequence_length" if config.get("d_model") is not None else "max_position_embeddings"
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        mask_id=mask,
        eos_ids=eos,
        shift_logits=shift,
        attention=attention,
        block_size=block_size,
        max_positions=config.integer(long),
        causal=causal,
        block_origin=origin,
        context=family.context if blocks and own else "block",
        seeded=family.seeded and blocks and own,
        **_edit_ids(config, sizes, mask),
    )


def _edit_ids(config: Config, sizes: Sizes, mask_id: int | None) -> dict[str, int]:
    """The ids that delete and split, of a model that has both."""
    keys = ("delete_token_id", "split_token_id")
    found: dict[str, int] = {}
    for key in keys:
        ids = config.ids(key, sizes.embeddings)
        if len(ids) > 1 or (ids and ids[0] in (mask_id, *found.values())):
            raise config.wrong(key, "one token id, not the mask's and not another's")
        if ids:
            found[key] = ids[0]
    if len(found) == 1:
        absent = next(key for key in keys if key not in found)
        raise config.wrong(absent, f"an id beside {next(iter(found))}")
    return {key.replace("_token", ""): token for key, token in found.items()}


def _attention(config: Config, family: Family, overrides: Overrides) -> tuple[str, int | None]:
    """Attention and block size."""
    attention = overrides.attention
    if attention is None:
        by_key = family.optional_blocks and config.get(family.block_key) is not None
        attention = "block_causal" if by_key else family.attention
    if attention != "block_causal":
        if overrides.block_size is not None:
            raise ValueError(
                f"block_size: expected none with attention {attention!r}, got "
                f"{overrides.block_size} (attention='block_causal' makes blocks)"
            )
        return attention, None
    if overrides.block_size is not None:
        return attention, overrides.block_size
    if config.get(family.block_key) is None and family.block_size is None:
        raise config.wrong(
            family.block_key, "an integer of at least 1 (load(..., block_size=) gives it)"
        )
    return attention, config.integer(family.block_key, family.block_size)


def _eos_ids(
    config: Config,
    family: Family,
    sizes: Sizes,
    generation: Config | None,
    overrides: Overrides,
    eos_id: int | None,
) -> tuple[int, ...]:
    given = overrides.ids("eos_ids", sizes.embeddings)
    if given is not None:
        return tuple(dict.fromkeys(given))
    found = config.ids("eos_token_id", sizes.embeddings, "eos_ids")
    if generation is not None:
        found += generation.ids("eos_token_id", sizes.embeddings, "eos_ids")
    if eos_id is not None and eos_id < sizes.embeddings:
        found += (eos_id,)
    known = tuple(token for token in family.eos_ids if token < sizes.embeddings)
    return tuple(dict.fromkeys(found)) or known


def _mask_id(
    config: Config,
    family: Family,
    sizes: Sizes,
    tokenizers: int | None,
    overrides: Overrides,
    attention: str,
) -> int | None:
    given = overrides.ids("mask_id", sizes.embeddings)
    if given is not None:
        if len(given) != 1:
            raise ValueError(f"mask_id: expected one token id, got {overrides.mask_id!r}")
        return given[0]
    if family.attention == "causal" and attention == "causal":
        return None
    for key in ("mask_token_id", "mask_id"):
        found = config.ids(key, sizes.embeddings, "mask_id")
        if found:
            return found[0]
    if family.mask_id is not None and family.mask_id < sizes.embeddings:
        return family.mask_id
    if tokenizers is None and attention != "causal":
        raise config.wrong(
            "mask_token_id", "the id of the mask token (load(..., mask_id=) gives it)"
        )
    return tokenizers
