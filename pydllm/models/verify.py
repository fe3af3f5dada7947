"""``verify``: whether a checkpoint computes here what its weights say, as a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydllm._backend.errors import PydllmError
from pydllm.models.chat import encode
from pydllm.models.checkpoint import read_config
from pydllm.models.load import find_folder, load
from pydllm.models.native import NativeModel
from pydllm.models.trunk import Trunk

_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:",
    "Once upon a time, in a small village",
    "To solve the equation 3x + 5 = 20, first",
    "The three primary colours are red,",
    "Water boils at a temperature of",
    "for i in range(10):\n    print(",
    "My favourite season is spring because",
    "The quick brown fox jumps over",
    "In 1969, the first humans landed on",
)
_TOKENS = 12  # of a prompt, at most
_ROUNDINGS = 32  # a layer, as in models.check


@dataclass(frozen=True)
class Check:
    """One comparison: the relative difference of two logits' norms, or counts, and its limit."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Report:
    """What ``verify`` found; ``str`` of it is text to attach to a bug.

    Attributes:
        facts: name and value, in the order of the text.
        checks: in the order of the text.
        passed: whether all of them did.
    """

    facts: dict[str, Any]
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"facts": self.facts, "checks": checks, "passed": self.passed}

    def __str__(self) -> str:
        lines = [f"{name + ':':24}{value}" for name, value in self.facts.items()]
        for check in self.checks:
            lines.append(f"{'ok' if check.passed else 'FAILED':8}{check.name}: {check.found}")
        failed = sum(not check.passed for check in self.checks)
        verdict = "all checks passed" if not failed else f"{failed} of {len(self.checks)} FAILED"
        return "\n".join([*lines, f"{'verdict:':24}{verdict}"])


@torch.no_grad()
def verify(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    reference: bool = True,
    new_tokens: int = 16,
    backend: str | None = None,
    **overrides: Any,
) -> Report:
    """Load a checkpoint and compare it with itself and with transformers.

    Logits of ten prompts under every mask that the model decodes with: against a class of
    transformers that has the same weights, in windows over a cache against all at once, in a ragged
    batch against one by one; and ``new_tokens`` of each prompt decoded greedily with both forwards,
    one token per forward, without a cache. Forwards that agree differ by roundings: the relative
    norm is allowed 32 of them per layer.

    Args:
        reference: compare with transformers. Its module holds the weights a second time.
        new_tokens: of each continuation.
        overrides: as in ``load``.

    Raises:
        As ``load``. What is computed wrongly is in the report, not raised.
    """
    folder = find_folder(source, overrides.pop("revision", None))
    started = time.perf_counter()
    model = load(folder, device=device, dtype=dtype, **overrides)
    report = Report(_facts(model, folder, time.perf_counter() - started))
    ids = _prompts(model)
    trunk, reason = None, "not asked for"
    if reference:
        try:
            trunk, reason = Trunk(folder, model.device, model.dtype), ""
        except (PydllmError, OSError, TypeError, ValueError) as error:
            reason = str(error)
    report.facts["compared with"] = trunk.name if trunk else f"nothing: {reason}"
    limit = min(_ROUNDINGS * (model.sizes.layers + 1) * torch.finfo(model.dtype).eps, 0.25)
    for attention in _masks(model):
        whole = _full(model, ids, attention, backend)
        finite = bool(torch.isfinite(whole).all())
        report.checks.append(Check(f"{attention}: finite logits", finite, str(finite).lower()))
        pairs = [
            ("windows over a cache", lambda a=attention: _windows(model, ids, a, backend)),
            ("a ragged batch", lambda a=attention: _ragged(model, ids, a, backend)),
        ]
        if trunk is not None:
            visible = _visible(model, attention, ids.shape[1])
            pairs.insert(0, (trunk.name, lambda v=visible: _of(trunk, model, ids, v)))
        for name, other in pairs:
            apart = _relative(other(), whole)
            found = f"relative difference {apart:.2e}, at most {limit:.2e}"
            report.checks.append(Check(f"{attention}: {name}", apart <= limit, found))
        if trunk is not None and new_tokens:
            report.checks.append(_continuations(model, trunk, ids, attention, new_tokens, backend))
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(model.device)
        report.facts["peak memory"] = f"{peak / 2**30:.2f} GiB"
    return report


