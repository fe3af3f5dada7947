"""APD's loop for Dream as published, stated plainly: one sequence, keys of every layer as lists."""

from types import SimpleNamespace

import torch

LOWEST = torch.finfo(torch.float64).min


def draft(rows, temperature, top_p, top_k):
    """A token for each row ``(n, V)``; at a temperature it counts in the race once more."""
    if temperature == 0:
        return rows.argmax(-1)
    rows, kept = rows / temperature, []
    for row in rows:
        if top_p is not None and top_p < 1:
            p, mass, row = row.softmax(-1), 0.0, row.clone()
            for token in p.argsort(descending=True).tolist():
                if mass > top_p:
                    row[token] = LOWEST
                mass += p[token].item()
        if top_k is not None:
            row = torch.where(row < row.sort(descending=True).values[:top_k][-1], LOWEST, row)
        kept.append(row)
    u = torch.rand(rows.shape, dtype=torch.float64)
    return (torch.stack(kept).exp() / (-u.log()) ** temperature).argmax(-1)


def apd(
    plain,
    verifier,
    prompt,
    *,
    new,
    mask_id,
    eos_id=None,
    temperature=0.0,
    top_p=None,
    top_k=None,
    tokens_per_step=None,
    kv_window=None,
    max_lookahead=None,
    apd_mixture_weight=None,
):
    """``plain``: Dream; ``verifier``: a causal model, computed from its first position always."""
    x = torch.cat((prompt[0], torch.full((new,), mask_id)))
    cursor = (x == mask_id).nonzero()[0].item()
    counts, keys = [], None
    while cursor < len(x):
        right = len(x) if max_lookahead is None else min(cursor + max_lookahead, len(x))
        left = 0
        if keys is not None:
            left = max(cursor - counts[-1] - (kv_window - 1), 0)
        old = None if keys is None else [(k[:left], v[:left]) for k, v in keys]
        _, logits, fresh = plain(x[left:right], left, old)
        if kv_window is not None:
            keys = fresh
            if old is not None:
                keys = [
                    tuple(map(torch.cat, zip(a, b, strict=True)))
                    for a, b in zip(old, fresh, strict=True)
                ]
        # Row i - 1 predicts position i; the window's first one has its own.
        logits = torch.cat((logits[:1], logits[:-1]))[x[left:right] == mask_id]
        tokens = draft(logits, temperature, top_p, top_k)
        count = tokens_per_step
        if apd_mixture_weight is not None:
            said = verifier(torch.cat((x[:cursor], tokens)), causal=True)[1][cursor - 1 : -1]
            mixed = apd_mixture_weight * logits + (1 - apd_mixture_weight) * said
            wrong = [j for j in range(1, len(tokens)) if mixed[j].argmax() != tokens[j]]
            count = min([*wrong, len(tokens)])
        x[cursor : cursor + count] = tokens[:count]
        cursor += count
        counts.append(count)
        if mask_id not in x or eos_id in x:
            break
    return SimpleNamespace(sequences=x[None], acceptance_counts=counts)
