"""FreeDave's ``DLMGeneration``, on kernels.

from pydllm.integrations.freedave import DLMGeneration  # instead of FreeDave's generation.core
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm._checks import check_bool, check_choice, check_int, check_number
from pydllm.integrations._arguments import (
    as_model,
    check_prompt,
    check_temperature,
    check_token,
    follows,
    left_padding,
    with_ids,
)
from pydllm.integrations._freedave import BlockLoop, FreeDaveLoop, FullLoop, Rule
from pydllm.integrations._outputs import Output
from pydllm.integrations._sampling import check_filters
from pydllm.models import Model

__all__ = [
    "DLMGeneration",
    "DLMGenerationOutput",
    "block_decode_with_block_attention",
    "block_decode_with_block_attention_FreeDave",
    "block_decode_with_full_attention",
    "block_decode_with_full_attention_FreeDave",
]


@dataclass
class DLMGenerationOutput(Output):
    """What the functions return; the first four are the original's.

    Attributes:
        sequences: ``(B, L)`` int64, prompt and answer.
        trajectory_step_map: ``(B, L - P)`` int64, the step that wrote a position, or -1.
        num_proposed_tokens, num_hit_tokens: tokens of the last draft of every round, and those
            that were kept; of the functions for block-causal models.
        nfe: forwards.
    """

    sequences: Tensor
    trajectory_step_map: Tensor
    num_proposed_tokens: Tensor | None = None
    num_hit_tokens: Tensor | None = None
    nfe: int | None = None


@torch.no_grad()
def block_decode_with_full_attention(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    block_length: int | None = 32,
    max_gen_length: int = 128,
    decoding_steps: int = 128,
    use_cache: bool = False,
    dual_cache: bool = False,
    mask_token_id: int = 151666,
    eos_token_id: int = 151645,
    pad_token_id: int = 151643,
    pad_target_penalty: float = 1.0,
    confidence_threshold: float | None = None,
    early_exit: bool = False,
    *,
    compat: str | None = "freedave",
    backend: str | None = None,
) -> DLMGenerationOutput:
    """Fill the blocks after the prompt one after the other, a token a forward.

    Args:
        model: a loaded LLaDA or Dream module, whose weights are shared, or a pydllm model.
        input_ids: ``(B, P)`` token ids. Masks in it stay.
        attention_mask: ``(B, P)``, zeros on the left for padding, or None.
        temperature: of tokens and confidences; at 0 the filters are not read.
        top_p, top_k: the ids that count.
        alg_temp: None or 0: the most confident first; -1: from the left.
        block_length: tokens in a block; None: all.
        max_gen_length: new tokens, whole blocks.
        decoding_steps: forwards at most, a multiple of the number of blocks. A block ends with its
            share, and may keep masks.
        use_cache, pad_target_penalty: not read, as in the original, whose models always cache.
        dual_cache: keep the keys after the block, too.
        mask_token_id, eos_token_id, pad_token_id: token ids.
        confidence_threshold: write all tokens that reach it, and the best.
        early_exit: a block of ``eos_token_id`` alone in all sequences, or of ``pad_token_id``,
            ends the generation; the rest is filled with it.
        compat: ``"freedave"``: tokens drawn by torch's generator in the original's order, and the
            mask may be predicted. None: drawn in the kernel, as a function of the state alone
            (FreeDave then gives the static loop's tokens for a seed); the mask is never predicted.
        backend: as in ``pydllm.ops``.

    Returns:
        Sequences ``(B, P + max_gen_length)`` and their step map; ``nfe`` besides.

    Raises:
        ValueError, TypeError: an argument out of range.
    """
    own = _model(model, "block_decode_with_full_attention", "full", mask_token_id)
    size, prompt = _read_full(own, input_ids, block_length, max_gen_length)
    blocks = max_gen_length // size
    check_int("decoding_steps", decoding_steps, 1)
    if decoding_steps % blocks:
        raise ValueError(
            f"decoding_steps: expected a multiple of the {blocks} blocks, got {decoding_steps}"
        )
    ends = (eos_token_id, pad_token_id) if check_flag("early_exit", early_exit) else ()
    loop = FullLoop(
        **_shared(own, temperature, top_p, top_k, alg_temp, confidence_threshold, ends, compat),
        block_length=size,
        draft_steps=None,
        eager=False,
        dual=check_flag("dual_cache", dual_cache),
        forwards=decoding_steps // blocks,
        pad=left_padding(attention_mask, prompt),
    )
    return _run(loop, own, prompt, max_gen_length, backend)


@torch.no_grad()
def block_decode_with_full_attention_FreeDave(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    block_length: int | None = 32,
    max_gen_length: int = 128,
    decoding_steps: int = 128,
    draft_steps: int = 1,
    eager_acceptance_mode: bool = False,
    draft_mode: str = "tree_attention",
    use_cache: bool = False,
    dual_cache: bool = False,
    mask_token_id: int = 151666,
    eos_token_id: int = 151645,
    pad_token_id: int = 151643,
    pad_target_penalty: float = 1.0,
    confidence_threshold: float | None = None,
    early_exit: bool = False,
    *,
    compat: str | None = "freedave",
    backend: str | None = None,
) -> DLMGenerationOutput:
    """The same tokens in fewer forwards: ``draft_steps`` next states are verified by one.

    Args:
        input_ids: ``(1, P)`` token ids.
        decoding_steps: not read, as in the original.
        draft_steps: states that a forward verifies at most.
        eager_acceptance_mode: drafts run on into later blocks. With full attention the tokens are
            then others than the static loop's.
        draft_mode: ``"batch_expanding"``, ``"tree_attention"`` or ``"debug"``: the original's three
            ways to the same result. Here candidates share the cached keys in one forward.

    The other arguments as in ``block_decode_with_full_attention``. Where the original fails (eager
    with a dual cache) drafts do what the arguments say. On a model with shifted logits and without
    ``eager_acceptance_mode`` a block of two tokens keeps one mask, as there.

    Raises:
        ValueError, TypeError: an argument out of range.
        PydllmError: the model predicts masks, and the original does not return.
    """
    own = _model(model, "block_decode_with_full_attention_FreeDave", "full", mask_token_id)
    size, prompt = _read_full(own, input_ids, block_length, max_gen_length)
    _check_drafts(prompt, draft_steps, draft_mode)
    ends = (eos_token_id, pad_token_id) if check_flag("early_exit", early_exit) else ()
    loop = FullLoop(
        **_shared(own, temperature, top_p, top_k, alg_temp, confidence_threshold, ends, compat),
        block_length=size,
        draft_steps=draft_steps,
        eager=check_flag("eager_acceptance_mode", eager_acceptance_mode),
        dual=check_flag("dual_cache", dual_cache),
        forwards=0,
        pad=left_padding(attention_mask, prompt),
    )
    return _run(loop, own, prompt, max_gen_length, backend)


@torch.no_grad()
def block_decode_with_block_attention(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    block_length: int = 32,
    max_gen_length: int = 128,
    decoding_steps: int = 128,
    use_cache: bool = True,
    mask_token_id: int = 151669,
    eos_token_id: int = 151643,
    pad_token_id: int = 151643,
    pad_target_penalty: float = 1.0,
    confidence_threshold: float | None = None,
    early_exit: bool = False,
    *,
    compat: str | None = "freedave",
    backend: str | None = None,
) -> DLMGenerationOutput:
    """Fill the blocks of a block-causal model, aligned to position 0, a token a forward.

    Args:
        model: a loaded SDAR or TraDo module, or a pydllm model with block-causal attention.
        input_ids: ``(1, P)`` token ids. Masks in the block that the prompt shares with the first
            new tokens are filled.
        attention_mask: None or ones. The original does not read it: padding would be text.
        max_gen_length: new tokens; rounded up to whole blocks of the whole sequence.
        decoding_steps, use_cache, pad_token_id, pad_target_penalty: not read, as in the original.
        early_exit: a block of ``eos_token_id`` alone ends the generation.

    The other arguments as in ``block_decode_with_full_attention``.

    Returns:
        Sequences ``(1, L)``, L a multiple of ``block_length``, their step map, the tokens that were
        proposed and kept, and ``nfe``: with a forward for the prompt and one for each block's keys.

    Raises:
        ValueError, TypeError: an argument out of range.
        PydllmError: a block keeps masks, because the model predicts them; the original fails.
    """
    own, prompt, new = _read_block(
        "block_decode_with_block_attention",
        (model, input_ids, attention_mask),
        (mask_token_id, block_length, max_gen_length),
    )
    ends = (eos_token_id,) if check_flag("early_exit", early_exit) else ()
    loop = BlockLoop(
        **_shared(own, temperature, top_p, top_k, alg_temp, confidence_threshold, ends, compat),
        block_length=block_length,
        draft_steps=None,
        eager=False,
    )
    return _run(loop, own, prompt, new, backend)


@torch.no_grad()
def block_decode_with_block_attention_FreeDave(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    block_length: int = 32,
    max_gen_length: int = 128,
    decoding_steps: int = 128,
    draft_steps: int = 1,
    eager_acceptance_mode: bool = False,
    draft_mode: str = "tree_attention",
    use_cache: bool = False,
    mask_token_id: int = 151669,
    eos_token_id: int = 151643,
    pad_token_id: int = 151643,
    pad_target_penalty: float = 1.0,
    confidence_threshold: float | None = None,
    early_exit: bool = False,
    *,
    compat: str | None = "freedave",
    backend: str | None = None,
) -> DLMGenerationOutput:
    """The same tokens in fewer forwards; arguments as in the other functions.

    With ``eager_acceptance_mode`` an EOS block that was completed ahead does not end the
    generation, as in the original.

    Raises:
        ValueError, TypeError: an argument out of range.
        PydllmError: the model predicts masks, and the original does not return.
    """
    own, prompt, new = _read_block(
        "block_decode_with_block_attention_FreeDave",
        (model, input_ids, attention_mask),
        (mask_token_id, block_length, max_gen_length),
    )
    _check_drafts(prompt, draft_steps, draft_mode)
    ends = (eos_token_id,) if check_flag("early_exit", early_exit) else ()
    loop = BlockLoop(
        **_shared(own, temperature, top_p, top_k, alg_temp, confidence_threshold, ends, compat),
        block_length=block_length,
        draft_steps=draft_steps,
        eager=check_flag("eager_acceptance_mode", eager_acceptance_mode),
    )
    return _run(loop, own, prompt, new, backend)


class DLMGeneration:
    """The original's class: its methods are this module's functions, its arguments are not read.

    The model says where it is, and its attention takes no mask of a kind of its own.
    """

    block_decode_with_full_attention = staticmethod(block_decode_with_full_attention)
    block_decode_with_full_attention_FreeDave = staticmethod(
        block_decode_with_full_attention_FreeDave
    )
    block_decode_with_block_attention = staticmethod(block_decode_with_block_attention)
    block_decode_with_block_attention_FreeDave = staticmethod(
        block_decode_with_block_attention_FreeDave
    )

    def __init__(
        self,
        sdpa_additive_attention_mask: bool = False,
        seed: int | None = None,
        device: torch.device | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.sdpa_additive_attention_mask = sdpa_additive_attention_mask
        self.seed, self.device = seed, device


def check_flag(name: str, value: object) -> bool:
    check_bool(name, value)
    return bool(value)


def _model(source: Any, name: str, attention: str, mask_id: int, **changes: Any) -> Model:
    model = as_model(source)
    if model.spec.attention != attention:
        raise ValueError(
            f"{name}: expected a model with {attention} attention, got {model.spec.attention}"
        )
    return with_ids(model, mask_id, **changes)


def _read_full(own: Model, ids: Tensor, size: int | None, new: int) -> tuple[int, Tensor]:
    """Block length and prompt."""
    check_int("max_gen_length", new, 1)
    size = new if size is None else size
    check_int("block_length", size, 1)
    if new % size:
        raise ValueError(f"max_gen_length: expected a multiple of block_length {size}, got {new}")
    return size, check_prompt("input_ids", ids, own, new)


def _read_block(
    name: str, source: tuple[Any, Tensor, Tensor | None], numbers: tuple[int, int, int]
) -> tuple[Model, Tensor, int]:
    """Model, prompt ``(1, P)``, and masks after it."""
    model, ids, attention_mask = source
    mask_id, size, new = numbers
    check_int("block_length", size, 1)
    check_int("max_gen_length", new, 1)
    own = _model(model, name, "block_causal", mask_id, block_size=size)
    prompt = check_prompt("input_ids", ids, own, new)
    if len(prompt) != 1:
        raise ValueError(f"input_ids: expected one sequence, (1, P), got {tuple(prompt.shape)}")
    if left_padding(attention_mask, prompt) is not None:
        raise ValueError("attention_mask: expected ones (padding is not hidden), got zeros")
    total = -(-(prompt.shape[1] + new) // size) * size
    check_prompt("input_ids", prompt, own, total - prompt.shape[1])
    return own, prompt, total - prompt.shape[1]


def _check_drafts(prompt: Tensor, draft_steps: int, draft_mode: str) -> None:
    check_int("draft_steps", draft_steps, 1)
    check_choice("draft_mode", draft_mode, ("batch_expanding", "tree_attention", "debug"))
    if len(prompt) != 1:
        raise ValueError(f"input_ids: expected one sequence, (1, P), got {tuple(prompt.shape)}")


def _shared(
    own: Model,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    alg_temp: float | None,
    threshold: float | None,
    ends: tuple[int, ...],
    compat: str | None,
) -> dict[str, Any]:
    """Arguments of every loop."""
    check_temperature(temperature)
    check_filters(top_k, top_p)
    if alg_temp not in (None, 0, -1):
        raise ValueError(f"alg_temp: expected None, 0 or -1, got {alg_temp!r}")
    if threshold is not None:
        check_number("confidence_threshold", threshold, 0, infinite=True)
    for token in ends:
        check_token("eos_token_id, pad_token_id", token, own)
    return {
        "rule": Rule(
            mask_id=own.spec.mask_id or 0,
            threshold=threshold,
            left_to_right=alg_temp == -1,
        ),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "end_ids": ends,
        "cached": True,
        "published": follows(compat, "freedave"),
    }


def _run(
    loop: FreeDaveLoop, own: Model, prompt: Tensor, new: int, backend: str | None
) -> DLMGenerationOutput:
    decoded = loop.run(own, prompt, new, backend)
    counted: dict[str, Any] = {}
    if isinstance(loop, BlockLoop):
        counted = {
            "num_proposed_tokens": torch.tensor(loop.proposed, device=prompt.device),
            "num_hit_tokens": torch.tensor(loop.hit, device=prompt.device),
        }
    return DLMGenerationOutput(
        decoded.x,
        loop.step_map[:, prompt.shape[1] :],
        **counted,
        nfe=int(decoded.counters["nfe"][0]),
    )
