"""The loops of SDAR, LLaDA2 and Fast-dLLM v2 as published, stated plainly.

Everything is computed in every step.
"""

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


def fast_dllm_v2(plain, prompt, new, mask_id, stop, small, threshold, keep, block_size=32):
    """Prompt and answer: every forward in full, without a cache, but for what ``keep`` freezes."""
    x, known, first_new = list(prompt), len(prompt), len(prompt)

    def logits(ids):
        return plain(torch.tensor(ids), block=block_size)[1]

    def predicted(rows):
        """Row i predicts the token after it, within a window; its first row is there twice."""
        return torch.cat((rows[:1], rows[:-1]))

    if known % block_size == 0:
        x.append(int(logits(x)[-1].argmax()))
    for _ in range(new // block_size):
        if stop in x[first_new:]:
            break
        known = len(x)
        start = known // block_size * block_size
        x += [mask_id] * (start + block_size - known)
        frozen = None

        def stopped(x=x, known=known):
            fresh = x[known:]
            return stop in fresh and mask_id not in fresh[: fresh.index(stop)]

        for first in range(start, start + block_size, small):
            part = range(first, first + small)
            while any(x[i] == mask_id for i in part) and not stopped():
                if keep and frozen is not None and x[first] != mask_id:
                    outside = [i for i in range(start + block_size) if i not in part]
                    others = [(k[outside], v[outside]) for k, v in frozen]
                    ids = torch.tensor([x[i] for i in part])
                    _, rows, made = plain(ids, first, others)
                    for (k, v), (own_k, own_v) in zip(frozen, made, strict=True):
                        k[list(part)], v[list(part)] = own_k, own_v
                    rows = predicted(rows)
                else:
                    _, whole, frozen = plain(torch.tensor(x), block=block_size)
                    rows = predicted(whole[start:])[first - start : first - start + small]
                prob, token = rows.softmax(-1).max(-1)
                masked = torch.tensor([x[i] == mask_id for i in part])
                prob = prob.masked_fill(~masked, -1)
                best = int(prob.argmax())
                for offset, i in enumerate(part):
                    if masked[offset] and (offset == best or prob[offset] > threshold):
                        x[i] = int(token[offset])
        if not stopped():
            x.append(int(logits(x)[-1].argmax()))
    fresh = x[first_new:]
    return x[: first_new + fresh.index(stop) + 1] if stop in fresh else x


def llada21(
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
    editing_threshold=0.9,
    max_post_steps=16,
    eos_id,
    mask_id,
    num_to_transfer=1,
    forwards=None,
):
    """One list of tokens; ``forwards`` receives the first position of each forward's block."""
    length = prompt.shape[1]
    total = -(-(length + gen_length) // block_length) * block_length
    x = prompt[0].tolist() + [mask_id] * (total - length)
    for first in range(length // block_length * block_length, total, block_length):
        last, post = first + block_length, 0
        while True:
            masks = [j for j in range(first, last) if x[j] == mask_id]
            post += not masks
            if post > max_post_steps:
                break
            logits = plain(torch.tensor(x[:last]), block=block_length)[1][first:]
            if forwards is not None:
                forwards.append(first)
            token, p = (t.tolist() for t in sample(logits, temperature, top_k, top_p))
            sure = [j for j in masks if p[j - first] > threshold]
            if len(sure) < num_to_transfer:
                sure = sorted(masks, key=lambda j: -p[j - first])[:num_to_transfer]
            edits = []
            for j in range(max(first, length), last):
                other = j not in masks and token[j - first] != x[j]
                if other and p[j - first] > editing_threshold:
                    edits.append(j)
            for j in sure + edits:
                x[j] = token[j - first]
            if not masks and not edits:
                break
        new = x[length:last]
        if eos_early_stop and mask_id not in new and eos_id in new:
            break
    new = x[length : length + gen_length]
    return torch.tensor([new[: new.index(eos_id) + 1] if eos_id in new else new])
