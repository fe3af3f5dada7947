"""``generate``, ``warmup``, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.context import compute_context
from pydllm._checks import check_bool
from pydllm.decoding.call import Call, Step, lay_out, padded_length
from pydllm.decoding.checks import expect_int
from pydllm.decoding.driver import Algorithm, Decoded, drive
from pydllm.decoding.finite import check_finite
from pydllm.decoding.graph import Eager, Graphs, cache_key, graphs_of, power_of_two
from pydllm.decoding.prompts import Prompt, encode_prompts
from pydllm.models import Model, NativeModel

_WARM = 3  # dummy batches: the first compiles, the second captures, the third is as any other
_COLDEST = 1e-6  # least temperature that is not 0
_HOTTEST = 1e6  # beyond it logits / temperature says nothing any more


@dataclass(frozen=True, repr=False)
class Generation:
    """Decoded sequences and what they cost.

    Attributes:
        sequences: one 1-D int64 tensor per prompt: the prompt and ``max_new_tokens`` ids;
            everything after the first EOS is EOS.
        new_tokens: the new ids of each sequence, up to and including its first EOS.
        finish_reason: ``"eos"``, or ``"length"`` where no EOS was written.
        nfe: ``(B,)`` int64, forwards of the diffusion model in which the sequence took part.
        tokens_per_forward: ``(B,)`` fp32, new tokens up to and including the first EOS, divided by
            ``nfe``.
        step_map: ``(B, max_new_tokens)`` int64, index of the forward whose result wrote the
            position, -1 for what was filled after an EOS.
        text: the new text of each sequence, where the model has a tokenizer.
        verifier_nfe: ``(B,)`` int64, forwards of the verifier in which the sequence took part; None
            for algorithms without one.
        rounds: ``(B,)`` int64, rounds of ``SelfSpeculative``; None for the others.
        finite: ``(B,)`` bool, False where the model computed NaN or infinity for the answer, which
            a RuntimeWarning says as well.
    """

    sequences: list[Tensor]
    new_tokens: list[Tensor]
    finish_reason: list[str]
    nfe: Tensor
    tokens_per_forward: Tensor
    step_map: Tensor
    text: list[str] | None
    verifier_nfe: Tensor | None = None
    rounds: Tensor | None = None
    finite: Tensor | None = None

    def __repr__(self) -> str:
        tokens = sum(map(len, self.new_tokens))
        return (
            f"Generation({len(self.sequences)} sequences, {tokens} new tokens, "
            f"{self.nfe.double().mean():.1f} forwards and "
            f"{self.tokens_per_forward.double().mean():.2f} tokens per forward on average)"
        )


def generate(
    model: Model,
    prompts: Sequence[Prompt] | Tensor | Mapping[str, Any],
    algorithm: Algorithm,
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
    request_ids: Sequence[int] | None = None,
    backend: str | None = None,
    graph: bool | str = "auto",
    max_batch: int | None = None,
    deterministic: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Generation:
    """Decode a continuation of every prompt, ragged prompts in one batch.

    Args:
        model: what ``pydllm.load`` returned, or anything with the protocol ``pydllm.models.Model``.
        prompts: a list: token ids (lists or 1-D tensors), strings, or chat messages (lists of
            ``{"role": ..., "content": ...}``), which the model's template renders. Or a ``(B, L)``
            tensor or array of ids, or a mapping with ``input_ids`` and ``attention_mask``.
        algorithm: ``Static(...)``, ``Threshold(...)``, ``Factor(...)``, ``EntropyBound(...)``,
            ``FreeDave(...)``, ``APD(...)``, ``LeftToRight(...)`` or ``MultiBlock(...)``.
        max_new_tokens: length of every generation region, in tokens.
        temperature: 0 takes the arg-max; from 1e-6 on, tokens are drawn from
            softmax(logits / temperature). Or a list with one per prompt.
        seed: of the noise, in [0, 2^64). A prompt's noise depends on the seed, its request id, the
            position and the number of tokens decoded before, and on nothing else in the batch.
        request_ids: the prompts' ids in the noise key, int32; default 0, 1, 2, ...
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``, for every op.
        graph: replay the steps as CUDA graphs (docs/cuda-graphs.md): True; False; or ``"auto"``, on
            a GPU with a model of ``pydllm.load``, once a step has run a few times. The tokens are
            the same. ``pydllm.warmup`` captures beforehand. Without a GPU True replays the steps'
            operators, to test with.
        max_batch: sequences in the batch at most; a waiting prompt takes the slot of a finished
            one. Default: all prompts. A prompt's answer, step map and forwards do not depend on it.
        deterministic: compute so that a row's bits do not depend on the batch or the number of
            candidates (``ops.linear`` in place of the BLAS's products). A sequence's tokens are
            then bitwise those that it has alone, and FreeDave's bitwise its baseline's, in bf16
            too. Slower.
        on_step: called after every forward with a ``Step`` of copies, which costs a copy of all
            tokens each time.

    Returns:
        A ``Generation``, on the CPU.

    Raises:
        ValueError, TypeError: an argument that cannot be decoded, said before anything runs.

    Example:
        >>> generation = pydllm.generate(model, ["how many ?"], pydllm.Threshold(0.9),
        ...                              max_new_tokens=64)
        >>> generation.text, generation.nfe
    """
    ids = encode_prompts(model, prompts)
    check_bool("deterministic", deterministic)
    if deterministic:
        if not isinstance(model, NativeModel):
            raise ValueError(
                "deterministic: expected a model of pydllm.load for True, "
                f"got a {type(model).__name__}"
            )
        model = model.deterministic()
    with compute_context(model.device):
        call = _call(
            model,
            ids,
            algorithm,
            max_new_tokens,
            temperature=temperature,
            seed=seed,
            request_ids=request_ids,
            backend=backend,
            on_step=on_step,
        )
        _check_batch(max_batch, graph, model)
        graphs = None
        if graph is True or (graph == "auto" and model.device.type == "cuda" and _records(model)):
            graphs = _graphs(call, algorithm, max_batch, auto=graph == "auto")
        return _run(call, algorithm, max_batch, graphs)


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
    keywords, at most ``batch`` prompts and at most ``max_len`` positions use the buffers that this
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
    expect_int("batch", batch, 1)
    expect_int("max_len", max_len, 2)
    new = max_len // 2 if max_new_tokens is None else max_new_tokens
    if type(new) is not int or not 1 <= new < max_len:
        raise ValueError(f"max_new_tokens: expected an int in [1, {max_len}), got {new!r}")
    _check_batch(None, True, model)
    token = next(t for t in range(model.spec.vocab_size) if t != model.spec.mask_id)
    prompts = [[token] * (max_len - new)] * batch
    with compute_context(model.device):
        for _ in range(_WARM):
            call = _call(
                model,
                prompts,
                algorithm,
                new,
                temperature=temperature,
                seed=seed,
                backend=backend,
                warm=True,
            )
            graphs = _graphs(call, algorithm, None, auto=False)
            _run(call, algorithm, None, graphs)
    return len(graphs.steps)


def _call(
    model: Model,
    ids: list[list[int]],
    algorithm: Algorithm,
    max_new_tokens: int,
    *,
    temperature: float | Sequence[float],
    seed: int,
    request_ids: Sequence[int] | None = None,
    backend: str | None,
    on_step: Callable[[Step], None] | None = None,
    warm: bool = False,
) -> Call:
    """The checked call. ``warm``: no token ends a sequence, and every kind of step is taken."""
    spec, device, mask_id = model.spec, model.device, model.spec.mask_id
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"algorithm: expected one such as pydllm.Static(), got {algorithm!r:.80}")
    if mask_id is None and algorithm.needs_mask:
        raise ValueError("model: expected a masked diffusion model, got one without a mask id")
    expect_int("max_new_tokens", max_new_tokens, 1)
    temperatures = _temperatures(temperature, len(ids))
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an int in [0, 2^64), got {seed!r}")
    request_ids = range(len(ids)) if request_ids is None else request_ids
    if len(request_ids) != len(ids):
        raise ValueError(
            f"request_ids: expected {len(ids)}, one per prompt, got {len(request_ids)}"
        )
    for request_id in request_ids:
        if type(request_id) is not int or not -(2**31) <= request_id < 2**31:
            raise ValueError(f"request_ids: expected ints in int32, got {request_id!r}")
    longest = max(map(len, ids)) + max_new_tokens
    if spec.max_positions is not None and longest > spec.max_positions:
        raise ValueError(
            f"prompts: expected at most {spec.max_positions} positions with "
            f"max_new_tokens={max_new_tokens}, got {longest}"
        )
    algorithm.check(model, max_new_tokens)

    def numbers(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    lengths = [len(prompt) for prompt in ids]
    eos = torch.tensor(spec.eos_ids, device=device) if spec.eos_ids else None
    max_len = padded_length(model, max(lengths), max_new_tokens, fixed_shapes=False)
    empty = -1 if mask_id is None else mask_id
    x = lay_out(model, empty, ids, max_new_tokens, max_len)
    return Call(
        model=model,
        mask_id=empty,
        x=x.to(device),
        prompt_length=numbers(lengths),
        end=numbers([length + max_new_tokens for length in lengths]),
        request_id=numbers(request_ids),
        temperature=torch.tensor(temperatures, dtype=torch.float32, device=device)
        if isinstance(temperature, Sequence)
        else float(temperature),
        seed=seed,
        backend=backend,
        eos=torch.full_like(eos, -1) if warm and eos is not None else eos,
        suppress_ids=None if mask_id is None else numbers([mask_id]),
        prompt_lengths=lengths,
        max_new_tokens=max_new_tokens,
        on_step=on_step,
        warm=warm,
    )


def _temperatures(temperature: float | Sequence[float], prompts: int) -> list[float]:
    values = list(temperature) if isinstance(temperature, Sequence) else [temperature]
    for value in values:
        if type(value) not in (int, float) or not 0 <= value <= _HOTTEST:
            raise ValueError(f"temperature: expected a number in [0, {_HOTTEST:g}], got {value!r}")
        if 0 < value < _COLDEST:
            raise ValueError(f"temperature: expected 0 or at least {_COLDEST:g}, got {value!r}")
    if isinstance(temperature, Sequence) and len(values) != prompts:
        raise ValueError(f"temperature: expected {prompts}, one per prompt, got {len(values)}")
    return values


def _check_batch(max_batch: int | None, graph: bool | str, model: Model) -> None:
    if max_batch is not None:
        expect_int("max_batch", max_batch, 1)
    if graph not in (True, False, "auto"):
        raise ValueError(f"graph: expected True, False or 'auto', got {graph!r}")
    if graph is True and not _records(model):
        raise ValueError(
            f"graph: expected a model of pydllm.load for True, got a {type(model).__name__}"
        )


def _records(model: Model) -> bool:
    """Whether the model keeps recorded steps."""
    return hasattr(model, "graphs")


def _graphs(call: Call, algorithm: Algorithm, max_batch: int | None, *, auto: bool) -> Graphs:
    """Recorded steps and buffers for calls of this kind."""
    rows = len(call.prompt_lengths)
    batch = power_of_two(min(rows, max_batch or rows))
    max_len = padded_length(
        call.model, max(call.prompt_lengths), call.max_new_tokens, fixed_shapes=True
    )
    per_prompt = isinstance(call.temperature, Tensor)
    sampled = per_prompt or call.temperature > 0
    # What noise is drawn with is captured, where there is any.
    noise = (
        "each" if per_prompt else call.temperature,
        call.seed if sampled or algorithm.is_random else None,
    )
    kind = (cache_key(algorithm), call.model.spec, noise, call.backend)
    return graphs_of(call.model, kind, batch, max_len, auto=auto)


def _run(
    call: Call, algorithm: Algorithm, max_batch: int | None, graphs: Graphs | None
) -> Generation:
    """Decode over the recorded steps; as it is where there are none, or another call has them."""
    if graphs is None or not graphs.lock.acquire(blocking=False):
        call = call.with_runner(Eager())
        return _collect(drive(algorithm.decoder(call), call, max_batch=max_batch), call)
    try:
        call = call.with_max_len(graphs.max_len).with_runner(graphs)
        return _collect(drive(algorithm.decoder(call), call, max_batch=max_batch), call)
    finally:
        graphs.lock.release()


def _collect(decoded: Decoded, call: Call) -> Generation:
    model, max_new_tokens = call.model, call.max_new_tokens
    x, step_map = (t.to("cpu", torch.int64) for t in (decoded.x, decoded.step_map))
    counters = {name: t.to("cpu", torch.int64) for name, t in decoded.counters.items()}
    nfe = counters["nfe"]
    new = [slice(n, n + max_new_tokens) for n in call.prompt_lengths]
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
        new_tokens=[row[:n].clone() for row, n in zip(answers, counted.numpy(), strict=True)],
        finish_reason=["eos" if ended else "length" for ended in ends.any(1).numpy()],
        nfe=nfe,
        tokens_per_forward=counted / nfe.clamp(min=1),
        step_map=torch.stack([step_map[row, part] for row, part in enumerate(new)]),
        text=text,
        verifier_nfe=counters.get("verifier_nfe"),
        rounds=counters.get("rounds"),
        finite=check_finite(call, decoded.x),
    )
