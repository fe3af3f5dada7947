"""Dream's loop and Fast-dLLM's block form of it as published, stated plainly on ``Plainly``."""

import torch

INF = float("inf")


def sample(logits, temperature, top_p, top_k, score="prob"):
    """Confidence and token of rows ``(..., V)``."""
    if temperature > 0:
        logits = logits / temperature
    low = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        flat = logits.reshape(-1, logits.shape[-1]).clone()
        for row in flat:
            mass = 0.0
            for token in row.softmax(-1).argsort(descending=True).tolist():
                mass, before = mass + row.softmax(-1)[token].item(), mass
                row[token] = low if before > top_p else row[token]
        logits = flat.view(logits.shape)
    if top_k is not None:
        least = logits.sort(-1, descending=True).values[..., top_k - 1, None]
        logits = torch.where(logits < least, low, logits)
    p = logits.softmax(-1)
    token = p.argmax(-1)
    if temperature > 0:
        flat = p.reshape(-1, p.shape[-1])
        token = torch.multinomial(flat, 1, True)[:, 0].view(p.shape[:-1])
    if score == "margin":
        best = p.sort(-1, descending=True).values
        return best[..., 0] - best[..., 1], token
    if score == "entropy":
        return (p * (p + 1e-10).log()).sum(-1), token
    return p.gather(-1, token[..., None])[..., 0], token


def dream(
    model,
    prompt,
    pad=None,
    *,
    new,
    mask_id,
    steps=512,
    alg="origin",
    eps=1e-3,
    temperature=0.0,
    top_p=None,
    top_k=None,
    alg_temp=None,
    on_tokens=lambda step, x, logits: x,
    on_logits=lambda step, x, logits: logits,
):
    """Tokens and the history."""
    x = torch.cat((prompt, torch.full((len(prompt), new), mask_id)), 1)
    times = torch.linspace(1, eps, steps + 1)
    history = []
    x = on_tokens(None, x, None)
    for step in range(steps):
        masks = x == mask_id
        logits = on_logits(step, x, model(x, pad))
        part = 1 - times[step + 1] / times[step] if step < steps - 1 else torch.tensor(1.0)
        if alg == "origin":
            drawn = torch.rand(int(masks.sum())) < part
            chosen = masks.clone()
            chosen[masks] = drawn
            x = x.clone()
            x[chosen] = sample(logits[chosen], temperature, top_p, top_k)[1]
        else:
            score = {"topk_margin": "margin", "entropy": "entropy"}.get(alg, "prob")
            confidence, drawn = sample(logits[masks], temperature, top_p, top_k, score)
            count = int(masks.sum() / len(x) * part)
            token, scores = torch.full_like(x, mask_id), torch.full(x.shape, -INF).double()
            token[masks], scores[masks] = drawn, confidence
            x = x.clone()
            if alg_temp and count:
                places = torch.multinomial((scores / alg_temp).softmax(-1), count)
                for row, at in enumerate(places):
                    x[row, at] = token[row, at]
            else:
                # Not over known tokens, as the original does where rows have unequal masks.
                for row, places in enumerate(scores.topk(count).indices.tolist()):
                    for j in places:
                        x[row, j] = token[row, j] if masks[row, j] else x[row, j]
        x = on_tokens(step, x, logits)
        history.append(x.clone())
    return x, history


def fast_dllm_dream(
    model,
    prompt,
    *,
    new,
    mask_id,
    steps,
    block_length,
    alg,
    dual,
    threshold=0.9,
    eps=1e-3,
    temperature=0.0,
    top_p=None,
    top_k=None,
):
    x = torch.cat((prompt, torch.full((len(prompt), new), mask_id)), 1)
    steps //= new // block_length
    times = torch.linspace(1, eps, steps + 1)
    options = (temperature, top_p, top_k)
    for first in range(prompt.shape[1], x.shape[1], block_length):
        last = first + block_length
        logits = model(x, keep=True)
        x[:, first] = sample(logits, *options)[1][:, first]
        stop = last if dual else x.shape[1]
        for step in range(1, 1000):
            logits = model(x, start=first, stop=stop, cache="dual" if dual else "prefix")
            masks = x[:, first:stop] == mask_id
            if alg == "confidence_threshold":
                scores = torch.full(masks.shape, -INF).double()
                token = torch.full(masks.shape, mask_id)
                scores[masks], token[masks] = sample(logits[masks], *options)
                scores[:, block_length:] = -INF
                count = int((x[:, first:last] == mask_id).sum())
                ranked = scores[0].topk(count).indices.tolist()  # which of equals, is topk's affair
                for rank, j in enumerate(ranked):
                    if rank == 0 or scores[0, j] >= threshold:
                        x[0, first + j] = token[0, j]
            else:
                if step == steps:
                    break
                masks[:, block_length:] = False
                scores = torch.full(masks.shape, -INF).double()
                token = torch.full(masks.shape, mask_id)
                scores[masks], token[masks] = sample(logits[masks], *options, "entropy")
                part = 1 - times[step + 1] / times[step] if step < steps - 1 else torch.tensor(1.0)
                count = int(masks.sum() / len(x) * part)
                for row, places in enumerate(scores.topk(count).indices.tolist()):
                    for j in places:
                        x[row, first + j] = token[row, j]
            if not (x[:, first:last] == mask_id).any():
                break
    return x
