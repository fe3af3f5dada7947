"""``generate`` and what it returns; the checks that every algorithm shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pydllm.decoding.graph import Eager, Runner, bucket, freeze, graphs_of, power_of_two
from pydllm.models import Model

_WARM = 3  # dummy batches: the first compiles, the second captures, the third is as any other


@dataclass(frozen=True)
class Step:
    """What ``on_step`` is handed after every forward.

    Attributes:
        index: forwards done so far in this call, this one included.
        x: ``(B, L)`` tokens, prompts and generation regions, masks included; do not write. With a
            block-causal model the rest of the last block stands behind the region.
        step_map: ``(B, L)`` int32, the forward (counted per sequence) that wrote a position, or -1.
        prompt_length: ``(B,)`` int32.
    """

    index: int
    x: Tensor
    step_map: Tensor
    prompt_length: Tensor


@dataclass(frozen=True)
class Generation:
    """Decoded sequences and what they cost.

    Attributes:
        sequences: one 1-D int64 tensor a prompt: the prompt and ``max_new_tokens`` ids; what
            follows the first end of sequence is end of sequence.
        nfe: ``(B,)`` int64, forwards of the diffusion model in which the sequence took part.
        tokens_per_forward: ``(B,)`` fp32, new tokens up to and including the first end of sequence,
            divided by ``nfe``.
        step_map: ``(B, max_new_tokens)`` int64, index of the forward whose result wrote the
            position, -1 for what was filled after an end of sequence.
        text: the new text of each sequence, where the model has a tokenizer.
        verifier_nfe: ``(B,)`` int64, forwards of the verifier in which the sequence took part; None
            for algorithms without one.
    """

    sequences: list[Tensor]
    nfe: Tensor
    tokens_per_forward: Tensor
    step_map: Tensor
    text: list[str] | None
    verifier_nfe: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """A checked call of ``generate``, as the algorithms receive it.

    Attributes:
        x: ``(B, L)`` int64 on the model's device: prompt, masks, and end of sequence behind them.
        prompt_length: ``(B,)`` int32 on the device.
        request_id: ``(B,)`` int32 on the device, what the noise is keyed by.
        eos: ``(E,)`` int64 on the device, ids that end a sequence; None where there are none.
        runner: how steps are run. Where it is static, rows are added up to a power of two, copies
            of the first, and slots up to a bucket.
        rows: sequences without those, 0 for all.
        longest: positions of the longest sequence, 0 for all.
        warm: take every step that a block may need, needed or not, so that all are captured.
    """

    model: Model
    mask_id: int
    x: Tensor
    prompt_length: Tensor
    request_id: Tensor
    max_new_tokens: int
    temperature: float | Tensor  # (B,) fp32 on the device, where each prompt has its own
    seed: int
    backend: str | None
    on_step: Callable[[Step], None] | None
    eos: Tensor | None = None
    runner: Runner = field(default_factory=Eager)
    rows: int = 0
    longest: int = 0
    warm: bool = False

    def report(self, step: Step) -> None:
        """Hand a step to who wants it, without the rows and slots that were added."""
        if self.on_step is None:
            return
        rows, size = self.rows or len(step.x), self.model.spec.block_size or 1
        longest = -(-(self.longest or step.x.shape[1]) // size) * size
        x, step_map = (t[:rows, :longest] for t in (step.x, step.step_map))
        self.on_step(Step(step.index, x, step_map, step.prompt_length[:rows]))

    @property
    def width(self) -> int:
        """Rows of a forward of whole sequences."""
        slots = self.x.shape[1]
        return self.runner.width(self.longest or slots, slots)

    @property
    def longest_prompt(self) -> int:
        """In tokens."""
        return (self.longest or self.x.shape[1]) - self.max_new_tokens

    def whole_blocks(self) -> Tensor:
        """``x``, copied; with a block-causal model masks fill up the last blocks."""
        size = self.model.spec.block_size
        if size is None:
            return self.x.clone()
        x = F.pad(self.x, (0, -self.x.shape[1] % size))
        total = (self.prompt_length + self.max_new_tokens)[:, None]
        position = torch.arange(x.shape[1], device=x.device)
        behind = (position >= total) & (position // size <= (total - 1) // size)
        return x.masked_fill_(behind, self.mask_id)


@dataclass(frozen=True)
class Decoded:
    """What an algorithm returns: the filled request and its counters, on the device."""

    x: Tensor
    step_map: Tensor
    nfe: Tensor
    verifier_nfe: Tensor | None = None


class Algorithm(Protocol):
    """A decoding algorithm: a frozen dataclass of its parameters that can run a request."""

    def check(self, model: Model, max_new_tokens: int) -> None:
        """Raise ValueError if this model or length cannot be decoded so."""

    def run(self, request: Request) -> Decoded:
        """Fill the masks of ``request.x``."""


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[str],
    algorithm: Algorithm,
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
    request_ids: Sequence[int] | None = None,
    backend: str | None = None,
    graph: bool | str = "auto",
    on_step: Callable[[Step], None] | None = None,
) -> Generation:
    """Decode a continuation of every prompt, ragged prompts in one batch.

    Args:
        model: what ``pydllm.load`` returned, or anything with the protocol ``pydllm.models.Model``.
        prompts: lists or 1-D tensors of token ids, or strings where the model has a tokenizer.
        algorithm: ``Static(...)``, ``Threshold(...)``, ``Factor(...)``, ``EntropyBound(...)``,
            ``FreeDave(...)``, ``APD(...)``, ``LeftToRight(...)`` or ``MultiBlock(...)``.
        max_new_tokens: length of every generation region, in tokens.
        temperature: 0 takes the arg-max; from 1e-6 on, tokens are drawn from
            softmax(logits / temperature). Or a list with one a prompt.
        seed: of the noise, in [0, 2^64). A prompt's noise depends on the seed, its request id, the
            position and the number of tokens decoded before, and on nothing else in the batch.
        request_ids: the prompts' ids in the noise key, int32; default 0, 1, 2, ...
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``, for every op.
        graph: replay the steps as CUDA graphs (docs/cuda-graphs.md): True; False; or ``"auto"``, on
            a GPU with a model of ``pydllm.load``, once a step has run a few times. The tokens are
            the same. ``pydllm.warmup`` captures beforehand. Without a GPU True replays the steps'
            operators, to test with.
        on_step: called after every forward with a ``Step``; reading its tensors waits for the
            device.

    Returns:
        A ``Generation``, on the CPU.

    Raises:
        ValueError, TypeError: an argument that cannot be decoded, said before anything runs.

    Example:
        >>> generation = pydllm.generate(model, ["how many ?"], pydllm.Threshold(0.9),
        ...                              max_new_tokens=64)
        >>> generation.text, generation.nfe
    """
    return _generate(
        model,
        prompts,
        algorithm,
        max_new_tokens,
        temperature,
        seed,
        request_ids,
        backend,
        graph,
        on_step,
    )


def warmup(
    model: Model,
    algorithm: Algorithm,
    batch: int,
    max_len: int,
    *,
    max_new_tokens: int | None = None,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
    backend: str | None = None,
) -> int:
    """Compile the kernels and capture the steps that calls of ``generate`` will replay.

    Decodes ``batch`` prompts of one repeated token, three times, without looking for ends, and with
    every step that a block may need. Calls of ``generate`` with the same model, algorithm and
    keywords, at most so many prompts and at most ``max_len`` positions use the buffers that this
    makes, cache of keys and values included. What such a call needs and has not been captured here
    is captured then: steps of fewer sequences for instance, or of a window of another width, as
    ``MultiBlock`` has.

    Args:
        model: what ``pydllm.load`` returned.
        algorithm: as in ``generate``.
        batch: prompts a call, at least 1; rounded up to a power of two.
        max_len: prompt and new tokens of the longest sequence; rounded up to a bucket.
        max_new_tokens: of the dummy batch; default half of ``max_len``.
        temperature, seed, backend: as in ``generate``; noise is captured with its seed.

    Returns:
        How many steps are captured for calls of this kind.

    Raises:
        ValueError, TypeError: as ``generate``.
        PydllmError: a step cannot be captured.
    """
    for name, value, least in (("batch", batch, 1), ("max_len", max_len, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    new = max_len // 2 if max_new_tokens is None else max_new_tokens
    if not isinstance(new, int) or not 1 <= new < max_len:
        raise ValueError(f"max_new_tokens: expected an int in [1, {max_len}), got {new!r}")
    token = next(t for t in range(model.spec.vocab_size) if t != model.spec.mask_id)
    for _ in range(_WARM):
        _generate(
            model,
            [[token] * (max_len - new)] * batch,
            algorithm,
            new,
            temperature,
            seed,
            None,
            backend,
            True,
            None,
            warm=True,
        )
    graphs = next(reversed(model.graphs.values()))  # type: ignore[attr-defined]
    return len(graphs.steps)


@torch.no_grad()
def _generate(
    model: Model,
    prompts: Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[str],
    algorithm: Algorithm,
    max_new_tokens: int,
    temperature: float | Sequence[float],
    seed: int,
    request_ids: Sequence[int] | None,
    backend: str | None,
    graph: bool | str,
    on_step: Callable[[Step], None] | None,
    *,
    warm: bool = False,
) -> Generation:
    """``generate``; ``warm``: no token ends a sequence, and every kind of step is taken."""
    mask_id = model.spec.mask_id
    if mask_id is None:
        raise ValueError("model: expected a masked diffusion model, got one without a mask id")
    ids = encode_prompts(model, prompts)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected an int of at least 1, got {max_new_tokens!r}")
    each = temperature if isinstance(temperature, Sequence) else [temperature]
    if not all(0.0 <= one < float("inf") for one in each):
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    if any(0 < one < 1e-6 for one in each):
        raise ValueError(f"temperature: expected 0 or at least 1e-6, got {temperature}")
    if isinstance(temperature, Sequence) and len(temperature) != len(ids):
        raise ValueError(f"temperature: expected {len(ids)}, one a prompt, got {len(temperature)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an int in [0, 2^64), got {seed}")
    request_ids = range(len(ids)) if request_ids is None else request_ids
    if len(request_ids) != len(ids):
        raise ValueError(f"request_ids: expected {len(ids)}, one a prompt, got {len(request_ids)}")
    longest = max(map(len, ids)) + max_new_tokens
    limit = model.spec.max_positions
    if limit is not None and longest > limit:
        raise ValueError(
            f"prompts: expected at most {limit} positions with max_new_tokens={max_new_tokens}, "
            f"got {longest}"
        )
    if graph not in (True, False, "auto"):
        raise ValueError(f"graph: expected True, False or 'auto', got {graph!r}")
    can = hasattr(model, "graphs")
    if graph is True and not can:
        raise ValueError(
            f"graph: expected a model of pydllm.load for True, got a {type(model).__name__}"
        )
    algorithm.check(model, max_new_tokens)

    device, spec = model.device, model.spec
    end = spec.eos_ids[0] if spec.eos_ids else 0
    x = torch.full((len(ids), longest), end)
    for row, prompt in enumerate(ids):
        x[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        x[row, len(prompt) : len(prompt) + max_new_tokens] = mask_id
    lengths = [len(prompt) for prompt in ids]
    request = Request(
        model=model,
        mask_id=mask_id,
        x=x.to(device),
        prompt_length=torch.tensor(lengths, dtype=torch.int32, device=device),
        request_id=torch.tensor(list(request_ids), dtype=torch.int32, device=device),
        max_new_tokens=max_new_tokens,
        temperature=torch.tensor(temperature, dtype=torch.float32, device=device)
        if isinstance(temperature, Sequence)
        else float(temperature),
        seed=seed,
        backend=backend,
        on_step=on_step,
        warm=warm,
    )
    if spec.eos_ids:
        eos = torch.tensor(spec.eos_ids, device=device)
        request = replace(request, eos=torch.full_like(eos, -1) if warm else eos)
    if graph is True or (graph == "auto" and device.type == "cuda" and can):
        request = _static(request, algorithm, auto=graph == "auto", sampled=max(each) > 0)
    return _collect(model, algorithm.run(request), lengths, max_new_tokens)


def _static(request: Request, algorithm: Algorithm, *, auto: bool, sampled: bool) -> Request:
    """The request over static buffers: rows and slots rounded up, so that calls share them."""
    model, (rows, longest) = request.model, request.x.shape
    batch, slots = power_of_two(rows), bucket(longest)
    size = lcm(16, model.spec.block_size or 1)
    slots = -(-slots // size) * size
    limit = model.spec.max_positions
    if limit is not None:
        slots = max(longest, min(slots, limit))
    temperature = request.temperature
    known = temperature if isinstance(temperature, float) else "each"
    # What noise is drawn with is captured, where there is any.
    noise = (known, request.seed if sampled or _is_random(algorithm) else None)
    kind = (freeze(algorithm), model.spec, noise, request.backend)
    runner = graphs_of(model, kind, batch, slots, auto=auto)
    slots = runner.slots
    copies = torch.arange(batch, device=request.x.device)
    copies = torch.where(copies < rows, copies, 0)
    spare = model.spec.eos_ids[0] if model.spec.eos_ids else 0
    x = F.pad(request.x, (0, slots - longest), value=spare)
    request = replace(
        request,
        x=x[copies],
        prompt_length=request.prompt_length[copies],
        request_id=request.request_id[copies],
        temperature=temperature[copies] if isinstance(temperature, Tensor) else temperature,
        runner=runner,
        rows=rows,
        longest=longest,
    )
    return request.runner.hold("request", request)


def _is_random(algorithm: object) -> bool:
    """Whether an order is drawn from the seed."""
    baseline = getattr(algorithm, "baseline", None) or algorithm
    return getattr(baseline, "score", None) == "random"


def encode_prompts(
    model: Model, prompts: Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[str]
) -> list[list[int]]:
    """Token ids of the prompts, checked against the model's vocabulary."""
    spec = model.spec
    if isinstance(prompts, (str, Tensor)) or len(prompts) == 0:
        raise ValueError(f"prompts: expected a list of one or more prompts, got {prompts!r:.80}")
    ids = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError(
                    f"prompts[{row}]: expected token ids (the model has no tokenizer), got a string"
                )
            try:
                ids.append(model.tokenizer.encode(prompt).ids)
            except Exception as error:  # what tokenizers raises has no type of its own
                raise ValueError(
                    f"prompts[{row}]: expected text that the tokenizer can encode, "
                    f"got {prompt!r:.80}: {error}"
                ) from error
            continue
        if isinstance(prompt, Tensor):
            if prompt.ndim != 1:
                raise ValueError(f"prompts[{row}]: expected shape (n,), got {tuple(prompt.shape)}")
            prompt = prompt.tolist()
        if not all(isinstance(token, int) for token in prompt):
            raise TypeError(f"prompts[{row}]: expected a list of ints, got {prompt!r:.80}")
        ids.append(list(prompt))
    for row, prompt in enumerate(ids):
        for place, token in enumerate(prompt):
            if not 0 <= token < spec.vocab_size:
                raise ValueError(
                    f"prompts[{row}][{place}]: expected a token id in [0, {spec.vocab_size}), "
                    f"got {token}"
                )
            if token == spec.mask_id:
                raise ValueError(
                    f"prompts[{row}][{place}]: expected no mask in a prompt, "
                    f"got the mask id {token}"
                )
        if spec.shift_logits and not prompt:
            raise ValueError(
                f"prompts[{row}]: expected at least one token (position i is predicted from "
                "i - 1), got none"
            )
    return ids


