"""``generate``, ``warmup``, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pydllm._backend.context import compute_context
from pydllm._checks import check_bool, check_int
from pydllm.decoding.arguments import HOW, Options, make_call, read_options
from pydllm.decoding.call import Call, Step, extents, padded_length
from pydllm.decoding.driver import Algorithm, Drive
from pydllm.decoding.generation import Generation, collect
from pydllm.decoding.graph import Eager, Graphs, cache_key, graphs_of, power_of_two
from pydllm.decoding.memory import expect_room
from pydllm.decoding.prompts import Prompt, encode_prompts
from pydllm.decoding.stops import Stop
from pydllm.models import Model, NativeModel

_WARM = 3  # dummy batches: the first compiles, the second captures, the third is as any other


def generate(
    model: Model,
    prompts: Sequence[Prompt] | Tensor | Mapping[str, Any],
    algorithm: Algorithm,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    top_k: int | None | Sequence[int | None] = None,
    top_p: float | None | Sequence[float | None] = None,
    guidance: float = 0.0,
    suppress_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    stop: Stop | Sequence[Stop | None] | None = None,
    ignore_eos: bool = False,
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
            tensor or array of ids, or a mapping with ``input_ids`` and ``attention_mask``. Masks in
            a prompt are filled in place; models with full attention then see both sides,
            block-causal ones what their blocks do. Not from left to right.
        algorithm: ``Static(...)``, ``Threshold(...)``, ``Factor(...)``, ``EntropyBound(...)``,
            ``FreeDave(...)``, ``MultiBlock(...)``, ``APD(...)``, ``LeftToRight(...)``,
            ``Autoregressive()``, ``SelfSpeculative(...)``, ``Editing(...)``,
            ``LevenshteinEditing(...)``, or one of your own.
        max_new_tokens: length of the generation region, in tokens: one for all prompts, or a list
            with one per prompt. 0 where a prompt has masks and nothing is to follow it.
        temperature: 0 takes the arg-max; from 1e-6 on, tokens are drawn from
            softmax(logits / temperature). Or a list with one per prompt.
        top_k: only the k most probable tokens of a position count.
        top_p: only the most probable tokens of a position count whose mass at the temperature first
            exceeds ``top_p``, in (0, 1]. Either filter: one for all prompts, or a list with one, or
            None, per prompt. They also apply to the confidences that an algorithm compares. APD and
            LeftToRight take ``top_p`` alone.
        guidance: s of classifier-free guidance: logits are ``(1 + s) with - s without``, those of a
            second forward whose prompt is masked. Each forward computes twice the rows. For
            block-wise algorithms, Editing, FreeDave and MultiBlock.
        suppress_ids: up to 15 token ids that are never predicted.
        logprobs: keep the log-probabilities of the new tokens; at temperatures above 0 the LM head
            is evaluated twice. Not with APD and LeftToRight.
        stop: what ends an answer besides EOS: a string, a token id, or a list of them; or a list of
            such lists, one per prompt. A string may begin and end inside tokens and may be a
            special token. Decoding ends when the block, or the round, that completes a stop is
            done; the text ends before the stop.
        ignore_eos: decode on after an EOS.
        seed: of the noise, in [0, 2^64). A prompt's noise depends on the seed, its request id, the
            position and the number of tokens decoded before, and on nothing else in the batch.
        request_ids: the prompts' ids in the noise key, int32; default 0, 1, 2, ...
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``, for every op.
        graph: replay the steps as CUDA graphs (docs/cuda-graphs.md): True; False; or ``"auto"``, on
            a GPU with a model of ``pydllm.load``, once a step has run a few times. The tokens are
            the same. ``pydllm.warmup`` captures beforehand. Without a GPU True gives the steps
            the shapes and buffers that they have there.
        max_batch: sequences in the batch at most; a waiting prompt takes the slot of a finished
            one. Default: all prompts. A prompt's answer, step map and forwards do not depend on it.
        deterministic: compute so that a row's bits do not depend on the batch or the number of
            candidates (``ops.linear`` in place of the BLAS's products). A sequence's tokens are
            then bitwise those that it has alone, and FreeDave's bitwise its baseline's, in bf16
            too. Slower.
        on_step: called after every forward with a ``Step`` of copies, which costs a copy of all
            tokens each time.

    Returns:
        A ``Generation``, on the CPU. Ctrl-C (``KeyboardInterrupt``) ends the call and returns what
        has been decoded by then.

    Raises:
        ValueError, TypeError: an argument that cannot be decoded with, or keys and values that do
            not fit into the free memory, said before anything runs.

    Example:
        >>> generation = pydllm.generate(model, ["how many ?"], pydllm.Threshold(threshold=0.9),
        ...                              max_new_tokens=64)
        >>> generation.text, generation.nfe
    """
    options = Options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        suppress_ids=suppress_ids,
        logprobs=logprobs,
        seed=seed,
        request_ids=request_ids,
        stop=stop,
        ignore_eos=ignore_eos,
        backend=backend,
        graph=graph,
        max_batch=max_batch,
        deterministic=deterministic,
        on_step=on_step,
    )
    prepared = prepare(model, prompts, algorithm, max_new_tokens, options)
    with compute_context(model.device):
        return prepared.run()


