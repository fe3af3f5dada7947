"""SDAR's and LLaDA2's loops as published, stated plainly: everything is computed in every step."""

import torch

INF = float("inf")


def sample(logits, temperature, top_k, top_p):
    """Token and probability of rows ``(S, V)``; the filters one after the other."""
    if temperature == 0:
        p = logits.softmax(-1)
        token = p.argmax(-1)
        return token, p.gather(-1, token[:, None])[:, 0]
    rows = []
    for row in logits / temperature:
        if top_k:
            row = torch.where(row < row.sort(descending=True).values[top_k - 1], -INF, row)
        if top_p is not None and top_p < 1:
            p, mass = row.softmax(-1), 0.0
            for token in p.argsort(descending=True).tolist():
                if mass > top_p:
                    row = row.clone()
                    row[token] = -INF
                mass += p[token].item()
        rows.append(row)
    p = torch.stack(rows).softmax(-1)
    token = torch.multinomial(p, 1)
    return token[:, 0], p.gather(-1, token)[:, 0]


def ranked(score):
    order = sorted(range(len(score)), key=lambda j: (-score[j].item(), j))
    return [j for j in order if score[j] > -INF]


def spread(count, steps):
    return [count // steps + (step < count % steps) for step in range(steps)]


def sdar(
    plain,
    prompt,
    mask_id,
    *,
    gen_length,
    block_length,
    denoising_steps,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    remasking_strategy="low_confidence_dynamic",
    confidence_threshold=0.85,
    stopping_criteria_idx=None,
):
    """Tokens, and the forwards: those of the original, which stores keys by one of their own."""
    length = prompt.shape[1]
    total = -(-(length + gen_length) // block_length) * block_length
    x = torch.cat((prompt[0], torch.full((total - length,), mask_id)))
    quota, forwards = spread(block_length, denoising_steps), int(length >= block_length)
    for first in range(length // block_length * block_length, total, block_length):
        last = first + block_length
        for step in range(denoising_steps + 1):
            masks = x[first:last] == mask_id
            forwards += 1
            if not masks.any():
                break
            logits = plain(x[:last], block=block_length)[1][first:]
            token, p = sample(logits, temperature, top_k, top_p)
            score = torch.where(masks, p, -INF)
            count = quota[step]
            if remasking_strategy == "sequential":
                begin = masks.nonzero()[0].item()
                chosen = list(range(begin, min(begin + count, block_length)))
            else:
                chosen = score.topk(count).indices.tolist()
            if remasking_strategy == "low_confidence_dynamic":
                sure = [j for j in range(block_length) if score[j] > confidence_threshold]
                chosen = sure if len(sure) >= count else chosen
            for j in chosen:
                x[first + j] = token[j]
        if any(token in (stopping_criteria_idx or []) for token in x[length:].tolist()):
            break
    return x[None], forwards


def llada2(
    plain,
    prompt,
    *,
    temperature=0.0,
    block_length=32,
    steps=32,
    gen_length=2048,
    top_p=None,
    top_k=None,
    eos_early_stop=False,
    minimal_topk=1,
    threshold=0.95,
    eos_id,
    mask_id,
):
    steps = min(steps, gen_length // minimal_topk)
    length = prompt.shape[1]
    total = -(-(length + gen_length) // block_length) * block_length
    x = torch.cat((prompt[0], torch.full((total - length,), mask_id)))
    for first in range(length // block_length * block_length, total, block_length):
        last = first + block_length
        for count in spread(block_length, steps):
            masks = x[first:last] == mask_id
            if not masks.any():
                break
            logits = plain(x[:last], block=block_length)[1][first:]
            token, p = sample(logits, temperature, top_k, top_p)
            score = torch.where(masks, p, -INF)
            sure = [j for j in range(block_length) if score[j] > threshold]
            best = score.topk(min(count, int(masks.sum()))).indices.tolist()
            chosen = sure if len(sure) >= count else best
            for j in chosen:
                x[first + j] = token[j]
            if eos_early_stop and any(token[j] == eos_id for j in chosen):
                end = (x == eos_id).nonzero()[0].item()
                if (x[length:end] != mask_id).all():
                    return x[None, length : end + 1]
        if (x[length:last] == eos_id).any():
            break
    new = x[length : length + gen_length]
    ends = (new == eos_id).nonzero()
    return x[None, length : length + (ends[0].item() if len(ends) else gen_length) + 1][
        :, : min(gen_length, total)
    ]