def _facts(model: NativeModel, folder: Path, seconds: float) -> dict[str, Any]:
    spec, tokenizer = model.spec, model.tokenizer

    def named(token: int | None) -> str:
        text = None if tokenizer is None or token is None else tokenizer.id_to_token(token)
        return str(token) if text is None else f"{token} {text!r}"

    config, weights = read_config(folder), model.weight_bytes
    classes = config.get("architectures")
    facts = {
        "checkpoint": str(folder),
        "class": ", ".join(map(str, classes)) if isinstance(classes, list) else classes,
        "torch": torch.__version__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": f"{weights / 2**20:,.1f} MiB, read in {seconds:.1f} s",
        "attention": spec.attention
        + (f", blocks of {spec.block_size} from {spec.block_origin}" if spec.block_size else ""),
        "logits": "shifted" if spec.shift_logits else "not shifted",
        "one token at a time": spec.causal or "no",
        "vocabulary": f"{spec.vocab_size}, positions {spec.max_positions}",
        "mask id": named(spec.mask_id),
        "EOS ids": ", ".join(map(named, spec.eos_ids)) or "none: decoding never stops early",
        "tokenizer": "none" if tokenizer is None else f"{tokenizer.get_vocab_size()} tokens",
        "chat template": "none" if model.chat_template is None else _rendered(model),
    }
    end = _turn_end(model)
    if end is not None:
        facts["a turn ends with"] = named(end)
        if end not in spec.eos_ids:
            facts["a turn ends with"] += ", which is not an EOS id: load(..., eos_ids=) adds it"
    if model.device.type == "cuda":
        facts["device"] += f", {torch.cuda.get_device_name(model.device)}"
    return facts


def _rendered(model: NativeModel) -> str:
    """A turn through the template, or why not."""
    try:
        text = model.chat_template.render([{"role": "user", "content": "Hello"}])  # type: ignore[union-attr]
    except (ValueError, PydllmError) as error:
        return f"fails: {error}"
    return repr(text) if len(text) < 160 else f"{text[:80]!r} ... {text[-60:]!r}"


def _turn_end(model: NativeModel) -> int | None:
    """The special token after an assistant's words in the chat template, if there is one."""
    if model.chat_template is None or model.tokenizer is None:
        return None
    words = "Good morning."
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": words}]
    try:
        text = model.chat_template.render(turn, add_generation_prompt=False)
        after = encode(model.tokenizer, text.rpartition(words)[2].lstrip())
    except (ValueError, PydllmError):
        return None
    token = model.tokenizer.get_added_tokens_decoder().get(after[0]) if after else None
    return after[0] if token is not None and token.special else None


def _prompts(model: NativeModel) -> Tensor:
    """Ten prompts of one length, ``(10, T)``; random ids where there is no tokenizer for them."""
    vocab = model.spec.vocab_size
    try:
        rows = [encode(model.tokenizer, text)[:_TOKENS] for text in _PROMPTS]
    except (PydllmError, ValueError):
        rows = []
    length = min(map(len, rows), default=0)
    if length:
        return torch.tensor([row[:length] for row in rows], device=model.device).clamp(
            max=vocab - 1
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (len(_PROMPTS), _TOKENS), generator=generator)
    return ids.to(model.device)


def _masks(model: NativeModel) -> Iterator[str]:
    """The masks that a model decodes with."""
    spec = model.spec
    if spec.context == "causal":
        yield "full"
    elif spec.block_origin == "zero":
        yield spec.attention
    if spec.causal == "shifted" and spec.attention != "causal":
        yield "causal"
    elif spec.block_origin != "zero" and spec.context == "block":
        yield "full"  # a block by itself


def _visible(model: NativeModel, attention: str, rows: int) -> Tensor:
    """``(rows, rows)`` bool, query by key."""
    place = torch.arange(rows, device=model.device)
    if attention == "full":
        return torch.ones(rows, rows, dtype=torch.bool, device=model.device)
    if attention == "block_causal" and model.spec.block_size is not None:
        place = place // model.spec.block_size
    return place <= place[:, None]


def _forward(
    model: NativeModel,
    ids: Tensor,
    cache: Any,
    start: int,
    seen: int,
    attention: str,
    backend: str | None,
    pad: Tensor | None = None,
) -> Tensor:
    """Logits of a window from ``start`` on, committed."""
    batch, rows = ids.shape

    def every(value: int) -> Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=ids.device)

    hidden = model.forward(
        ids,
        every(start),
        cache,
        length=every(rows),
        kv_len=every(seen),
        commit=every(rows if cache.max_len else 0),
        attention=attention,
        pad=pad,
        backend=backend,
    )
    return model.head(hidden)


def _full(model: NativeModel, ids: Tensor, attention: str, backend: str | None) -> Tensor:
    cache = model.new_cache(ids.shape[0], 0)
    return _forward(model, ids, cache, 0, ids.shape[1], attention, backend)