@dataclass(frozen=True)
class Prepared:
    """A checked call, and how its steps are run."""

    call: Call
    algorithm: Algorithm
    max_batch: int | None
    graphs: Graphs | None

    @contextmanager
    def drive(self) -> Iterator[Drive]:
        """Over the recorded steps; as it is where there are none, or another call has them."""
        graphs = self.graphs
        if graphs is None or not graphs.lock.acquire(blocking=False):
            yield self._begin(self.call.with_runner(Eager()))
            return
        try:
            yield self._begin(self.call.with_max_len(graphs.max_len).with_runner(graphs))
        finally:
            graphs.lock.release()

    def run(self) -> Generation:
        with self.drive() as run:
            return collect(run.run(), run.call)

    def _begin(self, call: Call) -> Drive:
        decoder, rows = self.algorithm.decoder(call), len(call.prompt_lengths)
        batch = call.runner.batch_size(min(rows, self.max_batch or rows))
        if self.graphs is None or not self.graphs.steps:
            expect_room(call, decoder, batch)
        return Drive(decoder, call, self.max_batch)


def prepare(
    model: Model,
    prompts: Any,
    algorithm: Algorithm,
    max_new_tokens: int | Sequence[int],
    options: Options,
) -> Prepared:
    """Check the arguments of ``generate``, which are these."""
    ids, graph, max_batch = encode_prompts(model, prompts), options.graph, options.max_batch
    check_bool("deterministic", options.deterministic)
    if options.deterministic:
        if not isinstance(model, NativeModel):
            raise ValueError(
                "deterministic: expected a model of pydllm.load for True, "
                f"got a {type(model).__name__}"
            )
        model = model.deterministic()
    with compute_context(model.device):
        call = make_call(model, ids, algorithm, max_new_tokens, options)
        _check_batch(max_batch, graph, model)
        graphs = None
        if graph is True or (graph == "auto" and model.device.type == "cuda" and _records(model)):
            graphs = _graphs(call, algorithm, max_batch, auto=graph == "auto")
    return Prepared(call, algorithm, max_batch, graphs)


def warmup(
    model: Model,
    algorithm: Algorithm,
    batch: int,
    max_len: int,
    *,
    max_new_tokens: int | None = None,
    **options: Any,
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
        options: further keywords of ``generate``. Of those that filter and draw, whether they are
            given counts, and their values do not, but for ``seed`` and ``guidance``.

    Returns:
        How many steps are captured for calls of this kind.

    Raises:
        ValueError, TypeError: as ``generate``.
        PydllmError: a step cannot be captured.
    """
    check_int("batch", batch, 1)
    check_int("max_len", max_len, 2)
    new = max_len // 2 if max_new_tokens is None else max_new_tokens
    if type(new) is not int or not 1 <= new < max_len:
        raise ValueError(f"max_new_tokens: expected an int in [1, {max_len}), got {new!r}")
    _check_batch(None, True, model)
    token = next(t for t in range(model.spec.vocab_size) if t != model.spec.mask_id)
    prompts = [[token] * (max_len - new)] * batch
    read = replace(read_options("warmup", options, without=HOW), warm=True)
    with compute_context(model.device):
        for _ in range(_WARM):
            call = make_call(model, prompts, algorithm, new, read)
            graphs = _graphs(call, algorithm, None, auto=False)
            Prepared(call, algorithm, None, graphs).run()
    return len(graphs.steps)


def _check_batch(max_batch: int | None, graph: bool | str, model: Model) -> None:
    if max_batch is not None:
        check_int("max_batch", max_batch, 1)
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
    used = extents(call.first_positions, call.ends, shared=algorithm.shares_region)
    max_len = padded_length(call.model, call.prompt_lengths, used, fixed_shapes=True)
    sampled = isinstance(call.temperature, Tensor)
    # The seed is captured, where noise is drawn; what else a call says is read from its tensors.
    seed = call.seed if sampled or algorithm.is_random else None
    lists = (call.eos, call.suppress_ids)
    sizes = tuple(None if ids is None else len(ids) for ids in lists)
    flags = (
        sampled,
        call.top_k is None,
        call.top_p is None,
        call.logprobs,
        call.guidance,
        call.has_infill,
    )
    kind = (cache_key(algorithm), call.model.spec, seed, call.backend, sizes, flags)
    return graphs_of(call.model, kind, batch, max_len, auto=auto)
