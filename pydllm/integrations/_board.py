"""What the samplers of this room share: a model for the caller's, and a board of sequences.

The published loops keep one matrix of tokens, equally long rows, prompts padded on the left. A
``Board`` is that matrix with the parts of a denoising step: window forward, statistics, accept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydllm import ops
from pydllm._backend.errors import PydllmError
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
    vocab = model.spec.vocab_size
    for name, token in (("mask_id", mask_id), *(("eos_id", token) for token in eos_ids)):
        if not (isinstance(token, int) and 0 <= token < vocab):
            raise ValueError(f"{name}: expected a token id in [0, {vocab}), got {token!r}")
    twin = copy.copy(model)
    twin.spec = replace(model.spec, mask_id=mask_id, eos_ids=eos_ids, **changes)
    return twin


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
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    if gen_length % block_length:
        raise ValueError(
            f"gen_length: expected a multiple of block_length {block_length}, got {gen_length}"
        )
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
    return blocks, steps // blocks


def check_temperature(temperature: float) -> None:
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise ValueError(f"temperature: expected 0 or at least 1e-6, got {temperature!r}")


def draw_seed() -> int:
    """A seed for our noise from torch's generator, so that ``torch.manual_seed`` decides it."""
    return int(torch.randint(2**62, ()))


def raise_stuck() -> None:
    raise PydllmError(
        "the model predicts the mask at every masked position of a block, which the published loop "
        "never leaves; compat=False does not allow the prediction"
    )


