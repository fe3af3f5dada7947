"""Arguments that the published loops share: the caller's model, prompts, padding, numbers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pydllm._backend.errors import PydllmError
from pydllm._checks import check_int, describe
from pydllm.models import Model, load

_KEPT = "_pydllm_model"


class _Kept:
    """A model made of a module, kept in the module's ``__dict__``: it lives as long as that does.

    Copies and pickles of the module do not take it along, they would share no memory.
    """

    def __init__(self, model: Model | None = None, place: tuple = ()) -> None:
        self.model, self.place = model, place

    def __deepcopy__(self, memo: dict) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple:
        return _Kept, ()


def as_model(source: Any) -> Model:
    """The caller's model as one of ours; a loaded module is adapted once, its weights are shared.

    Raises:
        CheckpointError: the module is of a family that ``pydllm.load`` does not know.
        TypeError: neither a module nor a model.
    """
    if not isinstance(source, nn.Module):
        if hasattr(source, "spec") and hasattr(source, "head_stats"):
            return source
        raise TypeError(f"model: expected a loaded module or a pydllm model, got {type(source)}")
    kept = source.__dict__.get(_KEPT)
    if kept is not None and kept.place == _place(source):
        return kept.model
    model = load(source)
    source.__dict__[_KEPT] = _Kept(model, _place(source))
    return model


def _place(module: nn.Module) -> tuple:
    """Where the parameters are: moving or casting a module ends the sharing of its memory."""
    return tuple((p.data_ptr(), p.dtype, p.device) for p in module.parameters())


def full_attention(source: Any, name: str, mask_id: int, *, shifted: bool) -> Model:
    """``as_model`` for a published loop of models that see everything.

    Ends of sequence mean nothing to it: these loops do not look for any.
    """
    model = as_model(source)
    spec = model.spec
    if spec.attention != "full" or spec.shift_logits != shifted:
        kind = "shifted" if shifted else "unshifted"
        got = "shifted" if spec.shift_logits else "unshifted"
        raise ValueError(
            f"{name}: expected a model with full attention and {kind} logits, "
            f"got {spec.attention} attention and {got} logits"
        )
    return with_ids(model, mask_id)


def with_ids(model: Model, mask_id: int, eos_ids: tuple[int, ...] = (), **changes: Any) -> Model:
    """The model, its weights shared, with other facts."""
    for name, token in (("mask_id", mask_id), *(("eos_id", token) for token in eos_ids)):
        check_token(name, token, model)
    twin = copy.copy(model)
    twin.spec = replace(model.spec, mask_id=mask_id, eos_ids=eos_ids, **changes)
    return twin


def check_token(name: str, token: object, model: Model) -> None:
    vocab = model.spec.vocab_size
    if not (type(token) is int and 0 <= token < vocab):
        raise ValueError(f"{name}: expected a token id in [0, {vocab}), got {describe(token)}")


def block_causal(source: Any, name: str, mask_id: int, block_length: int) -> Model:
    """``as_model`` for a published loop over blocks, of this length whatever the model's own is."""
    model = as_model(source)
    if model.spec.attention != "block_causal":
        raise ValueError(
            f"{name}: expected a model with block-causal attention, got {model.spec.attention}"
        )
    return with_ids(model, mask_id, block_size=block_length)


def expect_one(name: str, prompt: Tensor) -> None:
    if len(prompt) != 1:
        raise ValueError(f"{name}: expected one sequence, (1, P), got {tuple(prompt.shape)}")


def check_prompt(name: str, prompt: object, model: Model, new: int) -> Tensor:
    """The prompt ``(B, P)`` as int64 on the model's device."""
    if not isinstance(prompt, Tensor) or prompt.is_floating_point() or prompt.is_complex():
        got = prompt.dtype if isinstance(prompt, Tensor) else type(prompt)
        raise TypeError(f"{name}: expected a tensor of token ids, got {got}")
    if prompt.ndim != 2 or prompt.shape[0] == 0:
        raise ValueError(f"{name}: expected shape (B, P), got {tuple(prompt.shape)}")
    if model.spec.shift_logits and prompt.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one token, got none")
    vocab, limit = model.spec.vocab_size, model.spec.max_positions
    if prompt.numel() and (int(prompt.min()) < 0 or int(prompt.max()) >= vocab):
        raise ValueError(
            f"{name}: expected token ids in [0, {vocab}), "
            f"got {int(prompt.min())} to {int(prompt.max())}"
        )
    if limit is not None and prompt.shape[1] + new > limit:
        raise ValueError(
            f"{name}: expected at most {limit} positions, got {prompt.shape[1]} and {new} new ones"
        )
    return prompt.to(model.device, torch.int64)


def left_padding(mask: Tensor | None, prompt: Tensor) -> Tensor | None:
    """How many positions each row of a 0/1 attention mask hides on the left, ``(B,)`` int32.

    None where nothing is hidden. Only left padding can be said in this number.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(prompt.shape):
        raise ValueError(
            f"attention_mask: expected shape {tuple(prompt.shape)}, got {tuple(mask.shape)}"
        )
    seen = mask.to(prompt.device) != 0
    if bool(seen.all()):
        return None
    pad = (~seen).sum(1)
    position = torch.arange(prompt.shape[1], device=prompt.device)
    if not torch.equal(seen, position >= pad[:, None]):
        raise ValueError("attention_mask: expected zeros on the left alone, got zeros elsewhere")
    return pad.int()


def check_blocks(gen_length: int, block_length: int, steps: int) -> tuple[int, int]:
    """Blocks, and steps a block, as LLaDA and Fast-dLLM count them."""
    lengths = {"gen_length": gen_length, "block_length": block_length, "steps": steps}
    for name, value in lengths.items():
        check_int(name, value, 1)
    if gen_length % block_length:
        raise ValueError(
            f"gen_length: expected a multiple of block_length {block_length}, got {gen_length}"
        )
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
    return blocks, steps // blocks


def check_temperature(temperature: float) -> None:
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise ValueError(f"temperature: expected 0 or at least 1e-6, got {temperature!r}")


def follows(compat: object, name: str) -> bool:
    """Whether the published code of this name is followed in what it draws.

    Raises:
        TypeError: neither None nor the name; a bool is what these functions took before.
    """
    if compat is not None and compat != name:
        raise TypeError(f"compat: expected {name!r} or None, got {compat!r}")
    return compat is not None


def check_fills(prompt: Tensor, mask_id: int, published: bool) -> None:
    """Raise where masks of a prompt would be left, and no published code wants that.

    Raises:
        ValueError: there are masks, and ``compat=None``.
    """
    if not published and (count := int((prompt == mask_id).sum())):
        raise ValueError(
            f"prompt: with compat=None expected no masks, got {count} (pydllm.infill fills them)"
        )


def draw_seed() -> int:
    """A seed for our noise from torch's generator, so that ``torch.manual_seed`` decides it."""
    return int(torch.randint(2**62, ()))


def raise_stuck() -> None:
    raise PydllmError(
        "the model predicts the mask at every masked position of a block, which the published loop "
        "never leaves; compat=None does not allow the prediction"
    )
