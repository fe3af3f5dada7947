"""LLaDA's and Fast-dLLM's loops as published, stated plainly on ``Plainly``."""

import torch

INF = float("inf")


def noisy(logits, temperature):
    if temperature == 0:
        return logits
    u = torch.rand(logits.shape, dtype=torch.float64)
    return logits.double().exp() / (-u.log()) ** temperature


def spread(count, steps):
    return [count // steps + (step < count % steps) for step in range(steps)]


def top(scores, count):
    """The best positions, the first of equals first."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j))
    return [j for j in order[:count] if scores[j] > -INF]


def llada(
    model,
    prompt,
    pad=None,
    *,
    steps,
    gen_length,
    block_length,
    mask_id,
    temperature=0.0,
    cfg_scale=0.0,
    remasking="low_confidence",
    eos_inf=None,
    last_ids=(),
):
    """``eos_inf``: an id that is never predicted; ``last_ids``: (eos, eot) with their option."""
    batch, length = prompt.shape
    x = torch.cat((prompt, torch.full((batch, gen_length), mask_id)), 1)
    given = x != mask_id
    steps //= gen_length // block_length
    for first in range(length, x.shape[1], block_length):
        last = first + block_length
        quotas = [spread(int((row[first:last] == mask_id).sum()), steps) for row in x]
        for step in range(steps):
            logits = model(x, pad)
            if cfg_scale > 0:
                blank = torch.where(given, mask_id, x)
                unguided = model(blank, pad)
                logits = unguided + (cfg_scale + 1) * (logits - unguided)
            if eos_inf is not None:
                logits[..., eos_inf] = -INF
            token = noisy(logits, temperature).argmax(-1)
            if last_ids:
                # Two names for one tensor where there is no noise, or two tensors.
                for gone in last_ids if temperature == 0 else last_ids[1:]:
                    logits[..., gone] = -INF
            score = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            if remasking == "random":
                score = torch.rand(token.shape)
            for b in range(batch):
                able = torch.where(x[b] == mask_id, score[b].double(), -INF)
                able[last:] = -INF
                count = quotas[b][step]
                # Confidences of the ids that come last are 0: which of them, is topk's affair.
                ties = bool(last_ids) and remasking == "low_confidence"
                for j in able.topk(count).indices.tolist() if ties else top(able, count):
                    x[b, j] = token[b, j] if able[j] > -INF else x[b, j]
    return x


def fast_dllm(
    model,
    prompt,
    *,
    steps,
    gen_length,
    block_length,
    mask_id,
    cache="none",
    temperature=0.0,
    remasking="low_confidence",
    threshold=None,
    factor=None,
    version="a9b81e4",
):
    """Tokens and forwards, one sequence."""
    old = version == "24cc59e"
    length = prompt.shape[1]
    x = torch.cat((prompt, torch.full((1, gen_length), mask_id)), 1)
    steps //= gen_length // block_length
    forwards = 0
    for first in range(length, x.shape[1], block_length):
        last = first + block_length
        quota = spread(int((x[0, first:last] == mask_id).sum()), steps)
        for step in range(1000):
            forwards += 1
            start, stop = first, x.shape[1]
            if cache == "none" or step == 0:
                start = 0
                logits = model(x, keep=True)
            else:
                stop = last if cache == "dual" else stop
                logits = model(x, start=first, stop=stop, cache=cache)
                if cache == "prefix" and temperature > 0:
                    noisy(logits, temperature)  # drawn and thrown away
            token = noisy(logits, temperature).argmax(-1)[0]
            score = logits.double().softmax(-1)[0].gather(-1, token[:, None])[:, 0]
            if remasking == "random":
                wide = torch.float32 if old or factor is not None else torch.float64
                score = torch.rand(1, stop - start, dtype=wide)[0].double()
            masks = x[0, start:stop] == mask_id
            masks[last - start :] = False
            score = torch.where(masks, score, -INF)
            ranked = top(score, int(masks.sum()))
            if factor is not None:
                chosen = by_factor(score[ranked], factor)
            elif threshold is not None:
                chosen = sum(1 for r, j in enumerate(ranked) if r == 0 or score[j] >= threshold)
            else:
                chosen = quota[step]
            for j in ranked[:chosen]:
                x[0, start + j] = token[j]
            done = not (x[0, first:last] == mask_id).any()
            if done and (cache == "none" or step > 0 or not old):
                break
            if cache == "dual" and not old and step + 1 >= steps:
                break  # masks are left
    return x, forwards


def by_factor(score, factor):
    """Ranks until one fails; the last is taken where only it fails."""
    count = len(score)
    kept = next((r for r in range(1, count) if score[r] < 1 - factor / (r + 2)), count)
    return count if kept == count - 1 else min(kept, count)