def _collect(
    model: Model, decoded: Decoded, prompt_lengths: list[int], max_new_tokens: int
) -> Generation:
    results = (decoded.x, decoded.step_map, decoded.nfe)
    rows = len(prompt_lengths)
    x, step_map, nfe = (result[:rows].to("cpu", torch.int64) for result in results)
    verifier_nfe = decoded.verifier_nfe
    new = [slice(n, n + max_new_tokens) for n in prompt_lengths]
    answers = torch.stack([x[row, part] for row, part in enumerate(new)])
    ends = torch.isin(answers, torch.tensor(model.spec.eos_ids, dtype=torch.int64))
    before_end = (ends.cumsum(1) == 0).sum(1)
    counted = (before_end + 1).clamp(max=max_new_tokens)
    text = None
    if model.tokenizer is not None:
        kept = [row[:n].tolist() for row, n in zip(answers, before_end, strict=True)]
        text = model.tokenizer.decode_batch(kept)
    return Generation(
        sequences=[x[row, : part.stop].clone() for row, part in enumerate(new)],
        nfe=nfe,
        tokens_per_forward=counted / nfe.clamp(min=1),
        step_map=torch.stack([step_map[row, part] for row, part in enumerate(new)]),
        text=text,
        verifier_nfe=None if verifier_nfe is None else verifier_nfe[:rows].to("cpu", torch.int64),
    )