class Board:
    """Tokens ``x (B, L)``, masks among them, and what a step does with them.

    Args:
        pad: ``(B,)`` int32, positions of left padding, or None.
        cached: keep keys and values.
        banned: ids that are not predicted and count as impossible.

    Attributes:
        forwards: how many there were.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        *,
        pad: Tensor | None = None,
        cached: bool = False,
        banned: Sequence[int] = (),
        backend: str | None = None,
    ) -> None:
        if model.spec.mask_id is None:
            raise ValueError("model: expected one with a mask id, got none")
        self.model, self.x, self.pad, self.backend = model, x, pad, backend
        self.mask_id, self.length = model.spec.mask_id, x.shape[1]
        self.cache = model.new_cache(x.shape[0], x.shape[1] if cached else 0)
        self.banned = tuple(banned)
        self.seed, self.forwards = 0, 0
        self.step_map = torch.full_like(x, -1, dtype=torch.int32)
        self.nfe = torch.zeros_like(x[:, 0], dtype=torch.int32)
        self._request = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        self._hidden, self._start = x.new_empty(0), 0

    @classmethod
    def behind(cls, prompt: Tensor, new: int, model: Model, **options: Any) -> Board:
        """The prompt and ``new`` masks."""
        masks = prompt.new_full((prompt.shape[0], new), model.spec.mask_id or 0)
        return cls(model, torch.cat((prompt, masks), 1), **options)

    def forward(self, start: int, stop: int, *, seen: int | None = None, commit: int = 0) -> None:
        """Compute positions [start, stop); cached ones before them and up to ``seen`` are seen.

        The first ``commit`` positions of the window are cached.
        """

        def each(number: int) -> Tensor:
            return torch.full_like(self.nfe, number)

        self._start = start
        self._hidden = self.model.forward(
            self.x[:, start:stop].contiguous(),
            each(start),
            self.cache,
            length=each(stop - start),
            kv_len=each(stop if seen is None else seen),
            commit=each(commit),
            pad=self.pad,
            backend=self.backend,
        )
        self.forwards += 1

    def masked(self, first: int, last: int) -> Tensor:
        return self.x[:, first:last] == self.mask_id

    def masks_left(self, *spans: tuple[int, int]) -> list[int]:
        """How many masks each span [first, last) has, read on the host."""
        return torch.stack([self.masked(*span).sum() for span in spans]).tolist()

    def first_mask(self, last: int) -> int:
        """The first position before ``last`` at which a sequence has a mask, read on the host.

        Statistics are wanted from there on: on a GPU every position costs a row of the head.
        """
        return int(self.masked(0, last).any(0).int().argmax())

    def _rows(self, first: int, last: int) -> Tensor:
        """Which rows of the window predict positions [first, last).

        In a shifted model row p - 1 predicts position p. Where the window begins at p, its own row
        is taken, which is what the published loops do.
        """
        shift = self._start + int(self.model.spec.shift_logits)
        rows = torch.arange(first, last, device=self.x.device) - shift
        return rows.clamp_(0, self._hidden.shape[1] - 1)

    def logits(self, first: int, last: int) -> Tensor:
        """``(B, S, V)`` for positions [first, last) of the last forward."""
        return self.model.head(self._hidden[:, self._rows(first, last)])

    def stats(
        self,
        first: int,
        last: int,
        *,
        banned: Sequence[int] = (),
        temperature: float = 0.0,
        tempered: bool = False,
    ) -> ops.VocabStats:
        """Statistics ``(B, S)`` of positions [first, last); logits are not stored.

        On a CPU rows that are no masks are left out: token 0, scores 0.
        """
        batch, window, size = self._hidden.shape
        x, width = self.x, last - first
        rows = self._rows(first, last)
        rows = (torch.arange(batch, device=x.device)[:, None] * window + rows).flatten()
        counter = live = None
        if temperature > 0:
            position = torch.arange(first, last, dtype=torch.int32, device=x.device)
            words = (
                position.expand(batch, width),
                self._request[:, None].expand(batch, width),
                torch.full_like(self._request, self.forwards)[:, None].expand(batch, width),
            )
            counter = torch.stack(words, -1).reshape(-1, 3)
        if x.device.type == "cpu":
            live = self.masked(first, last).flatten().nonzero().squeeze(1)
            rows = rows[live]
            counter = None if counter is None else counter[live]
        ids = sorted({*self.banned, *banned})
        stats = self.model.head_stats(
            self._hidden.reshape(-1, size),
            rows,
            temperature=temperature,
            seed=self.seed,
            counter=counter,
            tempered=tempered,
            banned=torch.tensor(ids, dtype=torch.int32, device=x.device) if ids else None,
            backend=self.backend,
        )
        if live is not None:
            stats = ops.VocabStats(
                *(field.new_zeros(batch * width).index_copy_(0, live, field) for field in stats)
            )
        return ops.VocabStats(*(field.view(batch, width) for field in stats))

    def write(self, first: int, token: Tensor, score: Tensor, **rule: Any) -> None:
        """Write what a rule takes of the masks in [first, first + S); see ``ops.unmask``."""
        width = token.shape[1]
        ops.unmask(
            self.x,
            self.step_map,
            self.nfe,
            token,
            score,
            mask_id=self.mask_id,
            start=torch.full_like(self.nfe, first),
            length=torch.full_like(self.nfe, width),
            seed=self.seed,
            request=self._request,
            backend=self.backend,
            **rule,
        )

    def write_top(
        self,
        first: int,
        token: Tensor,
        score: Tensor,
        count: int,
        *,
        width: int | None = None,
        masks_only: bool = True,
    ) -> None:
        """Write so many positions of [first, first + S), chosen by ``torch.topk``, masks first.

        Where filters leave one id, confidences are exactly equal, and which of them the published
        loops take is the affair of ``torch.topk`` among ``width`` of them, S or more; ``write``
        takes the first. Without ``masks_only`` known tokens follow where there are too few masks.
        """
        size = token.shape[1]
        masked = self.masked(first, first + size)
        beyond = (width or size) - size
        wide = F.pad(score.masked_fill(~masked, -torch.inf), (0, beyond), value=-torch.inf)
        index = wide.topk(min(count, size)).indices
        chosen = torch.zeros_like(wide, dtype=torch.bool).scatter(1, index, True)[:, :size]
        if masks_only:
            chosen = chosen & masked
        window = self.x[:, first : first + size]
        window.copy_(torch.where(chosen, token, window))
