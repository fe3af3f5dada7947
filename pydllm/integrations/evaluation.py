"""What an evaluation harness asks of a model, without the harness: text in, text and numbers out.

``pydllm.integrations.harness`` puts lm-evaluation-harness in front of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydllm.decoding import generate
from pydllm.decoding.driver import Algorithm
from pydllm.metrics.likelihood import log_likelihood, matches_greedy
from pydllm.models import Model, encode

_LOG = logging.getLogger("pydllm")
# Every name that a task may give the length by, the first that is there counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Options of other decoders, and the values at which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1),
}
_NO_TOP_P, _NO_TOP_K = (None, 0, 1), (None, 0, -1)
# Those that mean nothing here, whatever their value.
_IGNORED = ("eos_token_id", "pad_token_id", "use_cache", "suffix")

_CALL = 8  # batches of requests per call of generate: how often answers are handed out


@dataclass
class Tally:
    """What the answers of one task cost.

    Attributes:
        requests: answers.
        tokens: tokens up to and including EOS or the stop string.
        forwards, verifier_forwards: of the two models, a sequence counting its own.
        seconds: in ``generate``; a batch counts for its tasks in proportion to their requests.
        per_request: tokens per forward of each answer.
    """

    requests: int = 0
    tokens: int = 0
    forwards: int = 0
    verifier_forwards: int = 0
    seconds: float = 0.0
    per_request: list[float] = field(default_factory=list)

    def as_row(self) -> dict[str, float]:
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "forwards": self.forwards,
            "verifier_forwards": self.verifier_forwards,
            "tokens_per_forward": round(sum(self.per_request) / max(self.requests, 1), 4),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 2),
        }


@dataclass(frozen=True)
class _Question:
    index: int
    ids: list[int]
    until: list[str]
    length: int
    temperature: float
    top_p: float | None
    top_k: int | None


def merge_tallies(parts: Sequence[Mapping[str, Tally]]) -> dict[str, Tally]:
    """The costs of several processes, by task; a task takes as long as the slowest of them."""
    merged: dict[str, Tally] = {}
    for part in parts:
        for task, tally in part.items():
            total = merged.setdefault(task, Tally())
            for name in ("requests", "tokens", "forwards", "verifier_forwards"):
                setattr(total, name, getattr(total, name) + getattr(tally, name))
            total.seconds = max(total.seconds, tally.seconds)
            total.per_request = total.per_request + tally.per_request
    return merged


class Evaluator:
    """A model and an algorithm that answer an evaluation's requests, in batches of unequal lengths.

    Args:
        model: with a tokenizer.
        algorithm: decodes the answers; likelihoods do not depend on it.
        batch_size: sequences a forward, of answers as of likelihoods.
        max_gen_toks: length of an answer, in tokens, where the task does not say.
        max_length: longest sequence; default the model's own limit. What is longer loses its
            beginning.
        mc_num: maskings a likelihood (``pydllm.metrics.log_likelihood``).
        check_greedy: tell for each likelihood whether greedy decoding would give the continuation;
            otherwise that is always false.
        seed: of the noise and of the maskings. A request's noise depends on its place among the
            requests, not on the batch.
        backend: as in ``pydllm.ops``.
        place: (process, processes) where the requests of a task are dealt out one by one: their
            noise is that of a single process.
    """

    def __init__(
        self,
        model: Model,
        algorithm: Algorithm,
        *,
        batch_size: int = 1,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        mc_num: int = 128,
        check_greedy: bool = True,
        seed: int = 0,
        backend: str | None = None,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        if model.tokenizer is None:
            raise ValueError("model: expected one with a tokenizer.json, got none")
        numbers = {"batch_size": batch_size, "max_gen_toks": max_gen_toks, "mc_num": mc_num}
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        limit = model.spec.max_positions
        if max_length is not None and (max_length < 2 or (limit and max_length > limit)):
            raise ValueError(f"max_length: expected 2 to {limit}, got {max_length}")
        self.model, self.algorithm, self.tokenizer = model, algorithm, model.tokenizer
        self.batch_size, self.max_gen_toks, self.mc_num = batch_size, max_gen_toks, mc_num
        self.max_length = max_length or limit
        self.check_greedy, self.seed, self.backend = check_greedy, seed, backend
        self.place = place
        self.tallies: dict[str, Tally] = {}

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def _bare(self, text: str) -> list[int]:
        """Without the special tokens that the tokenizer adds."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def generate_until(
        self,
        requests: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        tasks: Sequence[str] | None = None,
        on_done: Callable[[int, str], None] = lambda index, text: None,
    ) -> list[str]:
        """An answer to every (prompt, options), cut at the first of the option's ``until`` strings.

        Options: ``until``, a string or a list; ``max_gen_toks`` (or ``max_new_tokens``,
        ``max_tokens``, ``max_completion_tokens``); ``temperature``, ``top_p`` and ``top_k``, which
        count unless ``do_sample`` is false. What is not here is refused where it would matter.

        Args:
            tasks: the task of each request, for ``report``.
            on_done: called with the index of a request and its answer, in any order.
        """
        questions = [self._question(i, text, options) for i, (text, options) in enumerate(requests)]
        # In a call waiting prompts take the slots of finished ones. The longest come first: memory
        # runs out at once.
        questions.sort(key=lambda q: (-q.length, -len(q.ids), q.index))
        answers = [""] * len(requests)
        while questions:
            batch = questions[: _CALL * self.batch_size]
            del questions[: len(batch)]
            started = time.perf_counter()
            result = generate(
                self.model,
                [q.ids for q in batch],
                self.algorithm,
                max_new_tokens=[q.length for q in batch],
                temperature=[q.temperature for q in batch],
                top_p=[q.top_p for q in batch],
                top_k=[q.top_k for q in batch],
                stop=[q.until for q in batch],
                seed=self.seed,
                request_ids=[q.index * self.place[1] + self.place[0] for q in batch],
                backend=self.backend,
                max_batch=self.batch_size,
            )
            result.expect_complete()
            seconds = (time.perf_counter() - started) / len(batch)
            for row, question in enumerate(batch):
                text = (result.text or [])[row]
                answers[question.index] = text
                task = "" if tasks is None else tasks[question.index]
                verified = 0 if result.verifier_nfe is None else int(result.verifier_nfe[row])
                rate = result.tokens_per_forward[row].item()
                self._count(task, rate, int(result.nfe[row]), verified, seconds)
                on_done(question.index, text)
        return answers

    def loglikelihood(
        self,
        requests: Sequence[tuple[str, str]],
        *,
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[tuple[float, bool]]:
        """(Bound on the log-likelihood in nats, whether greedy decoding gives it) of every
        (context, continuation): ``pydllm.metrics.log_likelihood`` and ``matches_greedy``.

        ``on_done`` is called with a number of requests that were begun.
        """
        pairs = [self._fit(*self._split(*request)) for request in requests]
        scores = self._score(pairs, on_done)
        greedy = [False] * len(pairs)
        if self.check_greedy:
            options: dict[str, Any] = {"batch_size": self.batch_size, "backend": self.backend}
            greedy = matches_greedy(self.model, pairs, **options).tolist()
        return list(zip(scores, greedy, strict=True))

    def loglikelihood_rolling(
        self, texts: Sequence[str], *, on_done: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        """A bound on the log-likelihood of every text, in nats.

        A text longer than ``max_length`` is cut into pieces that are scored one by one without what
        stands before them, which keeps it a bound, a loose one.
        """
        pairs, owner = [], []
        for index, text in enumerate(texts):
            ids, prefix = self._bare(text), self._prefix()
            room = (self.max_length or len(ids) + len(prefix)) - len(prefix)
            for first in range(0, len(ids), room):
                pairs.append((prefix, ids[first : first + room]))
                owner.append(index)
        totals = [0.0] * len(texts)
        for index, score in zip(owner, self._score(pairs, on_done), strict=True):
            totals[index] += score
        return totals

    def report(self) -> dict[str, dict[str, float]]:
        """What the answers cost, by task: see ``Tally``."""
        return {task: tally.as_row() for task, tally in self.tallies.items()}

    def _score(self, pairs: list[tuple[list[int], list[int]]], on_done: Callable) -> list[float]:
        scores = log_likelihood(
            self.model,
            pairs,
            samples=self.mc_num,
            batch_size=self.batch_size,
            seed=self.seed,
            backend=self.backend,
            on_pairs=on_done,
        )
        return scores.tolist()

    def _prefix(self) -> list[int]:
        """An empty context: what the tokenizer adds, else nothing, or EOS for shifted models."""
        spec, added = self.model.spec, self.encode("")
        if added:
            return added
        if not spec.shift_logits:
            return []
        if not spec.eos_ids:
            raise ValueError("context: expected one, this model predicts no first token; got none")
        return [spec.eos_ids[0]]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # A space at the end of the context belongs to the continuation's first token.
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if not context:
            return self._prefix(), self._bare(continuation)
        whole, given = self.encode(context + continuation), self.encode(context)
        return whole[: len(given)], whole[len(given) :]

    def _fit(self, context: list[int], target: list[int]) -> tuple[list[int], list[int]]:
        room = len(context) if self.max_length is None else self.max_length - len(target)
        if room < len(self._prefix()):
            raise ValueError(
                f"continuation: expected fewer than {self.max_length} tokens, got {len(target)}"
            )
        return self._cut(context, room), target

    def _cut(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room:
            _LOG.warning("a prompt of %d tokens lost its first %d", len(ids), len(ids) - room)
        return ids[max(len(ids) - room, 0) :]

    def _question(self, index: int, text: str, options: Mapping[str, Any]) -> _Question:
        options = dict(options)
        lengths = [options.pop(name, None) for name in _LENGTHS]
        length = next((int(n) for n in lengths if n is not None), self.max_gen_toks)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        temperature = float(options.pop("temperature", None) or 0.0)
        if options.pop("do_sample", None) is False:
            temperature = 0.0
        top_p, top_k = options.pop("top_p", None), options.pop("top_k", None)
        top_p = None if temperature == 0 or top_p in _NO_TOP_P else float(top_p)
        top_k = None if temperature == 0 or top_k in _NO_TOP_K else int(top_k)
        for name, value in options.items():
            if name in _IGNORED or (temperature == 0 and name == "min_p"):
                continue
            if value not in _NEUTRAL.get(name, ()):
                words = ("until", *_LENGTHS, "temperature", "top_p", "top_k", "do_sample")
                known = ", ".join(words)
                raise ValueError(f"{name}: expected one of the options {known}; got {value!r}")
        ids = self.encode(text)
        if self.max_length is not None:
            if length >= self.max_length:
                raise ValueError(
                    f"max_gen_toks: expected fewer than the {self.max_length} positions there are, "
                    f"got {length}"
                )
            ids = self._cut(ids, self.max_length - length)
        if not ids:
            ids = self._prefix()
        until = [stop for stop in until if stop]
        return _Question(index, ids, until, length, temperature, top_p, top_k)

    def _count(self, task: str, rate: float, forwards: int, verified: int, seconds: float) -> None:
        tally = self.tallies.setdefault(task, Tally())
        tally.requests += 1
        tally.tokens += round(rate * forwards)
        tally.forwards += forwards
        tally.verifier_forwards += verified
        tally.seconds += seconds
        tally.per_request.append(rate)
