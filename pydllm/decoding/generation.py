"""What ``generate`` returns, and making it of what was decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pydllm.decoding.call import Call
from pydllm.decoding.driver import Decoded
from pydllm.decoding.finite import check_finite


@dataclass(frozen=True, repr=False)
class Generation:
    """Decoded sequences and what they cost.

    Attributes:
        sequences: one 1-D int64 tensor per prompt: the prompt, its masks filled, and
            ``max_new_tokens`` ids; everything after the first EOS is EOS. A sequence that was
            stopped ends with the stop. In one that was interrupted, positions that were not decoded
            hold the mask id.
        new_tokens: the new ids of each sequence, up to and including its EOS or stop.
        finish_reason: of each sequence: ``"eos"``; ``"stop"``, one of ``stop``; ``"length"``;
            ``"interrupted"``, by Ctrl-C.
        nfe: ``(B,)`` int64, forwards of the diffusion model in which the sequence took part.
        tokens_per_forward: ``(B,)`` fp32, ``new_tokens`` and filled masks of the prompt, divided by
            ``nfe``.
        step_map: ``(B, N)`` int64, N the largest ``max_new_tokens``: index of the forward whose
            result wrote the position; -1 for what was filled or cut after an end.
        logprobs: of ``new_tokens``, fp32: the log-probability of each under the distribution that
            it was drawn from, at its temperature, with top-k, top-p, guidance and suppressed ids
            (at temperature 0, under the model's own), given what the sequence held then. 0 for what
            was filled. None unless asked for.
        text: the new text of each sequence, before its EOS or stop, where the model has a
            tokenizer.
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
    logprobs: list[Tensor] | None = None
    verifier_nfe: Tensor | None = None
    rounds: Tensor | None = None
    finite: Tensor | None = None

    def expect_complete(self) -> None:
        """Raise KeyboardInterrupt again if Ctrl-C ended the call early, for loops over calls."""
        if "interrupted" in self.finish_reason:
            raise KeyboardInterrupt

    def __repr__(self) -> str:
        tokens = sum(map(len, self.new_tokens))
        return (
            f"Generation({len(self.sequences)} sequences, {tokens} new tokens, "
            f"{self.nfe.double().mean():.1f} forwards and "
            f"{self.tokens_per_forward.double().mean():.2f} tokens per forward on average)"
        )


@dataclass(frozen=True)
class Answer:
    """Where one answer ends.

    Attributes:
        tokens: new tokens up to and including the end.
        reason: see ``Generation.finish_reason``.
        text: None without a tokenizer.
    """

    tokens: int
    reason: str
    text: str | None


def read_answer(call: Call, prompt: int, ids: list[int], *, whole: bool = True) -> Answer:
    """Find the end of the new ids of a prompt. Without ``whole``, nothing but the ids before the
    first mask was decoded.
    """
    ended = not whole and call.mask_id in ids
    if ended:
        ids = ids[: ids.index(call.mask_id)]
    ends = {token for token in call.model.spec.eos_ids if not call.ignores_eos}
    at = next((place for place, token in enumerate(ids) if token in ends), None)
    until = ids if at is None else ids[: at + 1]
    found = None if call.stops is None else call.stops.find(prompt, until)
    if found is not None:
        return Answer(found.tokens, "stop", found.text)
    tokenizer = call.model.tokenizer
    text = None if tokenizer is None else tokenizer.decode(ids[:at])
    if at is not None:
        return Answer(at + 1, "eos", text)
    return Answer(len(ids), "interrupted" if ended else "length", text)


def collect(decoded: Decoded, call: Call) -> Generation:
    """The results, on the CPU."""
    x, step_map = (t.to("cpu", torch.int64) for t in (decoded.x, decoded.step_map))
    counters = {name: t.to("cpu", torch.int64) for name, t in decoded.counters.items()}
    nfe, answers, sequences, new_tokens = counters["nfe"], [], [], []
    spans, rows = list(zip(call.prompt_lengths, call.ends, strict=True)), x.tolist()
    steps = torch.full((len(spans), max(end - start for start, end in spans)), -1)
    filled = torch.zeros_like(nfe)
    noted = None if decoded.logprobs is None else decoded.logprobs.cpu()
    logprobs = []
    for row, (start, end) in enumerate(spans):
        whole = not decoded.interrupted
        answer = read_answer(call, row, rows[row][start:end], whole=whole)
        kept = start + answer.tokens
        answers.append(answer)
        sequences.append(x[row, : kept if answer.reason == "stop" else end].clone())
        new_tokens.append(x[row, start:kept].clone())
        if noted is not None:
            logprobs.append(noted[row, start:kept].clone())
        last = kept if answer.reason == "stop" else end
        steps[row, : last - start] = step_map[row, start:last]
        filled[row] = (step_map[row, :start] >= 0).sum()
    counted = torch.tensor([answer.tokens for answer in answers]) + filled
    texts = [answer.text for answer in answers if answer.text is not None]
    return Generation(
        sequences=sequences,
        new_tokens=new_tokens,
        finish_reason=[answer.reason for answer in answers],
        nfe=nfe,
        tokens_per_forward=counted / nfe.clamp(min=1),
        step_map=steps,
        text=texts if call.model.tokenizer is not None else None,
        logprobs=None if noted is None else logprobs,
        verifier_nfe=counters.get("verifier_nfe"),
        rounds=counters.get("rounds"),
        finite=None if decoded.interrupted else check_finite(call, decoded.x, x),
    )
