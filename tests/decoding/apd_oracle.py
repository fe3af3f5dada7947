"""Adaptive parallel decoding of one sequence, written down plainly: no batch, no ops.

The models are ``tests.models.plain.Plain``; the noise is the reference's, which other tests check.
"""

from __future__ import annotations

import torch

from pydllm.reference.philox import vocab_gumbel

CAUSAL = 1  # blocks of one position


def gumbel(vocab, seed, position, request, draw):
    counter = torch.tensor([[position, request, draw]], dtype=torch.int32)
    return vocab_gumbel(vocab, counter, seed)[0].double()


def nucleus(logits, top_p):
    """Which ids are in the smallest set whose mass exceeds ``top_p``."""
    kept, mass = torch.zeros_like(logits, dtype=torch.bool), 0.0
    probabilities = logits.softmax(-1)
    for token in probabilities.argsort(descending=True).tolist():
        if mass > top_p:
            break
        kept[token] = True
        mass += probabilities[token].item()
    return kept


def decode(
    dllm,
    verifier,
    prompt,
    *,
    new,
    mask,
    mixture=1.0,
    window=None,
    lookahead=None,
    limit=None,
    temperature=0.0,
    top_p=None,
    emit="draft",
    rule="paper",
    seed=0,
    request=0,
    eos=(),
    shifted=False,
):
    """Tokens, the forward that wrote each, and the number of forwards."""
    x, steps = list(prompt), []
    end, previous, rounds, frozen = len(prompt) + new, 0, 0, None
    while len(x) < end:
        c = len(x)
        left = 0 if window is None else max(previous - window + 1, 0)
        right = end if lookahead is None else min(c + lookahead, end)
        seen = frozen and [(k[:left], v[:left]) for k, v in frozen]
        if window == 0:  # the last token and the masks, over the keys of a causal forward
            left = c - 1
            seen = dllm(torch.tensor(x[:left]), block=CAUSAL)[2] if left else None
        ids = torch.tensor(x[left:] + [mask] * (right - c))
        _, logits, kept = dllm(ids, first=left, frozen=seen)
        old = seen or [(k[:0], v[:0]) for k, v in kept]
        frozen = [
            tuple(torch.cat((a, b[: c - left])) for a, b in zip(*pair, strict=True))
            for pair in zip(old, kept, strict=True)
        ]
        logits = logits[c - left - shifted : right - left - shifted][:limit]
        logits[:, mask] = -torch.inf

        drafts, allowed, noises = [], [], []
        for j, row in enumerate(logits):
            bit = int(j == 0 and emit == "draft")
            noise = gumbel(len(row), seed, c + j, request, bit)
            inside, scores = torch.ones_like(row, dtype=torch.bool), row
            if temperature > 0:
                inside = inside if top_p is None else nucleus(row / temperature, top_p)
                power = 2 if rule == "reference" else 1
                scores = row / temperature**power + noise
            drafts.append(scores.masked_fill(~inside, -torch.inf).argmax().item())
            allowed.append(inside)
            noises.append(noise)

        emitted = []
        expert = None
        if verifier is not None:
            expert = verifier(torch.tensor(x + drafts), block=CAUSAL)[1][c - 1 : -1]
            expert[:, mask] = -torch.inf
        for j, draft in enumerate(drafts):
            target = draft
            if expert is not None:
                mix = mixture * logits[j] + (1 - mixture) * expert[j]
                mix[mask] = -torch.inf
                if temperature > 0 and rule == "paper":
                    mix = mix / temperature + noises[j]
                    mix = mix if mixture == 0 else mix.masked_fill(~allowed[j], -torch.inf)
                target = mix.argmax().item()
            if (j == 0 and emit != "target") or target == draft:
                emitted.append(draft)
                continue
            if emit != "draft":
                emitted.append(target)
            break

        stop = next((j for j, token in enumerate(emitted) if token in eos), None)
        if stop is not None:
            emitted = emitted[: stop + 1]
        x, previous = x + emitted, c
        steps += [rounds] * len(emitted)
        rounds += 1
        if stop is not None:
            break
    filled = x + [eos[0] if eos else 0] * (end - len(x))
    return filled, steps + [-1] * (new - len(steps)), rounds