def _windows(model: NativeModel, ids: Tensor, attention: str, backend: str | None) -> Tensor:
    """The same rows out of windows: from left to right, or around a cache of the whole."""
    batch, rows = ids.shape
    cache = model.new_cache(batch, rows)
    if attention == "full":  # what is cached comes from a forward of everything
        _forward(model, ids, cache, 0, rows, attention, backend)
    step = model.spec.block_size if attention == "block_causal" else 5
    parts = []
    for start in range(0, rows, step or rows):
        window = ids[:, start : start + (step or rows)]
        seen = rows if attention == "full" else start + window.shape[1]
        parts.append(_forward(model, window, cache, start, seen, attention, backend))
    return torch.cat(parts, 1)


def _ragged(model: NativeModel, ids: Tensor, attention: str, backend: str | None) -> Tensor:
    """Each row alone with other padding than its neighbours, put back in place."""
    batch, rows = ids.shape
    pad = torch.arange(batch, dtype=torch.int32, device=ids.device) % 4
    wide = torch.zeros(batch, rows + 3, dtype=torch.int64, device=ids.device)
    for row, first in enumerate(pad.tolist()):
        wide[row, first : first + rows] = ids[row]
    every = torch.full_like(pad, rows)
    cache = model.new_cache(batch, rows + 3)
    hidden = model.forward(
        wide,
        torch.zeros_like(pad),
        cache,
        length=pad + rows,
        kv_len=pad + rows,
        commit=torch.zeros_like(every),
        attention=attention,
        pad=pad,
        backend=backend,
    )
    logits = model.head(hidden)
    return torch.stack([logits[i, p : p + rows] for i, p in enumerate(pad.tolist())])


def _of(trunk: Trunk, model: NativeModel, ids: Tensor, visible: Tensor) -> Tensor:
    return trunk.logits(ids, visible)[..., : model.spec.vocab_size]


def _relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    apart = ((got - expected).norm() / expected.norm()).item()
    return apart if apart == apart else float("inf")


def _continuations(
    model: NativeModel,
    trunk: Trunk,
    ids: Tensor,
    attention: str,
    new_tokens: int,
    backend: str | None,
) -> Check:
    """Greedy decoding with both forwards; where they part, how close the decision was."""
    rows = ids.shape[1] + new_tokens
    visible = _visible(model, attention, rows)
    mine = _decode(model, ids, attention, new_tokens, lambda x: _full(model, x, attention, backend))
    theirs = _decode(
        model,
        ids,
        attention,
        new_tokens,
        lambda x: _of(trunk, model, x, visible[: x.shape[1], : x.shape[1]]),
    )
    same = (mine[0] == theirs[0]).all(1)
    margins = [mine[1][row].min().item() for row in (~same).nonzero().flatten().tolist()]
    # Two forwards that agree may part where the two best logits are roundings apart.
    close = max(margins, default=0.0) <= 64 * torch.finfo(model.dtype).eps * mine[2]
    found = f"{int(same.sum())} of {len(ids)} equal"
    if margins:
        found += f"; smallest margins of the others {', '.join(f'{m:.1e}' for m in margins)}"
    return Check(f"{attention}: greedy continuations, {trunk.name}", close, found)


def _decode(
    model: NativeModel,
    ids: Tensor,
    attention: str,
    new_tokens: int,
    logits_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, float]:
    """Tokens ``(B, new_tokens)``, margins of their choices, and the largest logit.

    With a causal mask the next token, otherwise the most confident masked position.
    """
    spec, prompt = model.spec, ids.shape[1]
    causal = attention == "causal"
    margins, largest, x = [], 0.0, ids
    if not causal:
        x = torch.cat((ids, ids.new_full((len(ids), new_tokens), spec.mask_id or 0)), 1)
    open_ = torch.ones(len(ids), new_tokens, dtype=torch.bool, device=ids.device)
    for _ in range(new_tokens):
        logits = logits_of(x).double()
        if causal:
            logits = logits[:, -1:]
        elif spec.shift_logits:
            logits = logits[:, prompt - 1 : -1]
        else:
            logits = logits[:, prompt:]
        if spec.mask_id is not None:
            logits[..., spec.mask_id] = -torch.inf
        best = logits.topk(2, -1)
        largest = max(largest, best.values.abs().max().item())
        margin = best.values[..., 0] - best.values[..., 1]
        if causal:
            x = torch.cat((x, best.indices[:, :, 0]), 1)
            margins.append(margin[:, 0])
            continue
        score = logits.log_softmax(-1).amax(-1).masked_fill(~open_, -torch.inf)
        two = score.topk(min(2, new_tokens), -1)
        at = two.indices[:, :1]
        x[:, prompt:].scatter_(1, at, best.indices[..., 0].gather(1, at))
        open_.scatter_(1, at, False)
        gap = two.values[:, 0] - two.values[:, -1]
        margins.append(torch.minimum(margin.gather(1, at)[:, 0], gap.clamp(min=0)))
    return x[:, prompt:], torch.stack(margins, 1), largest
